"""training.activation_offloading: what gradient checkpointing keeps, the inputs of blocks, waits in host memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

Hooks = Callable[[], AbstractContextManager[Any]]


class OnHost(saved_tensors_hooks):
    """Moves hidden states (rows x tokens x width) with torch's save_on_cpu; masks and positions, which blocks share,
    stay."""

    def __init__(self) -> None:
        host = save_on_cpu(pin_memory=torch.cuda.is_available())
        super().__init__(
            lambda tensor: host.pack_hook(tensor) if tensor.is_floating_point() and tensor.dim() == 3 else tensor,
            lambda found: host.unpack_hook(found) if isinstance(found, tuple) else found,
        )


def offload_block_inputs(model: Any, hooks: Hooks = OnHost) -> bool:
    """Have the checkpointed blocks of a model keep their inputs in host memory: pinned, for a GPU, and copied while the
    rank goes on. What a block computes anew in the backward pass stays on the GPU. Returns whether there are any.

    Args:
        hooks: torch's saved_tensors_hooks for an input.
    """
    name, found = "_gradient_checkpointing_func", False
    for block in model.modules():
        if checkpoint := getattr(block, name, None):
            setattr(block, name, partial(_checkpointed, checkpoint, hooks))
            found = True
    return found


def _checkpointed(checkpoint: Callable[..., Any], hooks: Hooks, function: Callable[..., Any], *inputs: Any) -> Any:
    with hooks():  # torch's checkpoint saves the inputs under these, and has hooks of its own for all the rest
        return checkpoint(function, *inputs)
