"""What the ranks send each other in an optimizer step: bytes by formula, and the time on the links.

In a ring over n ranks, each sends (n-1)/n of the data for an all-gather or a reduce-scatter, and twice that for an
all-reduce. Volumes by strategy: https://github.com/stas00/ml-engineering, training/model-parallelism; under LoRA only
trained parameters are reduced, while sharded parameters are gathered whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from distft.planner.setting import Setting
from distft.planner.sharding import Sizes

# Part of the data sheet's rate that a link reaches: 361 to 367 of 450 GB/s on a node of 8 H200 (ml-engineering,
# network/benchmarks).
LINK_EFFICIENCY = 0.8


@dataclass(frozen=True)
class Links:
    """GB/s in one direction: from one GPU to the others in its node, and from a whole node to the other nodes."""

    inside: float
    between: float


@dataclass(frozen=True)
class Communication:
    """Of one rank in one optimizer step; `seconds` is None where the links are unknown."""

    bytes_per_step: int
    seconds: float | None


def per_step(
    sizes: Sizes, setting: Setting, accumulation: int, links: Links | None, whole_gradients: bool = False
) -> Communication:
    """Volume and time of an optimizer step of `accumulation` micro-batches; with `whole_gradients`, FSDP2 reduces after
    the last one only."""
    world, inside = setting.world_size, setting.nproc_per_node
    nodes = max(1, world // inside)
    total, seconds = 0.0, 0.0
    for size, ranks, across in _collectives(sizes, setting, accumulation, 1 if whole_gradients else accumulation):
        sent = size * (ranks - 1) / ranks if ranks > 1 else 0.0
        total += sent
        if links:
            # A ring through all ranks of several nodes crosses each node's network once; a ring with one rank per node
            # (HSDP's replicas) shares that network with the rings of the node's other ranks.
            rate = links.inside
            if across and nodes > 1:
                rate = min(rate, links.between / (inside if ranks == nodes and inside > 1 else 1))
            seconds += sent / (rate * LINK_EFFICIENCY * 1e9)
    return Communication(int(total), seconds if links else None)


def _collectives(sizes: Sizes, setting: Setting, accumulation: int, reductions: int) -> list[tuple[float, int, bool]]:
    """(bytes x passes, ranks, whether it leaves the node) for each collective of a step. Gradients travel in float32
    (strategies/deepspeed.py, communication_data_type; train/trainer.py, reduce_dtype)."""
    world, shard, across = setting.world_size, setting.shard_size, setting.world_size > setting.nproc_per_node
    gradients, working = 4 * sizes.trained, sizes.low * sizes.trained
    kind, muon = setting.kind, sizes.muon.elements
    if kind.replicates:  # accelerate's no_sync: once a step. Muon: each rank sends its results to the others.
        return [(2 * gradients, world, across), (sizes.low * muon, world, across)]
    if not kind.shards_parameters:  # whole gradients are summed over micro-batches first, shards after each
        times = accumulation if kind.shards_gradients else 1
        return [(2 * gradients * times, world, across), (working, world, across)]
    # Parameters are gathered for the forward and, if it does not keep them, again for the backward pass.
    gathers = 2 if setting.reshard_after_forward else 1
    found: list[tuple[float, int, bool]] = [
        (gathers * sizes.gathered_bytes * accumulation, shard, shard > setting.nproc_per_node),
        (gradients * reductions, shard, shard > setting.nproc_per_node),
    ]
    if muon:  # rows of updates in float32 to the rank that iterates on them, and the results back
        found.append(((4 + sizes.low) * muon / shard, shard, shard > setting.nproc_per_node))
    if kind.in_groups:
        found.append((2 * gradients / shard * reductions, world // shard, across))
    return found
