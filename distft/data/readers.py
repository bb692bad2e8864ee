"""Files → rows with their place, in bounded memory. No torch.

What is read comes in batches that are cheap to hand to another process and are parsed there. A row that cannot be
parsed is a RowProblem in its place, so that all of them are found at once; a file that cannot be read to its end is a
DataError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from distft.data.arrow_rows import Columns, read_arrow, read_parquet
from distft.data.batches import Objects, Row
from distft.data.csv_rows import read_csv
from distft.data.files import DataFile
from distft.data.json_rows import Lines, read_json

Batch = Lines | Objects | Columns


def read_files(files: Iterable[DataFile]) -> Iterator[Row]:
    """All rows of the files, in order.

    Raises:
        DataError: a file that cannot be read, or is not what its name says.
    """
    for batch in read_batches(files):
        yield from batch.rows()


def read_batches(files: Iterable[DataFile]) -> Iterator[Batch]:
    """The same, in batches of about BLOCK bytes or BATCH rows."""
    for file in files:
        yield from _READERS[file.kind](file)


_READERS: dict[str, Callable[[DataFile], Iterator[Batch]]] = {
    "jsonl": read_json,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
