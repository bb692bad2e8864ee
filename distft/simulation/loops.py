"""Blocks that loop in Python over the tokens of a row, as recurrences without their kernels do: a trace of one at full
length takes minutes (Jamba: 200,000 operators a block for 2,048 tokens).

What such a block keeps and needs grows linearly with the length, whatever the rest of the model does. So it is traced
at two short lengths, and a line is drawn; everything else is traced at full length, with those blocks left out.
tests/unit/test_loops.py compares the result with a trace of all at full length: within a hidden state or two.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

from distft.simulation.trace import LongLoopError, Segment, Trace

# Lengths: over a loop that takes a token at a time, and over one that takes a chunk of 64 or more, of which a few
# dozen operators are short of what needs most in a longer row.
SHORT = (32, 64), (256, 512)
MOST_OPERATORS = 5_000  # of a block's forward pass, a second; without a long loop it runs some hundred


class Traced(Protocol):
    """A trace of a model at a length, with options of trace.trace."""

    def __call__(self, length: int, **options: Any) -> Trace: ...


def of_length(traced: Traced, length: int, has_loops: bool = False) -> Trace:
    """A trace at a length, of which the blocks with long loops are drawn from shorter ones.

    Args:
        has_loops: such blocks were found before.
    """
    with contextlib.suppress(LongLoopError):
        if not has_loops:
            return traced(length, most_operators=MOST_OPERATORS)
    for short in SHORT:
        if length <= short[1]:
            break
        low, high = (traced(tokens) for tokens in short)
        more = {n: high.operators[segment] - low.operators[segment] for n, segment in enumerate(_forward(low))}
        if max(more.values()) < short[1] - short[0] and short is not SHORT[-1]:
            continue
        missing = {n: low.outputs[n] for n in more if more[n]}
        if None in missing.values():
            break
        ratio = (length - short[0]) / (short[1] - short[0])
        return _put_together(traced(length, left_out=missing), low, high, missing, ratio)
    return traced(length)


def _forward(steps: Trace) -> list[Segment]:
    """The blocks in the order in which they run."""
    return [(moment, block) for moment, block in steps.starts if moment == "forward" and block is not None]


def _put_together(rest: Trace, low: Trace, high: Trace, missing: Collection[int], ratio: float) -> Trace:
    """`rest` with the blocks that it lacks.

    Args:
        missing: their positions.
        ratio: where the line is read: 0 is at `low`, 1 at `high`.
    """

    def line(first: Counter[str], second: Counter[str], segment: Segment) -> Counter[str]:
        """From what is live in `low` and `high`: how much more than at the start of the segment."""
        low_more, high_more = _sum((1, first), (-1, low.starts[segment])), _sum((1, second), (-1, high.starts[segment]))
        return _sum((1 - ratio, low_more), (ratio, high_more))

    blocks = {block for position, (_, block) in enumerate(_forward(low)) if position in missing}
    left: Counter[str] = Counter()  # by the missing blocks so far
    starts, peaks = dict(rest.starts), dict(rest.peaks)
    for segment, after in pairwise(rest.starts):
        peaks[segment] = _sum((1, rest.peaks[segment]), (1, left))
        if segment[1] in blocks:
            peaks[segment] = _sum((1, starts[segment]), (1, line(low.peaks[segment], high.peaks[segment], segment)))
            through = line(low.starts[after], high.starts[after], segment)
            left = _sum((1, left), (1, through), (-1, rest.starts[after]), (1, rest.starts[segment]))
        starts[after] = _sum((1, rest.starts[after]), (1, left))
    return replace(rest, starts=starts, peaks=peaks, has_loops=True)


def _sum(*parts: tuple[float, Counter[str]]) -> Counter[str]:
    return Counter({kind: round(sum(factor * of[kind] for factor, of in parts)) for _, of in parts for kind in of})
