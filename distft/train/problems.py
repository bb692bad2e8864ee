"""Rows that would not be trained as they are meant, counted by kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

SHOWN = 3  # rows of each kind


@dataclass
class Problems:
    """How many rows have a problem of each kind, and the first of each with their place."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str, text: str) -> None:
        self.counts[kind] += 1
        shown = self.first.setdefault(kind, [])
        if len(shown) < SHOWN:
            shown.append(f"{place}: {text}")

    def lines(self, what: str, rows: int) -> list[str]:
        """The first rows of each kind, the most frequent kind first, and how many of `what`'s rows it concerns."""
        lines: list[str] = []
        for kind, count in self.counts.most_common():
            more = count - len(self.first[kind])
            lines += self.first[kind]
            lines += [f"... and {more} more of this kind ({kind})"] if more else []
        total = self.counts.total()
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.counts.most_common())
        return [*lines, f"{what}: {total} of {rows} rows would not be trained as they are meant ({kinds})"]
