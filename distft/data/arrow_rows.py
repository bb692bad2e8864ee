"""Rows in Arrow's formats and in parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distft.data.batches import BATCH, Row
from distft.data.files import DataFile
from distft.data.streams import seekable
from distft.errors import DataError, MissingPartError, first_line

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Columns:
    """Rows of an Arrow table. `first` is the number of the first one, from 1."""

    name: str
    first: int
    data: pyarrow.RecordBatch

    def rows(self) -> Iterator[Row]:
        """Raises DataError for damaged values."""
        import pyarrow

        names = self.data.schema.names
        try:
            self.data.validate(full=True)  # an offset that points elsewhere would crash the process
            columns = [_values_of(column) for column in self.data.columns]
        except (pyarrow.ArrowException, ValueError) as error:  # ValueError: not UTF-8, not JSON
            where = f"{self.name}:[{self.first}] to [{self.first + self.data.num_rows - 1}]"
            raise DataError(f"{where}: damaged ({first_line(error)})") from None
        for number, values in enumerate(zip(*columns, strict=True), self.first):
            yield f"{self.name}:[{number}]", dict(zip(names, values, strict=True))


def read_parquet(file: DataFile) -> Iterator[Columns]:
    pyarrow = _pyarrow(file)
    from pyarrow import parquet

    try:
        with seekable(file) as source, parquet.ParquetFile(source, pre_buffer=False) as table:
            number = 1
            for batch in table.iter_batches(BATCH):
                yield Columns(file.name, number, batch)
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.name}: not parquet, or damaged ({first_line(error)})") from None


def read_arrow(file: DataFile) -> Iterator[Columns]:
    """Arrow's file or stream format; `datasets` writes streams."""
    pyarrow = _pyarrow(file)

    def batches(source: Any) -> Iterator[Any]:
        start = source.read(6)
        source.seek(0)
        if start == b"ARROW1":
            table = pyarrow.ipc.open_file(source)
            return (table.get_batch(n) for n in range(table.num_record_batches))
        return iter(pyarrow.ipc.open_stream(source))

    try:
        with seekable(file) as source:
            number = 1
            for batch in batches(source):
                for start in range(0, batch.num_rows, BATCH):
                    part = batch.slice(start, BATCH)
                    yield Columns(file.name, number, part)
                    number += part.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.name}: not Arrow, or damaged ({first_line(error)})") from None


def _pyarrow(file: DataFile) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise MissingPartError(f'{file.name}: reading {file.kind} needs pip install "distft[train]"') from None
    return pyarrow


def _values_of(column: pyarrow.Array) -> list[Any]:
    clean = _cleaner(column.type)
    values: list[Any] = column.to_pylist()
    return values if clean is None else [clean(value) for value in values]


def _cleaner(kind: pyarrow.DataType) -> Callable[[Any], Any] | None:
    """What makes of Arrow's values the ones that were put in; None where they are the same.

    In Arrow, all structs of a column have the same fields, and those that a row did not have are null. So fields that
    are null are removed: one that was null before cannot be told from them. JSON text (of datasets' type for values of
    mixed types) is parsed, and a map is a dict.
    """
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        is_json = kind.extension_name == "arrow.json"
        return (lambda value: None if value is None else json.loads(value)) if is_json else _cleaner(kind.storage_type)
    if pyarrow.types.is_struct(kind):
        fields = {kind.field(n).name: _cleaner(kind.field(n).type) for n in range(kind.num_fields)}

        def clean_struct(value: Any) -> Any:
            return value and {
                name: (clean(inner) if (clean := fields[name]) else inner)
                for name, inner in value.items()
                if inner is not None
            }

        return clean_struct
    if pyarrow.types.is_map(kind):
        of_item = _cleaner(kind.item_type)
        return lambda value: value and {key: of_item(item) if of_item else item for key, item in value}
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        of_value = _cleaner(kind.value_type)
        return (lambda value: value and [of_value(item) for item in value]) if of_value else None
    return None
