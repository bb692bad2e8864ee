"""global_batch_size = micro_batch_size x gradient_accumulation_steps x world_size, exactly."""

from __future__ import annotations

from dataclasses import dataclass

from distft.errors import PlanError


@dataclass(frozen=True)
class Batch:
    """Sequences per optimizer step (global) and per forward pass and rank (micro)."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int


def divisors(n: int) -> list[int]:
    """Divisors of n, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def per_rank(global_batch_size: int, world_size: int) -> int:
    """Sequences per rank and optimizer step.

    Raises:
        PlanError: the global batch does not divide among the ranks; the message lists the nearest global batches
            that do, and the world sizes that divide this one.
    """
    if global_batch_size % world_size == 0:
        return global_batch_size // world_size
    below, above = global_batch_size // world_size * world_size, -(-global_batch_size // world_size) * world_size
    world_sizes = divisors(global_batch_size)
    near = sorted(sorted(world_sizes, key=lambda w: abs(w - world_size))[:3])
    raise PlanError(
        f"training.global_batch_size: got {global_batch_size}, which {world_size} ranks cannot share evenly; "
        f"nearest that they can: {' or '.join(str(n) for n in (below, above) if n)}; "
        f"or run {global_batch_size} on {', '.join(map(str, near))} ranks"
    )


def fixed(global_batch_size: int, micro_batch_size: int, world_size: int) -> Batch:
    """The batch with the micro-batch size that the recipe names.

    Raises:
        PlanError: it does not divide a rank's share.
    """
    share = per_rank(global_batch_size, world_size)
    if share % micro_batch_size:
        near = sorted(sorted(divisors(share), key=lambda d: abs(d - micro_batch_size))[:3])
        raise PlanError(
            f"training.micro_batch_size: got {micro_batch_size}, which does not divide the {share} sequences of a "
            f"rank ({global_batch_size} over {world_size}); nearest that do: {', '.join(map(str, near))}"
        )
    return Batch(global_batch_size, micro_batch_size, share // micro_batch_size)
