"""The plan: every number that is derived for a run, and the sentences that explain why. plan.json has all of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from distft import rules
from distft.config.batch import Batch
from distft.config.recipe import Recipe, ScriptSettings
from distft.errors import PlanError
from distft.hardware.devices import Device, data_sheet
from distft.hardware.topology import Topology
from distft.models.chunks import why_full
from distft.models.quantization import bits_in_memory
from distft.models.shapes import ModelShape, read_config, read_model_shape
from distft.models.start import check_start
from distft.planner import speed
from distft.planner.communication import LINK_EFFICIENCY
from distft.planner.memory import Estimator, Memory, offloaded_inputs
from distft.planner.search import (
    ABOUT,
    Candidate,
    Estimate,
    Search,
    Where,
    choose,
    fixed_offload,
    shard_size,
)
from distft.planner.speed import Speed
from distft.strategies.kinds import KINDS
from distft.units import gib, short

PRECISIONS = {"no": "float32"} | {name: name for name in ("bf16", "fp16")}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every run has: ranks, strategy, precision. `reasons` and `warnings` are sentences for people."""

    topology: Topology
    device: Device
    strategy: str  # a name in strategies/kinds.py
    offload: str  # none | optimizer | all
    shard_size: int  # ranks that share one copy of what the strategy shards; 1 where it shards nothing
    mixed_precision: str  # bf16 | fp16 | no
    reshard_after_forward: bool = True  # FSDP2's
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ScriptPlan(Plan):
    """The plan of your own script. Nothing is known about what it trains, so nothing is estimated."""


@dataclass(frozen=True, kw_only=True)
class RecipePlan(Plan):
    """The plan of a recipe: what was chosen, and what it was chosen from."""

    search: Search
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    assumptions: tuple[str, ...]  # what the estimates of time rest on: sentences for people
    simulated: bool  # memory was counted, not estimated
    data: tuple[str, ...] = ()  # which files are read, and in which format: sentences for people

    @property
    def guessed(self) -> bool:
        """Whether its memory rests on another family's activations."""
        return self.search.guesses

    @property
    def how(self) -> str:
        """How its memory is known, in words."""
        return "counted" if self.simulated else "a guess" if self.guessed else "estimated"

    @property
    def fits(self) -> bool | None:
        """None: not known."""
        return self.verdict(self.chosen)

    def verdict(self, candidate: Candidate) -> bool | None:
        """Whether a candidate fits; None: not known. A guess may only say that it does not fit, where the states alone
        are too much."""
        if self.guessed and candidate.memory.states <= self.device.memory:
            return None
        return candidate.fits

    @property
    def recipe(self) -> Recipe:
        return self.search.recipe

    @property
    def model(self) -> ModelShape:
        return self.search.model

    @property
    def batch(self) -> Batch:
        return self.chosen.batch

    @property
    def memory(self) -> Memory:
        return self.chosen.memory

    @property
    def speed(self) -> Speed:
        return self.chosen.speed

    @property
    def gradient_checkpointing(self) -> bool:
        return self.chosen.setting.gradient_checkpointing

    @property
    def attn_implementation(self) -> str:
        """As in the recipe, including `auto`: only the ranks see what is installed."""
        return self.recipe.model.attn_implementation

    @property
    def price(self) -> float | None:
        """Per GPU and hour."""
        return self.search.where.price


def make_plan(
    recipe: Recipe,
    where: Where,
    need_weights: bool = False,
    *,
    compare: bool = False,
    model: ModelShape | None = None,
    estimate: Estimate = Estimator,
    measured: float | None = None,
) -> RecipePlan:
    """Derive everything that the recipe leaves open.

    Args:
        need_weights: refuse a model that has only a config.json.
        compare: also look at other strategies where the recipe names one.
        model: the recipe's, if it has been read already.
        estimate: what counts the memory instead of the formula (simulation/simulate.py); takes seconds, needs torch.
        measured: FLOP/s of a rank in an earlier run (calibrate.py).

    Raises:
        PlanError: a combination that cannot train, a batch that cannot be divided, a model that cannot be read.
    """
    if model is None:
        refuse_other_kinds(recipe, where)
        model = read_model_shape(recipe, need_weights)
    recipe = as_stored(recipe, model)
    if recipe.lora and recipe.lora.start_from:
        check_start(Path(recipe.lora.start_from), recipe, model)
    search = Search.of(recipe, model, where, measured, estimate)
    reasons: list[str] = []
    warnings = _warnings(where.topology, where.device)
    counted = search.estimator.is_counted
    if search.guesses:
        warnings.append(
            f"what {model.model_type} models keep of a training step is not known here: their memory is a guess, and "
            "may be far too low"
        )
    strategy = _fixed_strategy(recipe, where.topology, reasons)
    if strategy:
        offload = fixed_offload(recipe.parallelism)
        rules.apply(search.case(strategy, offload))  # first: not every offload has a config that can be made
        chosen = search.best(strategy, offload)
        if chosen.broken:
            raise PlanError("\n".join(chosen.broken))
        others = [search.best(*option) for option in search.options() if option[0] != strategy] if compare else []
        candidates = [chosen, *others]
    else:
        candidates = [search.best(*option) for option in search.options()]
        best = choose(candidates)
        if best is None:
            raise PlanError("\n".join(candidates[0].broken))
        chosen = best
    if recipe.training.compile:
        reasons.append("training.compile: each block is compiled, in the first step, which takes longer for it")
        warnings.append(
            "training.compile: the memory is that of a step that is not compiled, which as a rule keeps more"
        )
    if counted:
        if recipe.training.use_liger_kernel:
            warnings.append("training.use_liger_kernel: the simulation runs transformers' own kernels, which keep more")
        chosen, candidates = _exactly(search, chosen, candidates, free=not strategy)
    if search.guesses:
        reasons.append(f"{chosen.name}, micro_batch_size {chosen.batch.micro_batch_size}: by a guess of the memory")
    else:
        reasons += [*(_reasons(chosen, candidates) if not strategy else ()), *_details(recipe, chosen, search)]
    warnings += rules.warnings(search.case_of(chosen))
    plan = RecipePlan(
        topology=where.topology,
        device=where.device,
        strategy=chosen.setting.strategy,
        offload=chosen.setting.offload,
        shard_size=chosen.setting.shard_size,
        mixed_precision=recipe.training.mixed_precision,
        reshard_after_forward=chosen.setting.reshard_after_forward,
        reasons=tuple(reasons),
        warnings=tuple(warnings),
        search=search,
        chosen=chosen,
        candidates=tuple(candidates),
        assumptions=_assumptions(recipe, search, chosen),
        simulated=counted,
    )
    return plan if plan.fits is not False else replace(plan, warnings=(*plan.warnings, misfit(chosen)))


def refuse_other_kinds(recipe: Recipe, where: Where) -> None:
    """Check what can be checked before the model's parameters are known, for which it may have the wrong ones.

    Raises:
        PlanError: it is no causal language model, or its own code would have to run.
    """
    config = read_config(recipe)
    only_config = ModelShape(recipe.model.name_or_path, 0, 0, 0, config=config)
    rules.apply(
        rules.RecipeCase(
            strategy="ddp",
            offload="none",
            shard_size=1,
            topology=where.topology,
            device=where.device,
            settings=recipe,
            model=only_config,
        ),
        of_config=True,
    )


def as_stored(recipe: Recipe, model: ModelShape) -> Recipe:
    """The recipe with the quantization that its model is stored in, so that its bytes are counted as they are."""
    bits = bits_in_memory(model.config)
    if bits is None or recipe.model.quantization:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": bits})})


def misfit(chosen: Candidate) -> str:
    """What will not fit, and by how much."""
    found = []
    if chosen.excess:
        need, has = gib(chosen.memory.process), gib(chosen.capacity)
        found.append(f"a rank needs about {need}, {gib(chosen.excess)} more than its {has}")
    if chosen.host_excess and chosen.host_memory:
        need, has = gib(chosen.memory.host_per_node), gib(chosen.host_memory)
        found.append(f"a node needs about {need} of host memory, {gib(chosen.host_excess)} more than its {has}")
    return f"will run out of memory: {'; '.join(found)}"


def _exactly(
    search: Search, chosen: Candidate, candidates: list[Candidate], free: bool
) -> tuple[Candidate, list[Candidate]]:
    """The choice with its memory counted, or the next fastest one where that does not fit after all."""
    order = [chosen]
    if free:
        order += [
            c for c in sorted(candidates, key=lambda c: c.seconds) if c is not chosen and c.fits and not c.rejected
        ]
    counted = {}
    for candidate in order:
        found = replace(candidate, memory=search.estimator.exactly(candidate.setting))
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
            raise PlanError(
                f"parallelism.offload: {wanted} does not shard on one rank; use zero3, or parallelism.offload: none"
            )
        reasons.append(f"ddp: {wanted} on one rank has nothing to shard")
        return "ddp"
    if wanted != "auto":
        reasons.append(f"{wanted}: as asked")
        return wanted
    return None


def _reasons(chosen: Candidate, candidates: list[Candidate]) -> list[str]:
    """Why this candidate, and why not those that come before it or are faster."""
    fitting = [c for c in candidates if c.fits and not c.rejected]
    fitting = [c for c in fitting if c.setting.offload == "none"] or fitting
    found, before = [], True
    if not chosen.fits:
        found.append(f"{chosen.name}: no option fits; this one is closest")
    elif len(fitting) == 1:
        found.append(f"{chosen.name}: the only option that fits{_without(chosen)}")
    elif chosen.speed.step_seconds is None:
        found.append(f"{chosen.name}: fits, and shards and offloads less than the others that fit")
    else:
        options = f"{len(fitting)} options that fit{_without(chosen)}"
        found.append(f"{chosen.name}: the fastest of {options}, or the simplest within {ABOUT - 1:.0%} of it")
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
            found.append(f"not {candidate.name}: {short(candidate.seconds)} s per step, not {short(chosen.seconds)}")
    return found


def _without(chosen: Candidate) -> str:
    return " without offload" if chosen.setting.offload == "none" else ""


def _details(recipe: Recipe, chosen: Candidate, search: Search) -> list[str]:
    """Why this checkpointing and this micro-batch size."""
    found, setting, batch = [], chosen.setting, chosen.batch
    if recipe.training.is_pure_bf16:
        training = recipe.training.model_copy(update={"master_weights": "float32"})
        masters = Estimator(recipe.model_copy(update={"training": training}), search.model).memory(setting)
        found.append(
            f"master_weights none: weights, gradients and states take {gib(chosen.memory.states)} of a rank, not "
            f"{gib(masters.states)}"
        )
    if recipe.training.activation_offloading:
        moved = prod(offloaded_inputs(recipe, search.estimator.sizes, setting))
        found.append(f"activation_offloading: {gib(moved)} of block inputs per rank wait in host memory, as asked")
    elif recipe.training.gradient_checkpointing == "auto" and setting.gradient_checkpointing:
        without = search.variant(setting.strategy, setting.offload, False)
        if without.fits and without.seconds > chosen.seconds:
            found.append(
                f"gradient_checkpointing on: micro-batch {batch.micro_batch_size} fits instead of "
                f"{without.batch.micro_batch_size}, which is faster here"
            )
        elif without.fits:
            found.append(f"gradient_checkpointing on: without it {_part(without)} of the memory would be used")
        elif without.excess:
            found.append(f"gradient_checkpointing on: without it one sequence needs {gib(without.excess)} too much")
    if not setting.reshard_after_forward and "fsdp_reshard_after_forward" not in recipe.fsdp.overrides:
        resharding = search.variant(setting.strategy, setting.offload, setting.gradient_checkpointing)
        found.append(
            "fsdp_reshard_after_forward off: parameters stay gathered from the forward to the backward pass: "
            f"{short(chosen.seconds)} s per step, not {short(resharding.seconds)}"
        )
    if recipe.training.micro_batch_size == "auto" and chosen.fits:
        share = batch.micro_batch_size * batch.gradient_accumulation_steps
        spare = f" with {chosen.memory.error:.0%} to spare" if chosen.roomy else ""
        found.append(
            f"micro_batch_size {batch.micro_batch_size}: the largest divisor of a rank's {share} sequences that fits"
            f"{spare} (about {gib(chosen.memory.process)} of {gib(chosen.capacity)})"
        )
    return found


def _part(candidate: Candidate) -> str:
    return f"{candidate.memory.process / candidate.capacity:.0%}"


def _assumptions(recipe: Recipe, search: Search, chosen: Candidate) -> tuple[str, ...]:
    """What the estimates of time are based on."""
    where, found = search.where, []
    gpu = data_sheet(where.device.name)
    if search.measured:
        found.append(f"a rank computes {search.measured / 1e12:.3g} TFLOP/s, as in the run given to --calibrate")
    if gpu and not search.measured:
        part = speed.reached(gpu, recipe, chosen.setting)
        found.append(
            f"{where.device.name}: matmuls reach {speed.achievable(gpu, recipe) / 1e12:.0f} TFLOP/s in "
            f"{PRECISIONS[recipe.training.mixed_precision]}, training {part:.0%} of that"
        )
    if gpu and where.topology.world_size > 1:
        reached, hidden = f"{LINK_EFFICIENCY:.0%} of it reached", f"{speed.OVERLAP:.0%} hidden behind compute"
        found.append(f"links: {gpu.link:g} GB/s per GPU within a node, {reached}, {hidden}")
    if where.topology.nnodes > 1:
        known = "" if where.bandwidth else ", a guess: set network.bandwidth in the profile"
        found.append(f"network: {where.between_nodes:g} GB/s per node{known}")
    offloads = chosen.setting.offload != "none"
    if offloads:
        steps = ", where torch's fused AdamW steps" if recipe.optim == "adamw_torch_fused" else ""
        found.append(
            f"offload: per rank {speed.PCIE:g} GB/s to the host and {speed.HOST_MEMORY:g} GB/s in its memory{steps}"
        )
    if where.host_memory is None and where.device.type == "cuda" and (offloads or chosen.memory.much_of_host):
        what = "what is offloaded, " if offloads or recipe.training.activation_offloading else ""
        found.append(f"host: a node has {gib(chosen.memory.host_per_node)} of memory for {what}checkpoints and final/")
    if recipe.model.attn_implementation == "auto":
        plain = "SDPA" if chosen.setting.attn_implementation == "sdpa" else "eager, as the model has no SDPA"
        found.append(f"attention: {plain}; with FlashAttention or varlen, where the ranks have it, they need less")
    if full := why_full(recipe, search.model, chosen.setting.kind.zero_stage):
        found.append(f"loss: from the logits of all tokens at once ({full})")
    return tuple(found)


def script_plan(settings: ScriptSettings, where: Where) -> ScriptPlan:
    """The plan for your own script: strategy and topology only.

    Raises:
        PlanError: a combination that cannot train.
    """
    parallelism, topology, device = settings.parallelism, where.topology, where.device
    strategy, reasons = parallelism.strategy, []
    if strategy == "auto":
        strategy = "ddp"
        reasons.append("ddp: a script's model is unknown; to shard it: --set parallelism.strategy=...")
    shards, offload = shard_size(parallelism, strategy, topology), fixed_offload(parallelism)
    case = rules.ScriptCase(
        strategy=strategy,
        offload=offload,
        shard_size=shards,
        topology=topology,
        device=device,
        settings=settings,
        bandwidth=where.bandwidth,
    )
    rules.apply(case)
    return ScriptPlan(
        topology=topology,
        device=device,
        strategy=strategy,
        offload=offload,
        shard_size=shards,
        mixed_precision=settings.training.mixed_precision,
        reasons=tuple(reasons),
        warnings=(*_warnings(topology, device), *rules.warnings(case)),
    )


def _warnings(topology: Topology, device: Device) -> list[str]:
    if device.type == "cpu" and topology.nproc_per_node > (device.cores or topology.nproc_per_node):
        return [f"{topology.nproc_per_node} processes share {device.cores} cores"]
    return []


MEMORY = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "peak", "overhead", "process")


def plan_json(plan: Plan, name: str) -> dict[str, Any]:
    """plan.json, schema 1. `name` stands for the model where that is unknown. Bytes per rank; null: not estimated."""
    known = plan if isinstance(plan, RecipePlan) else None
    speed = known and known.speed
    return {
        "schema": 1,
        "model": {
            "name": known.model.name if known else name,
            **_values(known and known.model, "parameters", "trainable_parameters"),
        },
        "topology": {
            **_values(plan.topology, "nnodes", "nproc_per_node", "world_size"),
            "gpu": plan.device.name if plan.device.type == "cuda" else None,
        },
        "strategy": plan.strategy,
        "offload": plan.offload,
        "shard_size": plan.shard_size,
        "mixed_precision": plan.mixed_precision,
        "reshard_after_forward": plan.reshard_after_forward if KINDS[plan.strategy].engine == "fsdp2" else None,
        "gradient_checkpointing": known.gradient_checkpointing if known else False,
        "attn_implementation": known.attn_implementation if known else "auto",
        "batch": _values(known and known.batch, "global_batch_size", "micro_batch_size", "gradient_accumulation_steps"),
        "memory": {
            **_values(known and known.memory, *MEMORY),
            "capacity": plan.device.memory,
            "fits": known.fits if known else None,
            **_values(known and known.memory, "error", "host_per_node"),
            "simulated": known.simulated if known else False,
        },
        "communication": _values(speed and speed.communication, "bytes_per_step", "seconds"),
        "time": _values(speed, "step_seconds", "tokens_per_second_per_gpu", "assumed_mfu", "flops_per_token"),
        "candidates": [_candidate_json(c, known.verdict(c)) for c in known.candidates] if known else [],
        "reasons": list(plan.reasons),
        "warnings": list(plan.warnings),
        "assumptions": list(known.assumptions) if known else [],
        "data": list(known.data) if known else [],
    }


def _candidate_json(candidate: Candidate, fits: bool | None) -> dict[str, Any]:
    return {
        **_values(candidate.setting, "strategy", "offload", "gradient_checkpointing", "micro_batch_size"),
        **_values(candidate.memory, "peak", "process", "host_per_node"),
        "fits": fits,
        "step_seconds": candidate.speed.step_seconds,
        "rejected": candidate.rejected,
    }


def _values(source: object | None, *names: str) -> dict[str, Any]:
    """Attributes by name; all null where there is no source."""
    return {name: None if source is None else getattr(source, name) for name in names}
