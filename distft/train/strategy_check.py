"""What really wraps the model, held against what was planned: a job that quietly ran DDP is a failed FSDP job."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from distft.errors import RunError


def describe(model: Any, optimizer: Any) -> dict[str, Any]:
    """The wrapped model in words: class, kind, what it shards over, optimizer, backend and world size."""
    if isinstance(model, DistributedDataParallel):
        kind, detail = "ddp", {}
    elif type(model).__name__ == "DeepSpeedEngine":
        stage = model.zero_optimization_stage()
        kind, detail = f"zero{stage}", {"zero_optimizer": type(model.optimizer).__name__}
    elif isinstance(model, FSDPModule):
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        mesh = next(model.parameters()).device_mesh
        kind = "hsdp" if mesh.ndim == 2 else "fsdp"
        detail = {"mesh": list(mesh.shape), "units": dict(Counter(type(unit).__name__ for unit in units))}
    else:
        kind, detail = "single", {}
    initialized = dist.is_initialized()
    return {
        "wrapped": type(model).__name__,
        "kind": kind,
        **detail,
        "optimizer": _optimizer_name(optimizer),
        "gradient_checkpointing": any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        "world_size": dist.get_world_size() if initialized else 1,
        "backend": dist.get_backend() if initialized else None,
    }


def _optimizer_name(optimizer: Any) -> str:
    """`torch AdamW`, `bitsandbytes AdamW 8-bit`: whose, class, width of its states."""
    while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    kind = type(optimizer)
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", None)
    return " ".join([kind.__module__.split(".")[0], kind.__name__, *([f"{bits}-bit"] if bits else [])])


def check(planned: dict[str, Any], found: dict[str, Any]) -> None:
    """Raises RunError when what runs is not what was planned."""
    strategy, world = planned["strategy"], planned["topology"]["world_size"]
    # One rank of ddp may be wrapped or not: there is nobody to reduce with.
    allowed = {strategy, "single"} if strategy == "ddp" and world == 1 else {strategy}
    if found["kind"] not in allowed or found["world_size"] != world:
        raise RunError(
            f"the plan is {strategy} on {world} ranks, and what runs is {found['kind']} ({found['wrapped']}) on "
            f"{found['world_size']}; the strategy was not taken up"
        )
