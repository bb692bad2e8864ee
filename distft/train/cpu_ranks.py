"""Fixes for what accelerate, DeepSpeed and bitsandbytes get wrong on CPU ranks. Nothing here changes a run on GPUs.

FSDP: AcceleratorState uses the FSDP plugin for MULTI_GPU and the like only (state.py, 1.13 to 1.15), so that on gloo
ranks an FSDP job silently runs DDP. Everything after that point works on CPUs; the state is set right after it is made.

DeepSpeed: ACCELERATE_USE_CPU turns it off, and without that variable PartialState finds no backend and makes every rank
a world of 1. The backend is chosen as if the variable were set.

DeepSpeed's shared-memory all-reduce is turned off: g++ compiles it while the ranks start up (for a minute, where there
is a compiler), and a run that is killed meanwhile leaves a lock behind for which every later run waits for ever. Its
Muon optimizer, which every engine imports, imports torch's compiler, for two seconds of a start-up: it is not compiled.

bitsandbytes: on import it imports torch's compiler, to compile the fallbacks of its CPU kernels, needed or not: a fifth
of a rank's start-up, and then minutes of g++. The fallbacks stay uncompiled. During evaluation it also repacks 4-bit
weights in place for CPUs with AVX512-BF16, which ZeRO-3 and FSDP do not know: the weights that they gather next are
silently wrong. Weights are not repacked.

tests/integration/test_cpu_ranks.py fails when upstream no longer needs this.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch


def apply() -> None:
    """Apply the fixes, on CPU ranks only. Call it before anything imports bitsandbytes."""
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

        # All there is of it: to look a key up would try every operation first, with a compiler.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        _import_uncompiled("deepspeed.runtime.zero.muon.original_muon")
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
    """Import a package while torch.compile returns functions unchanged; None where it is not installed."""
    namespace: Any = torch  # Any: torch declares `compile` as a function with overloads
    original = namespace.compile
    namespace.compile = lambda function=None, **options: function or (lambda decorated: decorated)
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
    finally:
        namespace.compile = original


def _asked(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
