"""Weights that are read while the model is sharded: a rank never has more of it than its shards and one unit.

from_pretrained reads the whole model on every rank, into host memory or, quantized, onto the rank's GPU (transformers
5.23, core_model_loading.py, convert_and_load_state_dict_in_model), and only then is it sharded: full fine-tuning of 70B
would take 280 GB of the host for each rank, and QLoRA 37 GB of each GPU. Here the model is made with placeholders, and
each unit that FSDP2 or ZeRO-3 shards gets its weights just before, on the rank's own device. Every rank reads the
files, which the operating system keeps once for all ranks of a node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed import fsdp
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.pytorch_utils import Conv1D
from transformers.utils.loading_report import LoadStateDictInfo

from distft.config.recipe import Recipe
from distft.errors import DataError, RunError
from distft.train.base_files import base_files, check_shapes
from distft.train.blocks import block_classes
from distft.train.conversion import Conversion
from distft.train.mergeable import plain_name

# A parameter, and every module that has it (tied ones: several) with its name there.
Places = dict[int, tuple[torch.nn.Parameter, str, list[tuple[torch.nn.Module, str]]]]


class Stream:
    """The weights of a recipe's base, for a model that is made without them.

    Attributes:
        waiting: plain names of the parameters that are placeholders.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.files = base_files(recipe)
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        self.waiting: set[str] = set()

    @contextlib.contextmanager
    def instead(self) -> Iterator[None]:
        """Inside, from_pretrained makes placeholders of the parameters, and loads the buffers only."""
        kind: Any = PreTrainedModel
        original = kind._load_pretrained_model
        kind._load_pretrained_model = staticmethod(self._make)
        try:
            yield
        finally:
            kind._load_pretrained_model = staticmethod(original)

    def _make(self, model: Any, state: Any, files: Any, load: Any, *_: Any) -> tuple[LoadStateDictInfo, None]:
        """PreTrainedModel._load_pretrained_model for a model on the meta device."""
        self.conversion = Conversion(model, self.files.shapes())
        if problems := self.conversion.problems:
            raise DataError(f"model.name_or_path: {self.recipe.model.name_or_path} cannot be read: {problems[0]}")
        stored, missing = self.conversion.group_of, set(model.state_dict())
        dtype_of = _dtypes(load)
        parameters = dict(model.named_parameters())
        plain = {name: tuple(p.shape) for name, p in parameters.items() if type(p) is torch.nn.Parameter}
        check_shapes(self.recipe, model, self.conversion.shapes, plain)
        for name, parameter in parameters.items():
            if name not in stored:
                continue
            missing.discard(name)
            self.waiting.add(name)
            module, leaf = _owner(model, name)
            module._parameters[leaf] = made = _like(parameter, _placeholder(parameter.shape, dtype_of(name, parameter)))
            made._is_hf_initialized = True
        for name, buffer in list(model.named_buffers()):
            if name in stored:
                missing.discard(name)
                module, leaf = _owner(model, name)
                found = self.conversion.parameter(name, self.files.__getitem__)
                module._buffers[leaf] = loaded = found.to(buffer.dtype, copy=True)
                vars(loaded)["_is_hf_initialized"] = True
        model._weight_conversions = self.conversion.transforms
        return LoadStateDictInfo(missing, set(), set(), [], {}, set()), None

    def fill(self, places: Places, modules: Iterable[torch.nn.Module], device: Any = None) -> None:
        """Give the placeholders in these modules their weights, on the rank's device unless another is given."""
        for module in modules:
            for parameter in list(module.parameters()):
                if id(parameter) in places:
                    _, name, owners = places.pop(id(parameter))
                    made = self._weight(name, parameter, owners[0][0], device or self.device)
                    for owner, leaf in owners:
                        owner._parameters[leaf] = made

    def _weight(self, name: str, parameter: Any, owner: Any, device: Any) -> torch.nn.Parameter:
        tensor = self.conversion.parameter(name, lambda stored: self.files[stored].to(device))
        # A copy at least once: a tensor of a file keeps all of it mapped.
        tensor = tensor.to(parameter.dtype, copy=tensor.device.type == "cpu" and tensor.dtype == parameter.dtype)
        if type(parameter) is torch.nn.Parameter:
            return _like(parameter, tensor)
        if issubclass(getattr(owner, "source_cls", object), Conv1D):  # bitsandbytes has it the other way round
            tensor = tensor.T
        return _like(parameter, tensor).to(device)  # which quantizes

    def places(self, model: torch.nn.Module) -> Places:
        """The placeholders in a model, with its adapters and whole copies of layers (lora.modules_to_save)."""
        found: Places = {}
        for path, module in model.named_modules():
            for leaf, parameter in module._parameters.items():
                name = self.conversion.source(plain_name(f"{path}.{leaf}" if path else leaf))
                if parameter is not None and name in self.waiting:
                    found.setdefault(id(parameter), (parameter, name, []))[2].append((module, leaf))
        return found

    def fill_layers(self, model: torch.nn.Module, *layers: torch.nn.Module | None) -> None:
        """Give some layers their weights, in host memory, before the model is sharded: something starts from them."""
        places = self.places(model)
        self.fill(places, filter(None, layers), "cpu")
        self.waiting = {name for _, name, _ in places.values()}

    def around(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        """`Accelerator.prepare`, which shards with FSDP2 unit by unit: each gets its weights just before."""

        def filling(*objects: Any, **options: Any) -> Any:
            model = next((found for found in objects if isinstance(found, torch.nn.Module)), None)
            if model is None or not self.waiting:
                return prepare(*objects, **options)
            namespace: Any = fsdp
            original, places = namespace.fully_shard, self.places(model)

            def fill_and_shard(unit: Any, **options: Any) -> Any:
                self.fill(places, [unit] if isinstance(unit, torch.nn.Module) else unit)
                return original(unit, **options)

            namespace.fully_shard = fill_and_shard
            try:
                return prepare(*objects, **options)
            finally:
                namespace.fully_shard = original
                self._done(places)

        return filling

    def shard_zero3(self, model: torch.nn.Module) -> None:
        """Fill a model and give each rank its part of it, block by block, as zero.Init does with what it makes."""
        import deepspeed
        from transformers.integrations.deepspeed import deepspeed_config

        places = self.places(model)
        names = set(block_classes(model))
        blocks = [module for module in model.modules() if type(module).__name__ in names]
        for unit in (*blocks, model):
            waiting = [owner for p in unit.parameters() if id(p) in places for owner in places[id(p)][2][:1]]
            self.fill(places, [unit])
            held = torch.nn.ParameterList([owner._parameters[leaf] for owner, leaf in waiting])
            deepspeed.zero.Init(module=held, config_dict_or_path=deepspeed_config())
        self._done(places)

    def _done(self, places: Mapping[int, Any]) -> None:
        self.waiting = {name for _, name, _ in places.values()}
        if self.waiting:
            raise RunError(f"{min(self.waiting)} and {len(self.waiting) - 1} others of the base were not sharded")


def cast(parameter: torch.nn.Parameter, dtype: torch.dtype) -> None:
    """Give a parameter another dtype; a placeholder stays one."""
    waits = parameter.untyped_storage().nbytes() < parameter.nbytes
    parameter.data = _placeholder(parameter.shape, dtype) if waits else parameter.data.to(dtype)


def _placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """One element for all of a tensor; NaN, so that nothing computes with it unnoticed. On the CPU, not on the meta
    device: peft would make its adapters there as well, and accelerate tells an optimizer's parameters by their address.
    """
    return torch.full((1,), torch.nan, dtype=dtype).expand(shape)


def _like(parameter: Any, tensor: torch.Tensor) -> Any:
    """A parameter of the same kind (bitsandbytes has its own) with another tensor."""
    kind, attributes = type(parameter), vars(parameter)
    if kind is not torch.nn.Parameter:
        return kind(tensor, requires_grad=parameter.requires_grad, **attributes)
    made = kind(tensor, requires_grad=parameter.requires_grad)
    vars(made).update(attributes)
    return made


def _owner(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _dtypes(load: Any) -> Callable[[str, torch.Tensor], torch.dtype]:
    """The dtype that from_pretrained gives a parameter (convert_and_load_state_dict_in_model, "Handle dtype casting"),
    for `load`, its LoadStateDictConfig."""
    plan = load.dtype_plan or {}
    pattern, keys, _ = build_glob_alternation(list(plan)) if plan else (None, {}, {})

    def dtype_of(name: str, parameter: torch.Tensor) -> torch.dtype:
        found = pattern.search(name) if pattern else None
        if found and found.lastgroup:
            return plan[keys[found.lastgroup]]
        return load.dtype if type(parameter) is not torch.nn.Parameter else parameter.dtype

    return dtype_of
