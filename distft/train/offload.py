"""training.activation_offloading: what gradient checkpointing keeps, the inputs of blocks, waits in host memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu

Hooks = Callable[[], AbstractContextManager[Any]]


def offload_block_inputs(model: Any, hooks: Hooks | None = None) -> int:
    """Have the checkpointed blocks of a model keep their inputs in host memory: pinned, for a GPU, and copied while the
    rank goes on. What a block computes anew in the backward pass stays on the GPU. Returns how many blocks do so.

    Args:
        hooks: torch's saved_tensors_hooks for an input, save_on_cpu if not given.
    """
    hooks = hooks or partial(save_on_cpu, pin_memory=torch.cuda.is_available())
    name, found = "_gradient_checkpointing_func", 0
    for block in model.modules():
        if checkpoint := getattr(block, name, None):
            setattr(block, name, partial(_checkpointed, checkpoint, hooks))
            found += 1
    return found


def _checkpointed(checkpoint: Callable[..., Any], hooks: Hooks, function: Callable[..., Any], *inputs: Any) -> Any:
    with hooks():  # torch's checkpoint saves the inputs under these, and has hooks of its own for all the rest
        return checkpoint(function, *inputs)
