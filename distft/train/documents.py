"""Documents on disk: written in the order of their rows, read in any order, in bounded memory."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    import pyarrow

    Numbers = numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]
    Tokens = numpy.ndarray[tuple[int], numpy.dtype[numpy.int32]]


@dataclass(frozen=True)
class Encoded:
    """Documents: the `ids` and `labels` of all, one after the other; the length of each, and the number of its row."""

    ids: Tokens
    labels: Tokens
    lengths: Numbers
    rows: Numbers


class Documents:
    """The documents of a split, in files of their ids and labels.

    These are not memory-mapped: pages that were read at random would stay resident.

    Attributes:
        lengths: of each document, in tokens.
        rows, sources: the numbers of its row and of that row's source.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self._stack = ExitStack()
        self._files = [self._stack.enter_context((folder / name).open("w+b")) for name in ("ids", "labels")]
        self._parts: list[tuple[Numbers, Numbers, Numbers]] = []

    def __enter__(self) -> Documents:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, encoded: Encoded, source: int, first_row: int) -> None:
        """Append those of a source's rows, which are numbered from `first_row`."""
        for file, tokens in zip(self._files, (encoded.ids, encoded.labels), strict=True):
            file.write(tokens.tobytes())
        sources = numpy.full(len(encoded.rows), source, numpy.int64)
        self._parts.append((encoded.lengths, encoded.rows + first_row, sources))

    def finish(self) -> None:
        """After the last was added."""
        for file in self._files:
            file.flush()
        columns = [numpy.concatenate(column) for column in zip(*self._parts, strict=True)] if self._parts else []
        self.lengths, self.rows, self.sources = columns or [numpy.empty(0, numpy.int64)] * 3
        self._starts = numpy.cumsum(self.lengths) - self.lengths

    def table(self, which: Numbers) -> pyarrow.Table:
        """These documents, in this order: columns input_ids and labels."""
        import pyarrow

        ends = numpy.cumsum(self.lengths[which])
        edges = pyarrow.array(numpy.concatenate([[0], ends]).astype(numpy.int32))
        places = list(
            zip(self._starts[which].tolist(), (ends - self.lengths[which]).tolist(), ends.tolist(), strict=True)
        )
        columns = {}
        for name, file in zip(("input_ids", "labels"), self._files, strict=True):
            tokens = numpy.empty(int(ends[-1]) if len(ends) else 0, numpy.int32)
            view, descriptor = tokens.data.cast("B"), file.fileno()
            for start, left, right in places:
                os.preadv(descriptor, [view[4 * left : 4 * right]], 4 * start)
            columns[name] = pyarrow.ListArray.from_arrays(edges, tokens)
        return pyarrow.table(columns)
