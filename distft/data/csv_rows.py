"""Rows in CSV."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from distft.data.batches import BATCH, Objects, Row
from distft.data.files import DataFile
from distft.data.problems import RowProblem
from distft.data.streams import BlockStream, blocks, not_utf8
from distft.errors import DataError


def read_csv(file: DataFile) -> Iterator[Objects]:
    csv.field_size_limit(2**31 - 1)  # the default is 128 KiB a field
    rows = _csv_rows(file)
    try:
        while batch := list(itertools.islice(rows, BATCH)):
            yield Objects(batch)
    except UnicodeDecodeError:
        raise not_utf8(file) from None


def _csv_rows(file: DataFile) -> Iterator[Row]:
    with closing(blocks(file)) as data:
        lines = io.TextIOWrapper(io.BufferedReader(BlockStream(data)), encoding="utf-8-sig", newline="")
        first = lines.readline()
        if first.lstrip().startswith(("{", "[")) and isinstance(_json(first), (dict, list)):
            raise DataError(f"{file.name}: is JSON and no CSV; give it a name that ends in .jsonl")
        reader = csv.reader(itertools.chain([first], lines), delimiter=_separator(file, first), strict=True)
        number = 1
        try:
            header = next(reader, [])
            if twice := next((name for name in header if header.count(name) > 1), None):
                raise DataError(f"{file.name}:1: two columns are called {twice!r}; rename one")
            number = reader.line_num + 1
            for values in reader:
                place, number = f"{file.name}:{number}", reader.line_num + 1
                if not values:
                    continue
                if len(values) == len(header):
                    yield place, dict(zip(header, values, strict=True))
                else:
                    text = (
                        f"got {len(values)} fields, need {len(header)} as in the header; quote fields that hold a comma"
                    )
                    yield place, RowProblem("fields-differ", text)
        except csv.Error as error:
            raise DataError(f"{file.name}:{number}: not CSV ({error})") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _separator(file: DataFile, header: str) -> str:
    """What is between the fields: a tab in .tsv; a tab or semicolon where the header has no comma."""
    if file.separator is not None:
        return file.separator
    if ".tsv" in file.name.lower():
        return "\t"
    return "," if "," in header else next((sign for sign in "\t;" if sign in header), ",")
