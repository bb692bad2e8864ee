"""Rows with their place, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distft.data.problems import RowProblem

Row = tuple[str, "dict[str, Any] | RowProblem"]  # its place (train.jsonl:7), and its fields or what is wrong with it

BATCH = 1000  # rows of a batch, where rows are counted


@dataclass(frozen=True)
class Objects:
    """Rows that had to be parsed to find where they end."""

    parsed: list[Row]

    def rows(self) -> Iterator[Row]:
        return iter(self.parsed)
