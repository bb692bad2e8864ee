"""How many rows each source gives to a mix, and which."""

from __future__ import annotations

import random
from collections.abc import Sequence

from distft.config.recipe import Source


def is_mix(sources: Sequence[Source]) -> bool:
    """Whether a source gives more or fewer than all its rows."""
    return any((source.weight, source.rows, source.epochs) != (None, None, None) for source in sources)


def mixed_counts(counts: Sequence[int], sources: Sequence[Source]) -> list[int]:
    """The rows of each source in one pass over the mix.

    Args:
        counts: the rows that each source has.
    """
    if all(source.weight is not None for source in sources) and sources:
        most = min(count / (source.weight or 1) for count, source in zip(counts, sources, strict=True))
        return [int(most * (source.weight or 1) + 1e-6) for source in sources]
    return [
        source.rows or round(count * (source.epochs or 1)) if count else 0
        for count, source in zip(counts, sources, strict=True)
    ]


def taken(sources: Sequence[Source], counts: Sequence[int]) -> list[tuple[str, int, int]]:
    """Of each source its path, the rows that it has, and those that the mix takes."""
    return list(zip([source.path for source in sources], counts, mixed_counts(counts, sources), strict=True))


def drawn(count: int, wanted: int, seed: int) -> list[int]:
    """Indices of `wanted` of `count` rows, in order: each row as often as all can be, and a sample by the seed beyond.

    The same for the same numbers, on any machine.
    """
    times, rest = divmod(wanted, count) if count else (0, 0)
    extra = random.Random(seed).sample(range(count), rest)
    return sorted([*(n for n in range(count) for _ in range(times)), *extra])
