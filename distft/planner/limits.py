"""What else would fit: fewer GPUs, longer rows, larger micro-batches, and changes that make a recipe fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from distft.config import batch as batches
from distft.config.batch import Batch
from distft.config.recipe import Lora, Recipe
from distft.errors import PlanError
from distft.hardware.topology import Topology
from distft.planner.search import Candidate, Search, choose, fixed_offload
from distft.strategies.kinds import KINDS
from distft.units import gib

LONGEST, LARGEST = 2**20, 2**12  # tokens per row and micro-batch size up to which limits are searched
NODES = 128


@dataclass(frozen=True)
class Limits:
    """How far a recipe can be taken. None: nothing that was tried fits."""

    fewest_gpus: Topology | None
    max_length: int | None  # tokens per row, with one row at a time
    micro_batch_size: int | None


def limits(search: Search, chosen: Candidate) -> Limits:
    """The limits of the chosen strategy, with gradient checkpointing where the recipe leaves that open; none are known
    where the memory is a guess."""
    if search.guesses:
        return Limits(None, None, None)
    setting, world = chosen.setting, search.where.topology.world_size
    asked = search.recipe.training.gradient_checkpointing
    checkpointing = True if asked == "auto" else asked

    def fits(micro: int, length: int | None = None) -> bool:
        batch = Batch(micro * world, micro, 1)
        return search.candidate(setting.strategy, setting.offload, checkpointing, batch, length).fits

    # Counted memory is for rows of the recipe's length.
    length = 0 if search.estimator.is_counted else _largest(lambda n: fits(1, 64 * n), LONGEST // 64)
    return Limits(fewest_gpus(search), 64 * length if length else None, _largest(fits, LARGEST) or None)


def _largest(fits: Callable[[int], bool], end: int) -> int:
    """The largest number up to `end` that fits; 0 for none. Larger numbers never need less memory."""
    low, high = 0, end
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def fewest_gpus(search: Search) -> Topology | None:
    """The smallest number of such GPUs, on nodes like these, on which the recipe fits without more offload than it asks
    for, among the numbers that divide the global batch."""
    topologies = _topologies(search.where.topology.nproc_per_node, search.recipe.training.global_batch_size)
    return next((topology for topology in topologies if _fits_on(search, topology)), None)


def _topologies(nproc_per_node: int, global_batch_size: int) -> Iterator[Topology]:
    ranks = [n for n in range(1, nproc_per_node) if n & (n - 1) == 0]
    nodes = [2**n for n in range(NODES.bit_length())]
    for topology in [Topology(1, n) for n in ranks] + [Topology(n, nproc_per_node) for n in nodes]:
        if global_batch_size % topology.world_size == 0:
            yield topology


def _fits_on(search: Search, topology: Topology, length: int | None = None) -> bool:
    smaller = search.on(topology)
    wanted, training = search.recipe.parallelism, search.recipe.training
    offload = fixed_offload(wanted)
    micro = 1 if training.micro_batch_size == "auto" else training.micro_batch_size
    checkpointing = training.gradient_checkpointing is not False
    try:
        batch = batches.fixed(training.global_batch_size, micro, topology.world_size)
    except PlanError:
        return False
    options = [(strategy, moved) for strategy, moved in smaller.options() if moved == offload]
    if wanted.strategy != "auto":
        strategy: str = wanted.strategy
        if KINDS[strategy].in_groups and 1 in (topology.nnodes, topology.nproc_per_node):
            strategy = "fsdp"
        if topology.world_size < KINDS[strategy].min_ranks:
            strategy = "ddp"
        options = [(strategy, offload)]
    return any(smaller.candidate(*option, checkpointing, batch, length).fits for option in options)


def would_fit(search: Search) -> list[str]:
    """For a recipe that does not fit: single changes to it with which it does, the most useful ones first. None where
    that would be a guess."""
    if search.guesses:
        return []
    recipe, found = search.recipe, []
    changes: list[tuple[str, Recipe]] = []
    if recipe.lora is None:
        training = recipe.training
        if training.mixed_precision == "bf16" and recipe.optim.startswith("adamw_torch") and not training.is_pure_bf16:
            changes.append(("training.master_weights: none", _with(recipe, "training", master_weights="none")))
        lora = recipe.model_copy(update={"lora": Lora()})
        changes.append(("lora: {}", lora))
        changes.append(("lora: {} with model.quantization: nf4", _with(lora, "model", quantization="nf4")))
    elif not recipe.model.quantization:
        changes.append(("model.quantization: nf4", _with(recipe, "model", quantization="nf4")))
    if recipe.training.gradient_checkpointing is False:
        changes.append(
            ("training.gradient_checkpointing: true", _with(recipe, "training", gradient_checkpointing=True))
        )
    if recipe.training.micro_batch_size not in ("auto", 1):
        changes.append(("training.micro_batch_size: auto", _with(recipe, "training", micro_batch_size="auto")))
    if recipe.parallelism.strategy != "auto":
        parallelism = type(recipe.parallelism)()
        changes.append(("parallelism.strategy: auto", recipe.model_copy(update={"parallelism": parallelism})))
    for name, changed in changes:
        other = search.changed(changed)
        try:
            chosen = _choice(other)
        except PlanError:
            continue
        if chosen and chosen.fits and not chosen.rejected:
            host = f", {gib(chosen.memory.host_per_node)} of host memory" if chosen.memory.much_of_host else ""
            found.append(f"{name} ({chosen.name}, {gib(chosen.memory.process)} per rank{host})")
    here = search.where.topology
    shorter = recipe.data.max_length // 64 if not search.estimator.is_counted else 0
    if shorter := _largest(lambda n: _fits_on(search, here, 64 * n), shorter):
        found.append(f"data.max_length: {64 * shorter}")
    if fewest := fewest_gpus(search):
        found.append(f"--nodes {fewest.nnodes} --gpus-per-node {fewest.nproc_per_node}")
    return found


def _with(recipe: Recipe, group: str, **values: object) -> Recipe:
    return recipe.model_copy(update={group: getattr(recipe, group).model_copy(update=values)})


def _choice(search: Search) -> Candidate | None:
    wanted = search.recipe.parallelism
    if wanted.strategy != "auto":
        return search.best(wanted.strategy, fixed_offload(wanted))
    return choose([search.best(*option) for option in search.options()])
