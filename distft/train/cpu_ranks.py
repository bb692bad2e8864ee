"""Remedies for what accelerate, DeepSpeed and bitsandbytes overlook on CPU ranks. Nothing here changes a run on GPUs.

FSDP: AcceleratorState takes the FSDP plugin for MULTI_GPU and its like only (state.py, 1.13 to 1.15), so on gloo ranks
an FSDP job quietly runs DDP. Everything behind that point works on the CPU; the state is set right after construction.

DeepSpeed: ACCELERATE_USE_CPU turns it off, and without that variable PartialState finds no backend and makes every rank
a world of 1. The backend is chosen as if the variable were there.

DeepSpeed's shared-memory all-reduce is left out: it is compiled with g++ while the ranks start (a minute, if there is
a compiler), and a run that is killed meanwhile leaves a lock behind for which every later run waits for ever.

bitsandbytes: importing it imports torch's compiler, to compile what its CPU kernels fall back to, whether or not it is
used: a fifth of a rank's start, and then minutes with g++. These functions run as they are written. And in evaluation
it packs 4-bit weights anew for CPUs with AVX512-BF16, in place, of which ZeRO-3 and FSDP know nothing: after the next
gathering the weights are broken, silently. They stay as they are.

tests/integration/test_cpu_ranks.py fails when upstream no longer needs this.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch


def apply() -> None:
    """Have CPU ranks do what was asked for from now on. Before anything imports bitsandbytes."""
    if torch.cuda.is_available():
        return
    if bitsandbytes := _import_uncompiled("bitsandbytes"):
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    if hasattr(AcceleratorState.__init__, "__wrapped__"):
        return
    if _asked("DEEPSPEED"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    original = AcceleratorState.__init__
    choose_backend = PartialState._prepare_backend

    @functools.wraps(original)
    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if _asked("FSDP") and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    @functools.wraps(choose_backend)
    def prepare_backend(self: PartialState, cpu: bool = False, *args: Any, **kwargs: Any) -> Any:
        return choose_backend(self, cpu or _asked("DEEPSPEED"), *args, **kwargs)

    AcceleratorState.__init__ = init
    PartialState._prepare_backend = prepare_backend


def _import_uncompiled(name: str) -> Any:
    """Import a package for which torch.compile leaves functions as they are; None where it is not installed."""
    compiler = torch.compile
    torch.compile = lambda function=None, **options: function or (lambda decorated: decorated)
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
    finally:
        torch.compile = compiler


def _asked(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
