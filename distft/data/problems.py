"""Rows that cannot be trained as they are meant, counted by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

SHOWN = 3  # rows of each kind


Summary = Mapping[str, tuple[int, str, str]]  # kind → how many rows, the place of the first, and what is said of it


class RowProblem(Exception):
    """What is wrong with one row: a stable slug, and a text that names the field and the fix."""

    def __init__(self, kind: str, text: str):
        super().__init__(kind, text)  # both, so that it can be pickled
        self.kind = kind
        self.text = text

    def __str__(self) -> str:
        return self.text


class Untrained(RowProblem):
    """A row that says itself that it is not to be trained. It is left out and counted, and refuses nothing."""


@dataclass
class Problems:
    """How many rows have a problem of each kind, and the first of each with their place."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # place, what is wrong there

    def add(self, kind: str, place: str, text: str) -> None:
        self.counts[kind] += 1
        shown = self.first.setdefault(kind, [])
        if len(shown) < SHOWN:
            shown.append((place, text))

    def merge(self, later: Problems) -> None:
        """Add those of rows that come after these."""
        self.counts += later.counts
        for kind, shown in later.first.items():
            self.first[kind] = [*self.first.get(kind, ()), *shown][:SHOWN]

    def summary(self) -> Summary:
        return {kind: (count, *self.first[kind][0]) for kind, count in self.counts.items()}

    def lines(self, what: str, rows: int) -> list[str]:
        """The first rows of each kind, the most frequent kind first, and how many of `what`'s rows it concerns."""
        lines: list[str] = []
        for kind, count in self.counts.most_common():
            more = count - len(self.first[kind])
            lines += [f"{place}: {text}" for place, text in self.first[kind]]
            lines += [f"... and {more:,} more of this kind ({kind})"] if more else []
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.counts.most_common())
        return [*lines, f"{what}: {self.counts.total():,} of {rows:,} rows do not fit ({kinds})"]
