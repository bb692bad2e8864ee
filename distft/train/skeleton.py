"""Models without their weights, which are filled in module by module: for models that are larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig

from distft.config.recipe import Recipe
from distft.train.auto_class import auto_class
from distft.train.conversion import Conversion, Read
from distft.train.mergeable import ADAPTED


def skeleton(folder: Path, recipe: Recipe, rows: int | None = None) -> Any:
    """The model of a folder in float32, with its parameters on the meta device and its buffers on the CPU.

    `rows`: of the embeddings, instead of those in its config.json.
    """
    trust = recipe.model.trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    if rows is not None:
        config.get_text_config().vocab_size = rows
    with init_empty_weights(include_buffers=False):
        model = auto_class(config.model_type).from_config(config, dtype=torch.float32, trust_remote_code=trust)
    return model.eval()


def set_parameter(model: Any, name: str, parameter: Any) -> None:
    """Put a parameter, or a tensor that becomes one without gradient, where `name` says."""
    path, _, leaf = name.rpartition(".")
    if not isinstance(parameter, torch.nn.Parameter):
        parameter = torch.nn.Parameter(parameter, requires_grad=False)
    model.get_submodule(path)._parameters[leaf] = parameter


def fill_buffers(model: Any, conversion: Conversion, read: Read) -> None:
    """Give a skeleton the buffers that are stored, such as the biases of a router."""
    for name, buffer in model.named_buffers():
        if name in conversion.group_of:
            buffer.copy_(conversion.parameter(name, read))


@contextmanager
def filled(module: Any, name: str, read: Read) -> Iterator[None]:
    """Have the module called `name` hold its weights inside the context, and be on the meta device again after it."""
    empty = [(inner, p) for inner, p in module.named_parameters(remove_duplicate=False) if p.is_meta]
    try:
        for inner, _ in empty:
            set_parameter(module, inner, read(f"{name}.{inner}" if name else inner))
        yield
    finally:
        for inner, parameter in empty:
            set_parameter(module, inner, parameter)


class _ReadInPassing(TorchFunctionMode):
    """Reads a weight that is still on the meta device when a function is called with it.

    For what a module takes of another one, which does not run then: Gemma 4 looks up the padding token's embedding by
    `self.language_model.embed_tokens.weight[...]`.
    """

    def __init__(self, model: Any, read: Read):
        super().__init__()
        self.read = read
        self.names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in ("__get__", "__set__"):
            # An attribute needs no weight, but where it lies is where it will be read to.
            on_cpu = function == torch.Tensor.device.__get__ and id(args[0]) in self.names
            return torch.device("cpu") if on_cpu else function(*args, **kwargs)
        args, kwargs = tree_map_only(torch.nn.Parameter, self._filled, (args, kwargs))
        return function(*args, **kwargs)

    def _filled(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        name = self.names.get(id(parameter))
        return parameter if name is None else self.read(name)


@torch.no_grad()
def logits(model: Any, read: Read, rows: torch.Tensor) -> torch.Tensor:
    """Logits (rows, tokens, vocabulary) of a skeleton, with the weights of one decoder block in memory at a time."""
    handles: list[Any] = []
    held: dict[str, ExitStack] = {}

    def fill(name: str) -> Callable[..., None]:
        def hook(module: Any, *_: Any) -> None:
            held[name] = ExitStack()
            held[name].enter_context(filled(module, name, read))

        return hook

    def drop(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            held.pop(name).close()

        return hook

    for name, module in _blocks(model):
        handles.append(module.register_forward_pre_hook(fill(name)))
        handles.append(module.register_forward_hook(drop(name)))
    try:
        with _ReadInPassing(model, read):
            return model(input_ids=rows, use_cache=False).logits.float()
    finally:
        for handle in handles:
            handle.remove()
        for stack in held.values():
            stack.close()


def _blocks(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules that are filled one at a time: decoder blocks, and whatever outside them has its own weights.

    Decoder blocks are what accelerate does not split either (`_no_split_modules`).
    """
    whole = set(getattr(model, "_no_split_modules", None) or ())

    def walk(name: str, module: Any) -> Iterator[tuple[str, Any]]:
        has_weights = any(True for _ in module.parameters(recurse=False))
        if has_weights or type(module).__name__ in whole or isinstance(module, ADAPTED):
            yield name, module
            return
        for child, inner in module.named_children():
            yield from walk(f"{name}.{child}" if name else child, inner)

    yield from walk("", model)
