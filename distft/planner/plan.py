"""The plan: every derived number of a run, and the sentences that say why. plan.json holds it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from distft.devices import Device
from distft.errors import PlanError
from distft.planner import batch as batches
from distft.planner import memory, rules
from distft.planner.batch import Batch
from distft.planner.memory import Memory
from distft.planner.model_shapes import ModelShape, read_model_shape
from distft.recipe import Parallelism, Recipe, ScriptSettings
from distft.topology import Topology

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What will run. `reasons` and `warnings` are sentences for people.

    `model`, `batch` and `memory` are None for a script of one's own: nothing is known of what it trains.
    """

    topology: Topology
    device: Device
    strategy: str  # ddp | zero1 | zero2 | zero3 | fsdp | hsdp
    offload: str  # none | optimizer | all
    shard_size: int  # ranks that share one copy of what the strategy shards; 1 for ddp
    mixed_precision: str  # bf16 | fp16 | no
    gradient_checkpointing: bool = False
    attn_implementation: str = "auto"
    model: ModelShape | None = None
    batch: Batch | None = None
    memory: Memory | None = None
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def make_plan(
    recipe: Recipe, topology: Topology, device: Device, need_weights: bool = False, bandwidth: float | None = None
) -> Plan:
    """Derive everything that the recipe leaves open; `need_weights` refuses a model that has only a config.json.

    Args:
        bandwidth: between nodes, GB/s of one node, where the profile says it.

    Raises:
        PlanError: a combination that cannot train, a batch that does not divide, a model that cannot be read.
    """
    model = read_model_shape(recipe, need_weights)
    reasons, warnings = [], _warnings(topology, device)
    strategy = _strategy(recipe, model, topology, device, reasons)
    offload, shard_size = recipe.parallelism.offload, _shard_size(recipe.parallelism, strategy, topology)
    checkpointing = recipe.training.gradient_checkpointing
    case = rules.Case(
        strategy, offload, shard_size, topology, device, recipe, model.head_dim, model=model, bandwidth=bandwidth
    )
    rules.apply(replace(case, gradient_checkpointing=None if checkpointing == "auto" else checkpointing))

    def count(micro: int, checkpointing: bool = False) -> Memory:
        return memory.count(
            recipe,
            model,
            strategy=strategy,
            offload=offload,
            shard_size=shard_size,
            nproc_per_node=topology.nproc_per_node,
            capacity=device.memory,
            micro_batch_size=micro,
            gradient_checkpointing=checkpointing,
        )

    if checkpointing == "auto":
        checkpointing = not count(1).fits and count(1, True).peak < count(1).peak
        if checkpointing:
            reasons.append("gradient_checkpointing on: one sequence does not fit without it")
    batch = _batch(recipe, topology, lambda micro: count(micro, checkpointing), reasons)
    case = replace(
        case,
        gradient_checkpointing=checkpointing,
        micro_batch_size=batch.micro_batch_size,
        accumulation=batch.gradient_accumulation_steps,
    )
    rules.apply(case)
    warnings += rules.warnings(case)
    planned = count(batch.micro_batch_size, checkpointing)
    if not planned.fits:
        warnings.append(
            f"may run out of memory: a rank needs about {planned.peak / GIB:.1f} GiB of {planned.capacity / GIB:.1f}"
        )
    return Plan(
        topology,
        device,
        strategy,
        offload,
        shard_size,
        recipe.training.mixed_precision,
        checkpointing,
        recipe.model.attn_implementation,
        model,
        batch,
        planned,
        tuple(reasons),
        tuple(warnings),
    )


def script_plan(
    parallelism: Parallelism,
    mixed_precision: str,
    topology: Topology,
    device: Device,
    settings: ScriptSettings | None = None,
) -> Plan:
    """The plan for a script of one's own: strategy and topology alone. `settings` bring its overrides to the rules.

    Raises:
        PlanError: a combination that cannot train.
    """
    strategy, reasons = parallelism.strategy, []
    if strategy == "auto":
        strategy = "ddp"
        reasons.append("ddp: nothing is known of a script's model; --set parallelism.strategy=... shards it")
    shard_size = _shard_size(parallelism, strategy, topology)
    case = rules.Case(strategy, parallelism.offload, shard_size, topology, device, script=settings)
    rules.apply(case)
    warnings = (*_warnings(topology, device), *rules.warnings(case))
    return Plan(
        topology,
        device,
        strategy,
        parallelism.offload,
        shard_size,
        mixed_precision,
        reasons=tuple(reasons),
        warnings=warnings,
    )


def _warnings(topology: Topology, device: Device) -> list[str]:
    if device.type == "cpu" and topology.nproc_per_node > (device.cores or topology.nproc_per_node):
        return [f"{topology.nproc_per_node} processes on {device.cores} cores: they will take turns"]
    return []


def _strategy(recipe: Recipe, model: ModelShape, topology: Topology, device: Device, reasons: list[str]) -> str:
    """The recipe's strategy; `auto` is the first of ddp, zero2, zero3 whose states fit by a plain count."""
    world = topology.world_size
    wanted = recipe.parallelism.strategy
    if wanted in ("fsdp", "hsdp") and world == 1:
        if recipe.parallelism.offload != "none":
            raise PlanError(f"parallelism.offload: {wanted} on one rank does not shard; use zero3, or offload: none")
        reasons.append(f"ddp: {wanted} on one rank has nothing to shard")
        return "ddp"
    if wanted != "auto":
        reasons.append(f"{wanted}: as asked")
        return wanted
    usable = memory.USABLE * device.memory
    offload = recipe.parallelism.offload
    candidates = {"none": ("ddp", "zero2", "zero3"), "optimizer": ("zero2", "zero3"), "all": ("zero3",)}[offload]
    if world == 1 and offload == "none":
        reasons.append("ddp: one rank has nothing to shard")
        return "ddp"
    for strategy in candidates:
        states = memory.count(
            recipe,
            model,
            strategy=strategy,
            offload=offload,
            shard_size=world,
            nproc_per_node=topology.nproc_per_node,
            capacity=device.memory,
        ).states
        room = f"states of {states / GIB:.2f} GiB a rank, {usable / GIB:.1f} usable"
        if states <= usable:
            reasons.append(f"{strategy}: {room}")
            return strategy
        reasons.append(f"not {strategy}: {room}")
    reasons.append(f"{candidates[-1]}: it shards the most")
    return candidates[-1]


def _shard_size(parallelism: Parallelism, strategy: str, topology: Topology) -> int:
    if strategy == "hsdp":
        size = parallelism.hsdp_shard_size
        return topology.nproc_per_node if size == "auto" else size
    return 1 if strategy == "ddp" else topology.world_size


def _batch(recipe: Recipe, topology: Topology, count: Any, reasons: list[str]) -> Batch:
    total, micro, world = recipe.training.global_batch_size, recipe.training.micro_batch_size, topology.world_size
    if micro == "auto":
        options = batches.divisors(batches.per_rank(total, world))
        micro = max((m for m in options if count(m).fits), default=1)
        reasons.append(
            f"micro_batch_size {micro}: the largest divisor of {options[-1]} sequences a rank that fits "
            f"(about {count(micro).peak / GIB:.2f} GiB of {count(micro).capacity / GIB:.1f})"
        )
    return batches.fixed(total, micro, world)


def plan_json(plan: Plan, name: str) -> dict[str, Any]:
    """plan.json, schema 1. `name` stands for the model where it is not known. Bytes per rank; null: not estimated."""
    model, batch, mem = plan.model, plan.batch, plan.memory
    return {
        "schema": 1,
        "model": {
            "name": model.name if model else name,
            "parameters": model.parameters if model else None,
            "trainable_parameters": model.trainable_parameters if model else None,
        },
        "topology": {
            "nnodes": plan.topology.nnodes,
            "nproc_per_node": plan.topology.nproc_per_node,
            "world_size": plan.topology.world_size,
            "gpu": plan.device.name if plan.device.type == "cuda" else None,
        },
        "strategy": plan.strategy,
        "offload": plan.offload,
        "shard_size": plan.shard_size,
        "mixed_precision": plan.mixed_precision,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "attn_implementation": plan.attn_implementation,
        "batch": {
            "global_batch_size": batch.global_batch_size if batch else None,
            "micro_batch_size": batch.micro_batch_size if batch else None,
            "gradient_accumulation_steps": batch.gradient_accumulation_steps if batch else None,
        },
        "memory": {
            "parameters": mem.parameters if mem else None,
            "gradients": mem.gradients if mem else None,
            "optimizer": mem.optimizer if mem else None,
            "activations": mem.activations if mem else None,
            "logits": mem.logits if mem else None,
            "buffers": None,
            "peak": mem.peak if mem else None,
            "overhead": None,
            "process": None,
            "capacity": plan.device.memory,
            "fits": mem.fits if mem else None,
            "host_per_node": mem.host_per_node if mem else None,
        },
        "communication": {"bytes_per_step": None, "seconds": None},
        "time": {"step_seconds": None, "tokens_per_second_per_gpu": None, "assumed_mfu": None},
        "candidates": [],
        "reasons": list(plan.reasons),
        "warnings": list(plan.warnings),
    }
