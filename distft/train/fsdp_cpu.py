"""The remedy for accelerate ignoring FSDP on CPU ranks.

accelerate's AcceleratorState takes the FSDP plugin for MULTI_GPU and its like only (state.py, 1.13 to 1.15): on gloo
ranks an FSDP job quietly runs DDP. Everything behind that point works on the CPU, so the state is set right after its
construction. tests/test_fsdp_cpu.py fails when upstream no longer needs this.
"""

from __future__ import annotations

import functools
import os
from typing import Any


def apply() -> None:
    """Make accelerate honour FSDP on CPU ranks from now on. Does nothing on a GPU, or when FSDP is not asked for."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if wanted and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
