"""What of a model FSDP2 shards as a unit of its own: its blocks, and its embeddings where nothing else shares them."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def block_classes(model: nn.Module) -> list[str]:
    """Names of the model's `_no_split_modules` that are blocks.

    transformers lists there what a device map must not split. Some of that is no block: the embeddings of BERT and some
    forty other files, which accelerate shards by themselves as well, and layers of a tower that this model lacks, for
    which it fails ("Could not find the transformer layer class").
    """
    embeds: dict[str, bool] = {}
    for module in model.modules():
        name = type(module).__name__
        embeds[name] = embeds.get(name, False) or any(isinstance(part, nn.Embedding) for part in module.modules())
    return [name for name in _listed(model) if embeds.get(name) is False]


def sharding_blocks(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """`Accelerator.prepare`, for a model of which only a part can be units. Classes that someone named stay."""

    @functools.wraps(prepare)
    def prepare_units(accelerator: Any, *objects: Any, **kwargs: Any) -> Any:
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        model = next((found for found in objects if isinstance(found, nn.Module)), None)  # FSDP takes one
        with _shardable(plugin, model) if plugin and model is not None else contextlib.nullcontext():
            prepared = prepare(accelerator, *objects, **kwargs)
        if plugin and model is not None:
            gather_ahead(model)
        return prepared

    return prepare_units


def reshard(model: nn.Module) -> None:
    """Have FSDP2's units hold shards. After a forward pass without a backward pass its last one is gathered, and what
    reads the parameters would see none."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_ahead(model: nn.Module) -> None:
    """Have each block ask for the next one's parameters before it computes, as FSDP2 does by itself in the backward
    pass. It would ask when that block is called: too late on a GPU that computes a block faster than Python calls the
    next. While a block computes, its gather's output is still there (torch frees it with the next wait), so that this
    takes one block's parameters more."""
    for stack in model.modules():
        units = [block for block in stack if isinstance(block, FSDPModule)] if isinstance(stack, nn.ModuleList) else []
        for block, following in itertools.pairwise(units):
            block.set_modules_to_forward_prefetch([following])


@contextlib.contextmanager
def _shardable(plugin: Any, model: nn.Module) -> Iterator[None]:
    blocks = block_classes(model)
    if plugin.transformer_cls_names_to_wrap is None and blocks and blocks != _listed(model):
        plugin.transformer_cls_names_to_wrap = blocks
    if not _head_shares_more(model):
        yield
        return
    # accelerate would make the head a unit, and torch refuses a parameter that lies in two: they stay with the rest.
    hidden = ("get_input_embeddings", "get_output_embeddings")
    for name in hidden:
        object.__setattr__(model, name, lambda: None)
    try:
        yield
    finally:
        for name in hidden:
            object.__delattr__(model, name)


def _head_shares_more(model: nn.Module) -> bool:
    """Whether the output layer shares parameters with more than the input embeddings: BERT's bias is its parent's; and
    where a copy of an end is trained (lora.modules_to_save), the other end shares the frozen weight beside it."""
    ends = [getattr(model, f"get_{of}_embeddings", lambda: None)() for of in ("input", "output")]
    head = ends[1]
    if head is None:
        return False
    inside = {module for end in ends if end is not None for module in end.modules()}
    others = (module for module in model.modules() if module not in inside)
    elsewhere = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    first, last = ({id(p) for p in end.parameters()} if end is not None else set() for end in ends)
    apart = ends[0] is not None and getattr(ends[0], "weight", None) is not getattr(head, "weight", None)
    return bool(last & elsewhere) or (apart and bool(first & last))


def _listed(model: nn.Module) -> list[str]:
    return list(getattr(model, "_no_split_modules", None) or [])
