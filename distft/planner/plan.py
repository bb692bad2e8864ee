"""The plan: every derived number of a run, and the sentences that say why. plan.json holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from distft import rules
from distft.config.batch import Batch
from distft.config.recipe import Recipe, ScriptSettings
from distft.errors import PlanError
from distft.hardware.devices import GPUS, Device
from distft.hardware.topology import Topology
from distft.models.shapes import ModelShape, check_start, read_model_shape
from distft.planner import speed
from distft.planner.memory import Memory
from distft.planner.search import USUAL_BANDWIDTH, Candidate, Search, Where, choose, fixed_offload, shard_size
from distft.planner.setting import Setting
from distft.planner.speed import Speed
from distft.strategies.kinds import KINDS
from distft.units import gib, short

PRECISIONS = {"no": "float32"} | {name: name for name in ("bf16", "fp16")}


@dataclass(frozen=True)
class Plan:
    """What will run. `reasons`, `warnings` and `assumptions` are sentences for people.

    `model`, `batch`, `memory` and `speed` are None for a script of one's own: nothing is known of what it trains.
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
    speed: Speed | None = None
    candidates: tuple[Candidate, ...] = ()
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    chosen: Candidate | None = None
    search: Search | None = None
    simulated: bool = False  # memory was counted, not estimated
    price: float | None = None  # of a GPU and hour

    @property
    def fits(self) -> bool:
        return self.chosen is None or self.chosen.fits


def make_plan(
    recipe: Recipe,
    where: Where,
    need_weights: bool = False,
    *,
    compare: bool = False,
    count: Callable[[Recipe, Setting], Memory] | None = None,
    model: ModelShape | None = None,
    measured: float | None = None,
) -> Plan:
    """Derive everything that the recipe leaves open.

    Args:
        need_weights: refuse a model that has only a config.json.
        compare: look at other strategies too where the recipe names one.
        count: counts the memory of what is chosen (simulation/simulate.py); takes seconds, and torch.
        model: read from the recipe's unless given.
        measured: FLOP/s of a rank in an earlier run (calibrate.py).

    Raises:
        PlanError: a combination that cannot train, a batch that does not divide, a model that cannot be read.
    """
    model = model or read_model_shape(recipe, need_weights)
    if recipe.lora and recipe.lora.start_from:
        check_start(recipe.lora, model.trainable_parameters)
    search = Search.of(recipe, model, where, measured)
    reasons, warnings = [], _warnings(where.topology, where.device)
    if model.model_type and not model.is_known:
        counted = "the chosen way alone was counted" if count else "--simulate counts those of the chosen way"
        warnings.append(
            f"model_type {model.model_type} is not known here: activations are estimated as Llama's; {counted}"
        )
    strategy = _fixed_strategy(recipe, where.topology, reasons)
    if strategy:
        offload = fixed_offload(recipe.parallelism)
        rules.apply(search.case(strategy, offload))  # before configs are made of what has none
        chosen = search.best(strategy, offload)
        if chosen.broken:
            raise PlanError("\n".join(chosen.broken))
        others = [search.best(*option) for option in search.options() if option[0] != strategy] if compare else []
        candidates = [chosen, *others]
    else:
        candidates = [search.best(*option) for option in search.options()]
        chosen = choose(candidates)
        if chosen is None:
            raise PlanError("\n".join(candidates[0].broken))
        reasons += _reasons(chosen, candidates)
    if count and recipe.training.use_liger_kernel:
        warnings.append("training.use_liger_kernel: the simulation counts transformers' own kernels, which keep more")
    if count:
        chosen, candidates = _simulate(recipe, chosen, candidates, count, free=not strategy)
    setting, batch = chosen.setting, chosen.batch
    reasons += _details(recipe, chosen, search)
    warnings += rules.warnings(search.case_of(chosen))
    if not chosen.fits:
        warnings.append(misfit(chosen))
    return Plan(
        where.topology,
        where.device,
        setting.strategy,
        setting.offload,
        setting.shard_size,
        recipe.training.mixed_precision,
        setting.gradient_checkpointing,
        recipe.model.attn_implementation,
        model,
        batch,
        chosen.memory,
        chosen.speed,
        tuple(candidates),
        tuple(reasons),
        tuple(warnings),
        _assumptions(recipe, search, chosen),
        chosen,
        search,
        count is not None,
        where.price,
    )


def misfit(chosen: Candidate) -> str:
    """What will not fit, and by how much."""
    found = []
    if chosen.excess:
        need, have = chosen.memory.process, chosen.capacity
        found.append(f"a rank needs about {gib(need)} of {gib(have)}, {gib(chosen.excess)} too much")
    if chosen.host_excess:
        need, have = chosen.memory.host_per_node, chosen.host_memory
        found.append(f"a node needs about {gib(need)} of {gib(have)} of its own, {gib(chosen.host_excess)} too much")
    return f"will run out of memory: {'; '.join(found)}"


def _simulate(
    recipe: Recipe,
    chosen: Candidate,
    candidates: list[Candidate],
    count: Callable[[Recipe, Setting], Memory],
    free: bool,
) -> tuple[Candidate, list[Candidate]]:
    """The choice with its memory counted; where that does not fit after all, the next that does."""
    order = [chosen]
    if free:
        order += [
            c for c in sorted(candidates, key=lambda c: c.seconds) if c is not chosen and c.fits and not c.rejected
        ]
    counted = {}
    for candidate in order:
        found = replace(candidate, memory=count(recipe, candidate.setting))
        counted[id(candidate)] = found
        if found.fits:
            break
    else:
        found = counted[id(chosen)]
    return found, [counted.get(id(candidate), candidate) for candidate in candidates]


def _fixed_strategy(recipe: Recipe, topology: Topology, reasons: list[str]) -> str | None:
    """The recipe's strategy; None where it is open."""
    wanted = recipe.parallelism.strategy
    if wanted != "auto" and topology.world_size == 1 < KINDS[wanted].min_ranks:
        if fixed_offload(recipe.parallelism) != "none":
            raise PlanError(f"parallelism.offload: {wanted} on one rank does not shard; use zero3, or offload: none")
        reasons.append(f"ddp: {wanted} on one rank has nothing to shard")
        return "ddp"
    if wanted != "auto":
        reasons.append(f"{wanted}: as asked")
        return wanted
    return None


def _reasons(chosen: Candidate, candidates: list[Candidate]) -> list[str]:
    """Why this one, and why not those that stand before it or are faster."""
    fitting = [c for c in candidates if c.fits and not c.rejected]
    fitting = [c for c in fitting if c.setting.offload == "none"] or fitting
    found, before = [], True
    if not chosen.fits:
        found.append(f"{chosen.name}: nothing fits; it is the least too large")
    elif len(fitting) == 1:
        found.append(f"{chosen.name}: the only one that fits{_without(chosen)}")
    elif chosen.speed.step_seconds is None:
        found.append(f"{chosen.name}: it fits, and those that fit too shard or offload more")
    else:
        found.append(f"{chosen.name}: of {len(fitting)} that fit{_without(chosen)} the fastest, or simpler within 3%")
    for candidate in candidates:
        before = before and candidate is not chosen
        if not before and not (candidate in fitting and candidate.seconds < chosen.seconds and not candidate.roomy):
            continue
        if candidate.rejected:
            found.append(f"not {candidate.name}: {candidate.rejected}")
        elif not candidate.fits:
            found.append(f"not {candidate.name}: {candidate.missing}")
        elif not candidate.roomy and chosen.roomy:
            found.append(f"not {candidate.name}: it would fill {_part(candidate)} of the memory")
        elif candidate.speed.step_seconds:
            found.append(f"not {candidate.name}: {short(candidate.seconds)} s a step, against {short(chosen.seconds)}")
    return found


def _without(chosen: Candidate) -> str:
    return " without offload" if chosen.setting.offload == "none" else ""


def _details(recipe: Recipe, chosen: Candidate, search: Search) -> list[str]:
    """Why this checkpointing and this micro-batch."""
    found, setting, batch = [], chosen.setting, chosen.batch
    if recipe.training.gradient_checkpointing == "auto" and setting.gradient_checkpointing:
        without = search.variant(setting.strategy, setting.offload, False)
        if without.fits and without.seconds > chosen.seconds:
            found.append(
                f"gradient_checkpointing on: micro-batch {batch.micro_batch_size} instead of "
                f"{without.batch.micro_batch_size}, which is faster here"
            )
        elif without.fits:
            found.append(f"gradient_checkpointing on: without it {_part(without)} of the memory would be full")
        elif without.excess:
            found.append(f"gradient_checkpointing on: without it one sequence needs {gib(without.excess)} too much")
    if recipe.training.micro_batch_size == "auto" and chosen.fits:
        share = batch.micro_batch_size * batch.gradient_accumulation_steps
        spare = " with 5% to spare" if chosen.roomy else ""
        found.append(
            f"micro_batch_size {batch.micro_batch_size}: the largest divisor of {share} sequences a rank that fits"
            f"{spare} (about {gib(chosen.memory.process)} of {gib(chosen.capacity)})"
        )
    return found


def _part(candidate: Candidate) -> str:
    return f"{candidate.memory.process / candidate.capacity:.0%}"


def _assumptions(recipe: Recipe, search: Search, chosen: Candidate) -> tuple[str, ...]:
    """What the estimates of time stand on."""
    where, found = search.where, []
    gpu = GPUS.get(where.device.name)
    if search.measured:
        found.append(f"a rank computes {search.measured / 1e12:.3g} TFLOP/s, as the run that was named did")
    if gpu and not search.measured:
        found.append(
            f"{where.device.name}: matmuls reach {speed.achievable(gpu, recipe) / 1e12:.0f} TFLOP/s in "
            f"{PRECISIONS[recipe.training.mixed_precision]}, training {speed.TRAINED:.0%} of that"
        )
    if gpu and where.topology.world_size > 1:
        found.append(f"links: {gpu.link:g} GB/s a GPU inside a node, 80% of it reached, 70% hidden behind compute")
    if where.topology.nnodes > 1:
        known = "" if where.bandwidth else ", a guess: network.bandwidth of a profile says it"
        found.append(f"network: {where.bandwidth or USUAL_BANDWIDTH:g} GB/s a node{known}")
    if chosen.setting.offload != "none":
        found.append(f"offload: {speed.PCIE:g} GB/s to the host a rank, {speed.HOST_MEMORY:g} GB/s of its memory")
        if where.host_memory is None and where.device.type == "cuda":
            found.append(f"host: a node has {gib(chosen.memory.host_per_node)} for what is offloaded")
    if recipe.model.attn_implementation == "auto":
        found.append("attention: SDPA; FlashAttention-2, where the ranks find it, needs less")
    return tuple(found)


def script_plan(settings: ScriptSettings, where: Where) -> Plan:
    """The plan for a script of one's own: strategy and topology alone.

    Raises:
        PlanError: a combination that cannot train.
    """
    parallelism, topology, device = settings.parallelism, where.topology, where.device
    strategy, reasons = parallelism.strategy, []
    if strategy == "auto":
        strategy = "ddp"
        reasons.append("ddp: nothing is known of a script's model; --set parallelism.strategy=... shards it")
    shards, offload = shard_size(parallelism, strategy, topology), fixed_offload(parallelism)
    case = rules.Case(strategy, offload, shards, topology, device, script=settings, bandwidth=where.bandwidth)
    rules.apply(case)
    return Plan(
        topology,
        device,
        strategy,
        offload,
        shards,
        settings.training.mixed_precision,
        reasons=tuple(reasons),
        warnings=(*_warnings(topology, device), *rules.warnings(case)),
    )


def _warnings(topology: Topology, device: Device) -> list[str]:
    if device.type == "cpu" and topology.nproc_per_node > (device.cores or topology.nproc_per_node):
        return [f"{topology.nproc_per_node} processes on {device.cores} cores: they will take turns"]
    return []


def plan_json(plan: Plan, name: str) -> dict[str, Any]:
    """plan.json, schema 1. `name` stands for the model where it is not known. Bytes per rank; null: not estimated."""
    model, batch, mem, time = plan.model, plan.batch, plan.memory, plan.speed
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
            "buffers": mem.buffers if mem else None,
            "peak": mem.peak if mem else None,
            "overhead": mem.overhead if mem else None,
            "process": mem.process if mem else None,
            "capacity": plan.device.memory,
            "fits": plan.fits if mem else None,
            "host_per_node": mem.host_per_node if mem else None,
            "simulated": plan.simulated,
        },
        "communication": {
            "bytes_per_step": time.communication.bytes_per_step if time else None,
            "seconds": time.communication.seconds if time else None,
        },
        "time": {
            "step_seconds": time.step_seconds if time else None,
            "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu if time else None,
            "assumed_mfu": time.assumed_mfu if time else None,
            "flops_per_token": time.flops_per_token if time else None,
        },
        "candidates": [
            {
                "strategy": candidate.setting.strategy,
                "offload": candidate.setting.offload,
                "gradient_checkpointing": candidate.setting.gradient_checkpointing,
                "micro_batch_size": candidate.batch.micro_batch_size,
                "peak": candidate.memory.peak,
                "process": candidate.memory.process,
                "host_per_node": candidate.memory.host_per_node,
                "fits": candidate.fits,
                "step_seconds": candidate.speed.step_seconds,
                "rejected": candidate.rejected,
            }
            for candidate in plan.candidates
        ],
        "reasons": list(plan.reasons),
        "warnings": list(plan.warnings),
        "assumptions": list(plan.assumptions),
    }
