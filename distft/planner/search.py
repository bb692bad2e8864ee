"""The search: every possible strategy and offload, each with its best micro-batch size and checkpointing, and the
choice among those that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from distft import rules
from distft.config import batch as batches
from distft.config.batch import Batch
from distft.config.recipe import Parallelism, Recipe
from distft.hardware.devices import Device, data_sheet
from distft.hardware.topology import Topology
from distft.models.attention import planned_attention
from distft.models.shapes import ModelShape
from distft.planner import speed
from distft.planner.communication import Links
from distft.planner.memory import Estimates, Estimator, Memory
from distft.planner.setting import Setting
from distft.planner.speed import Speed
from distft.strategies.kinds import KINDS
from distft.units import gib

# Simpler ones first: of candidates that are about equally fast, the first is taken. DDP and ZeRO-2 are the best
# defaults for LoRA (Singh et al., arXiv 2406.02290); offload is the last resort.
CANDIDATES = (
    ("ddp", "none"),
    ("zero2", "none"),
    ("zero1", "none"),
    ("fsdp", "none"),
    ("zero3", "none"),
    ("hsdp", "none"),
    ("zero2", "optimizer"),
    ("zero3", "optimizer"),
    ("zero3", "all"),
    ("fsdp", "all"),
)
ABOUT = 1.03  # estimates of time that differ by less count as equal
NARROW = 1.1  # a candidate that fits narrowly is taken only if it is a tenth faster
# GB/s of a node to other nodes, where neither the profile nor the GPU's data sheet says: 200 Gb/s.
USUAL_BANDWIDTH = 25.0


Estimate = Callable[[Recipe, ModelShape], Estimates]


@dataclass(frozen=True)
class Where:
    """What a plan is for: the ranks, their device, and what is known about the site."""

    topology: Topology
    device: Device
    bandwidth: float | None = None  # between nodes, GB/s of one node
    host_memory: int | None = None  # bytes of one node
    price: float | None = None  # per GPU and hour

    @property
    def links(self) -> Links | None:
        gpu = data_sheet(self.device.name)
        return Links(gpu.link, self.between_nodes) if gpu else None

    @property
    def between_nodes(self) -> float:
        """GB/s of one node to the others: the profile's, else what nodes with this GPU usually have."""
        gpu = data_sheet(self.device.name)
        usual = gpu.network * self.topology.nproc_per_node if gpu and gpu.network else USUAL_BANDWIDTH
        return self.bandwidth or usual


@dataclass(frozen=True)
class Candidate:
    """One way to run the recipe."""

    setting: Setting
    batch: Batch
    memory: Memory
    speed: Speed
    capacity: int  # bytes of a GPU
    host_memory: int | None = None
    broken: tuple[str, ...] = ()  # the rules that it breaks, one sentence each

    @property
    def name(self) -> str:
        return (
            self.setting.strategy + {"none": "", "optimizer": "+offload", "all": "+offload-all"}[self.setting.offload]
        )

    @property
    def rejected(self) -> str | None:
        return "; ".join(self.broken) or None

    @property
    def excess(self) -> int:
        """Bytes that a rank needs beyond what its device has; 0 where it fits."""
        return max(0, self.memory.process - self.capacity)

    @property
    def host_excess(self) -> int:
        """The same for a node's host memory, where that is known."""
        return max(0, self.memory.host_per_node - self.host_memory) if self.host_memory else 0

    @property
    def missing(self) -> str | None:
        """By how much it does not fit, in words; None where it fits."""
        parts = [f"{gib(self.excess)} too much"] if self.excess else []
        parts += [f"{gib(self.host_excess)} too much in host memory"] if self.host_excess else []
        return ", ".join(parts) or None

    @property
    def fits(self) -> bool:
        return not self.excess and not self.host_excess

    @property
    def roomy(self) -> bool:
        """Whether it fits even where it needs more than planned, by the estimate's error."""
        return self.fits and self.memory.process * (1 + self.memory.error) <= self.capacity

    @property
    def seconds(self) -> float:
        """Seconds per step, for comparing; 0 where no time can be estimated."""
        return self.speed.step_seconds or 0.0


@dataclass(frozen=True)
class Search:
    """Everything that candidates are made from."""

    recipe: Recipe
    model: ModelShape
    where: Where
    estimator: Estimates
    measured: float | None = None  # FLOP/s of a rank in an earlier run
    estimate: Estimate = Estimator

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        model: ModelShape,
        where: Where,
        measured: float | None = None,
        estimate: Estimate = Estimator,
    ) -> Search:
        return cls(recipe, model, where, estimate(recipe, model), measured, estimate)

    def changed(self, recipe: Recipe) -> Search:
        """The same search for another recipe with this model."""
        return Search.of(recipe, self.model, self.where, self.measured, self.estimate)

    def on(self, topology: Topology) -> Search:
        """The same search on more or fewer ranks."""
        return replace(self, where=replace(self.where, topology=topology))

    @property
    def guesses(self) -> bool:
        """Whether the memory rests on another family's activations."""
        return not self.estimator.is_counted and not self.model.is_known

    @cached_property
    def flops_per_token(self) -> float:
        return speed.flops_per_token(self.recipe, self.model, self.estimator.sizes)

    def options(self) -> Iterator[tuple[str, str]]:
        """Strategies and offloads to try: those that the recipe leaves open, and that differ from each other here."""
        wanted = self.recipe.parallelism
        offload, any_offload = fixed_offload(wanted), wanted.strategy == wanted.offload == "auto"
        topology, world = self.where.topology, self.where.topology.world_size
        for strategy, moved in CANDIDATES:
            if moved != offload and not any_offload:
                continue
            if any_offload and moved != "none" and self.spares_little(strategy, moved):
                continue
            kind = KINDS[strategy]
            if world < kind.min_ranks or (world == 1 and not kind.replicates and moved == "none"):
                continue  # nothing to shard
            if kind.in_groups and 1 in (topology.nnodes, topology.nproc_per_node):
                continue  # one node, or one rank a node: fsdp
            yield strategy, moved

    def spares_little(self, strategy: str, offload: str) -> bool:
        """Whether rules advise against this offload: an adapter's states are small, and nf4 under ZeRO-3 was measured
        to take more memory with offload than without."""
        recipe = self.recipe
        return bool(recipe.lora) and (
            offload == "optimizer" or (KINDS[strategy].zero_stage == 3 and recipe.model.quantization == "nf4")
        )

    def best(self, strategy: str, offload: str) -> Candidate:
        """A strategy with the checkpointing and micro-batch size that make it fast, or small where nothing fits.

        Raises:
            PlanError: the batch cannot be divided among the ranks.
        """
        asked = self.recipe.training.gradient_checkpointing
        always = self.recipe.training.activation_offloading  # of what checkpointing keeps
        ways = ((True,) if always else (False, True)) if asked == "auto" else (asked,)
        allowed = [w for w in ways if not rules.broken(self.case(strategy, offload, gradient_checkpointing=w))]
        resharding = self.resharding(strategy, offload)
        variants = [self.variant(strategy, offload, way, keep) for way in allowed or ways for keep in resharding]
        fitting = [c for c in variants if c.fits]
        best = min(fitting, key=cost) if fitting else min(variants, key=lambda c: c.memory.process)
        return replace(best, broken=tuple(rules.sentences(rules.broken(self.case_of(best)))))

    def resharding(self, strategy: str, offload: str) -> tuple[bool, ...]:
        """Whether FSDP2 reshards after the forward pass: the values to try."""
        if KINDS[strategy].engine != "fsdp2":
            return (True,)
        fixed = self.recipe.fsdp.overrides.get("fsdp_reshard_after_forward")
        if fixed is not None:
            return (str(fixed).lower() != "false",)  # accelerate reads the word, too; FSDP1 has others
        return (True, False) if offload == "none" else (True,)

    def variant(self, strategy: str, offload: str, checkpointing: bool, reshard: bool = True) -> Candidate:
        """The candidate with the recipe's micro-batch size, or the largest that fits."""
        total, world = self.recipe.training.global_batch_size, self.where.topology.world_size
        micro = self.recipe.training.micro_batch_size
        if micro != "auto":
            return self.candidate(strategy, offload, checkpointing, batches.fixed(total, micro, world), reshard=reshard)
        options = batches.divisors(batches.per_rank(total, world))
        low, high = 0, len(options) - 1  # memory grows with the micro-batch
        while low < high:
            middle = (low + high + 1) // 2
            batch = batches.fixed(total, options[middle], world)
            found = self.candidate(strategy, offload, checkpointing, batch, reshard=reshard)
            low, high = (middle, high) if found.roomy else (low, middle - 1)
        batch = batches.fixed(total, options[low], world)
        return self.candidate(strategy, offload, checkpointing, batch, reshard=reshard)

    def candidate(
        self,
        strategy: str,
        offload: str,
        checkpointing: bool,
        batch: Batch,
        max_length: int | None = None,
        reshard: bool = True,
    ) -> Candidate:
        """Memory and speed of one combination; `max_length` instead of the recipe's."""
        topology = self.where.topology
        setting = Setting(
            strategy=strategy,
            offload=offload,
            shard_size=shard_size(self.recipe.parallelism, strategy, topology),
            world_size=topology.world_size,
            nproc_per_node=topology.nproc_per_node,
            micro_batch_size=batch.micro_batch_size,
            gradient_checkpointing=checkpointing,
            attn_implementation=planned_attention(self.recipe.model.attn_implementation, self.model.model_type),
            device_type=self.where.device.type,
            reshard_after_forward=reshard,
        )
        found = self.estimator.memory(setting, max_length)
        time = speed.estimate(
            self.recipe,
            self.model,
            self.estimator.sizes,
            setting,
            batch.gradient_accumulation_steps,
            self.where.device,
            self.where.links,
            self.flops_per_token,
            self.measured,
        )
        return Candidate(setting, batch, found, time, self.where.device.memory, self.where.host_memory)

    def case_of(self, candidate: Candidate) -> rules.RecipeCase:
        """All that is known about a candidate, for the rules."""
        setting, batch = candidate.setting, candidate.batch
        return self.case(
            setting.strategy,
            setting.offload,
            gradient_checkpointing=setting.gradient_checkpointing,
            micro_batch_size=batch.micro_batch_size,
            accumulation=batch.gradient_accumulation_steps,
        )

    def case(self, strategy: str, offload: str, **known: Any) -> rules.RecipeCase:
        where = self.where
        return rules.RecipeCase(
            strategy=strategy,
            offload=offload,
            shard_size=shard_size(self.recipe.parallelism, strategy, where.topology),
            topology=where.topology,
            device=where.device,
            settings=self.recipe,
            model=self.model,
            bandwidth=where.bandwidth,
            **known,
        )


def fixed_offload(parallelism: Parallelism) -> str:
    """The offload under a strategy that is named; `auto` means none there."""
    return "none" if parallelism.offload == "auto" else parallelism.offload


def shard_size(parallelism: Parallelism, strategy: str, topology: Topology) -> int:
    """Ranks that share one copy of what the strategy shards; 1 where it shards nothing."""
    kind = KINDS[strategy]
    if kind.in_groups:
        size = parallelism.hsdp_shard_size
        return topology.nproc_per_node if size == "auto" else size
    return 1 if kind.replicates else topology.world_size


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """The fastest candidate that fits, or the simplest of those about as fast. Where none fits, the closest one; None
    where rules forbid all."""
    allowed = [candidate for candidate in candidates if not candidate.rejected]
    fitting = [candidate for candidate in allowed if candidate.fits]
    if not fitting:
        return min(allowed, key=lambda c: c.excess + c.host_excess, default=None)
    here = [candidate for candidate in fitting if candidate.setting.offload == "none"] or fitting
    fastest = min(map(cost, here))
    return next(candidate for candidate in here if cost(candidate) <= ABOUT * fastest)


def cost(candidate: Candidate) -> float:
    """Seconds per step, plus a penalty where it fits narrowly; for comparing candidates that fit."""
    if not candidate.seconds:  # no time can be estimated
        return 0.0 if candidate.roomy else 1.0
    return candidate.seconds * (1.0 if candidate.roomy else NARROW)
