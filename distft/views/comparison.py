"""The outcome of `distft verify`: a table and a verdict for people, and JSON for programs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from distft.runs.comparison import COLUMNS, Comparison, LeftOut, Outcome, on_ranks


def lines(comparison: Comparison, width: int) -> list[str]:
    """The table, what was left out and what cannot be equal, and the verdict last; `width` in characters."""
    rows = [("strategy", "ranks", "wrapped by", "loss 1", f"loss {comparison.steps}", "Δ loss", "Δ norm")]
    for outcome in comparison.outcomes:
        rows.append((outcome.strategy, str(outcome.ranks), outcome.wrapped, *_cells(comparison, outcome)))
    text = [
        f"Δ: the largest difference from {comparison.reference} at any step; gradient norms above 1 are compared "
        "relative to their size",
        f"learning rate: the schedule of a run of {comparison.steps} steps, the same in all runs",
        *left_out_lines(comparison.left_out),
        *(f"note: {note}" for note in comparison.notes),
    ]
    found = [*_table(rows, width), "", *(part for line in text for part in _fill(line, width))]
    for outcome in comparison.outcomes:
        if outcome.failure:
            first, *rest = outcome.failure.splitlines()
            found += [*_fill(f"failed: {outcome}: {first}", width), *rest]
    return [*found, *_fill(verdict(comparison), width)]


def left_out_lines(left_out: Iterable[LeftOut]) -> list[str]:
    return [f"left out: {on_ranks(', '.join(left.strategies), left.ranks)}: {left.reason}" for left in left_out]


def verdict(comparison: Comparison) -> str:
    """The last line: whether it is the same training, and where it differs most."""
    found, allowed = comparison.largest, comparison.tolerance
    if found is None:
        return "nothing was compared: every run but the reference failed"
    size = f"largest difference {_size(found.size)} ({found.column} at step {found.step}, {found.outcome})"
    if found.size > allowed:
        return f"{size} exceeds {allowed:.2g}: not the same training"
    if comparison.failed:
        return f"{size}, allowed {allowed:.2g}; {len(comparison.failed)} of {len(comparison.outcomes)} runs failed"
    return f"{size}, allowed {allowed:.2g}: the same training"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The same for programs, with the losses of all steps; null for what is not a number or was not measured."""
    largest = comparison.largest
    return {
        "same": comparison.same,
        "tolerance": comparison.tolerance,
        "steps": comparison.steps,
        "largest": largest
        and {
            "difference": _finite(largest.size),
            "column": largest.column,
            "step": largest.step,
            "strategy": largest.outcome.strategy,
            "ranks": largest.outcome.ranks,
        },
        "runs": [
            {
                "strategy": outcome.strategy,
                "ranks": outcome.ranks,
                "wrapped": outcome.wrapped,
                "reference": outcome is comparison.reference,
                "loss": [_finite(value) for value in outcome.column("loss")],
                "grad_norm": [_finite(value) for value in outcome.column("grad_norm")],
                "tokens": outcome.column("tokens"),
                **{f"{column}_difference": _json_difference(comparison, outcome, column) for column in COLUMNS},
                "seconds": outcome.seconds,
                "failure": outcome.failure,
            }
            for outcome in comparison.outcomes
        ],
        "left_out": [
            {"strategy": strategy, "ranks": left.ranks, "reason": left.reason}
            for left in comparison.left_out
            for strategy in left.strategies
        ],
        "notes": list(comparison.notes),
    }


def _cells(comparison: Comparison, outcome: Outcome) -> tuple[str, str, str, str]:
    """First and last loss, and the largest differences of loss and gradient norm."""
    if outcome.failure:
        return "failed", "", "", ""
    losses = outcome.column("loss")
    first, last = f"{losses[0]:.6f}", f"{losses[-1]:.6f}"
    if outcome is comparison.reference:
        return first, last, "-", "-"
    loss, norm = (comparison.difference(outcome, column) for column in COLUMNS)
    return first, last, _size(loss.size) if loss else "", _size(norm.size) if norm else ""


def _table(rows: Sequence[tuple[str, ...]], width: int) -> list[str]:
    """Aligned; where there is no room, what wrapped the model goes on a line of its own."""
    found = _aligned(rows, words=(0, 2))
    if max(map(len, found)) <= width:
        return found
    narrow = _aligned([(*row[:2], *row[3:]) for row in rows], words=(0,))
    return [part for line, row in zip(narrow, rows, strict=True) for part in (line, f"  {row[2]}") if part.strip()]


def _aligned(rows: Sequence[tuple[str, ...]], words: Sequence[int]) -> list[str]:
    """The columns `words` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if n in words else '>'}{widths[n]}}" for n, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def _fill(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _size(value: float) -> str:
    return f"{value:.1e}" if value and math.isfinite(value) else f"{value:g}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _json_difference(comparison: Comparison, outcome: Outcome, column: str) -> float | None:
    found = comparison.difference(outcome, column)
    return _finite(found.size) if found else None
