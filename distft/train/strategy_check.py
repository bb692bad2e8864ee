"""What really wraps the model, compared with the plan: an FSDP job that silently runs DDP has failed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy
from torch.nn.parallel import DistributedDataParallel

from distft.errors import RunError


def describe(model: Any, optimizer: Any = None) -> dict[str, Any]:
    """What runs, for status.json: wrapper and its details, optimizer, attention, gradient checkpointing, how many
    modules are compiled by themselves, backend, world size.

    `optimizer` is None where a user's script has not shown it.
    """
    kind, detail = _wrapper(model)
    initialized = dist.is_initialized()
    return {
        "wrapped": type(model).__name__,
        "kind": kind,
        **detail,
        **({"optimizer": _optimizer_name(optimizer)} if optimizer is not None else {}),
        "attention": next((name for module in model.modules() if (name := _attention(module))), None),
        "gradient_checkpointing": any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        "compiled": sum(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()),
        "world_size": dist.get_world_size() if initialized else 1,
        "backend": dist.get_backend() if initialized else None,
    }


def _attention(module: Any) -> str | None:
    """The attention that a transformers model asks for; of what is trained on text, where there are several."""
    text_config = getattr(getattr(module, "config", None), "get_text_config", None)
    return getattr(text_config(), "_attn_implementation", None) if text_config else None


def _wrapper(model: Any) -> tuple[str, dict[str, Any]]:
    """The strategy that a wrapped model runs under (`single`: none), with details."""
    if isinstance(model, DistributedDataParallel):
        return "ddp", {}
    if type(model).__name__ == "DeepSpeedEngine":
        return f"zero{model.zero_optimization_stage()}", {"zero_optimizer": type(model.optimizer).__name__}
    if isinstance(model, FSDPModule):
        return _fsdp(model)
    if isinstance(model, FullyShardedDataParallel):  # FSDP1, in a user's script
        hybrid = model.sharding_strategy in (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
        return ("hsdp" if hybrid else "fsdp"), {}
    return "single", {}


def _fsdp(model: Any) -> tuple[str, dict[str, Any]]:
    """Mesh, how many modules of each class FSDP2 shards as a unit, whether the blocks reshard after the forward pass
    (the last unit never does, and the root decides later), and how many gather the next one ahead."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    stacks = (stack for stack in model.modules() if isinstance(stack, nn.ModuleList))
    states: list[Any] = [
        block._get_fsdp_state() for stack in stacks for block in stack if isinstance(block, FSDPModule)
    ]
    reshard = {group._reshard_after_forward for state in states for group in state._fsdp_param_groups}
    mesh = next(model.parameters()).device_mesh
    return ("hsdp" if mesh.ndim == 2 else "fsdp"), {
        "mesh": list(mesh.shape),
        "units": dict(Counter(type(module).__name__ for module in units)),
        "reshard_after_forward": reshard.pop() if len(reshard) == 1 else sorted(reshard) or None,
        "gathers_ahead": sum(bool(state._states_to_forward_prefetch) for state in states),
    }


def _optimizer_name(optimizer: Any) -> str:
    """Package, class and bits of the states: `torch AdamW`, `bitsandbytes AdamW 8-bit`."""
    while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    kind = type(optimizer)
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", None)
    return " ".join([kind.__module__.split(".")[0], kind.__name__, *([f"{bits}-bit"] if bits else [])])


def check(planned: dict[str, Any], found: dict[str, Any]) -> None:
    """Compare what runs with plan.json.

    Raises:
        RunError: it is not what was planned.
    """
    if problem := mismatch(planned, found):
        raise RunError(f"{problem}: the strategy did not take effect")


def mismatch(planned: dict[str, Any], found: dict[str, Any]) -> str | None:
    """How what runs differs from plan.json, None where it does not."""
    strategy, world = planned["strategy"], planned["topology"]["world_size"]
    # With one rank, ddp may or may not wrap the model: there is nothing to reduce.
    allowed = {strategy, "single"} if strategy == "ddp" and world == 1 else {strategy}
    if found["kind"] in allowed and found["world_size"] == world:
        asked, does = planned.get("reshard_after_forward"), found.get("reshard_after_forward")
        if None in (asked, does) or asked == does:
            return None
        return f"the plan has reshard_after_forward {asked}, and the units have {does}"
    return (
        f"the plan is {strategy} on {world} ranks, but {found['kind']} ({found['wrapped']}) runs on "
        f"{found['world_size']}"
    )
