"""Several runs of one recipe, compared step by step with the first of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

COLUMNS = ("loss", "grad_norm")


@dataclass(frozen=True)
class Outcome:
    """A run that has ended.

    `strategy` names its offload too; `metrics` are the lines of its metrics.jsonl; `wrapped` is the class that wrapped
    the model; `seconds` include the start-up; `failure` is why it failed.
    """

    strategy: str
    ranks: int
    metrics: tuple[dict[str, Any], ...]
    wrapped: str
    seconds: float
    failure: str | None = None

    def __str__(self) -> str:
        return on_ranks(self.strategy, self.ranks)

    def column(self, name: str) -> list[float | None]:
        return [line[name] for line in self.metrics]


@dataclass(frozen=True)
class Difference:
    """The largest difference of a run from the reference, and at which step of which column. Infinite for a NaN."""

    size: float
    column: str
    step: int
    outcome: Outcome


@dataclass(frozen=True)
class LeftOut:
    """Strategies that cannot run on so many ranks, and why."""

    strategies: tuple[str, ...]
    ranks: int
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Runs of `steps` steps, the reference first.

    `tolerance` is the largest difference that counts as equal; `notes` say what cannot be equal.
    """

    outcomes: tuple[Outcome, ...]
    steps: int
    tolerance: float
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def reference(self) -> Outcome:
        return self.outcomes[0]

    def difference(self, outcome: Outcome, column: str) -> Difference | None:
        """None where there is nothing to compare: the run failed, or its gradient norms were not measured."""
        if outcome.failure:
            return None
        found = [
            Difference(_distance(column, here[column], there[column]), column, here["step"], outcome)
            for here, there in zip(outcome.metrics, self.reference.metrics, strict=True)
            if None not in (here[column], there[column])
        ]
        return max(found, key=lambda difference: difference.size, default=None)

    @cached_property
    def largest(self) -> Difference | None:
        """The largest difference of all runs; None where all but the reference failed."""
        found = [self.difference(outcome, column) for outcome in self.outcomes[1:] for column in COLUMNS]
        return max(filter(None, found), key=lambda difference: difference.size, default=None)

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.failure]

    @property
    def same(self) -> bool:
        return not self.failed and self.largest is not None and self.largest.size <= self.tolerance


def on_ranks(strategy: str, ranks: int) -> str:
    """`zero3 on 2 ranks`"""
    return f"{strategy} on {ranks} rank{'s' * (ranks > 1)}"


def _distance(column: str, here: float, there: float) -> float:
    """The absolute difference; for gradient norms above 1, relative to their size. Infinite where one is not finite."""
    scale = max(1.0, abs(there)) if column == "grad_norm" else 1.0
    distance = abs(here - there) / scale
    return distance if math.isfinite(distance) else math.inf
