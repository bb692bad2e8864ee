"""Rows in JSON: one a line, or in a list."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from distft.config.schema_text import show
from distft.data.batches import BATCH, Objects, Row
from distft.data.files import DataFile
from distft.data.problems import RowProblem
from distft.data.streams import BLOCK, UTF16, blocks, not_utf8
from distft.errors import DataError, first_line


@dataclass(frozen=True)
class Lines:
    """Lines of JSON, one row each. `first` is the number of the first line."""

    name: str
    first: int
    data: bytes

    def rows(self) -> Iterator[Row]:
        for number, line in enumerate(self.data.split(b"\n"), self.first):
            if line and not line.isspace():
                yield f"{self.name}:{number}", _parse(line)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises RowProblem for a key that is there twice, of which json would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
        raise RowProblem("key-twice", f"{show(key)} is there twice in one object; leave one of them out")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parse(text: bytes) -> dict[str, Any] | RowProblem:
    try:
        row = _DECODER.decode(text.decode())
    except RowProblem as problem:
        return problem
    except json.JSONDecodeError as error:
        fix = "; remove the comma after the object" if error.doc[error.pos :].strip() == "," else ""
        return RowProblem("not-json", f"not JSON ({error.msg}, column {error.colno}){fix}")
    except UnicodeDecodeError as error:
        return RowProblem("not-utf8", f"not JSON in UTF-8 (byte {error.start + 1}); save the file as UTF-8")
    except RecursionError:
        return RowProblem("nested-too-deeply", "nested too deeply to be read")
    except ValueError as error:  # a number of more than 4300 digits
        return RowProblem("not-json", f"not JSON ({first_line(error)})")
    return row if isinstance(row, dict) else _no_object(row)


def _no_object(value: Any) -> RowProblem:
    kind = {str: "string", list: "list", bool: "boolean", type(None): "null"}.get(type(value), "number")
    return RowProblem("not-an-object", f"got a JSON {kind}, need an object with fields")


def read_json(file: DataFile) -> Iterator[Lines | Objects]:
    """By its content: a list of objects, a line for each, or (.json) objects one after another.

    Many files of lines are called .json, and `datasets` reads them so.
    """
    data = blocks(file)
    head = next(data, b"")
    if head.startswith(UTF16):
        raise not_utf8(file)
    head = head.removeprefix(codecs.BOM_UTF8)
    start = head.lstrip()
    line = start.partition(b"\n")[0]
    if file.kind == "jsonl" and line.strip() == b"{":  # the first line of an object that is spread over several
        fix = "give it a name that ends in .json" if b"\n}" in start else "write each object on one line"
        raise DataError(f"{file.name}: is JSON with objects over several lines, and .jsonl has one on each; {fix}")
    if start.startswith(b"[") or (file.kind == "json" and isinstance(_parse(line), RowProblem)):
        with closing(data):
            rows = _read_values(_Text(file, itertools.chain([head], data)))
            while batch := list(itertools.islice(rows, BATCH)):
                yield Objects(batch)
    else:
        yield from _read_lines(file, itertools.chain([head], data))


def _read_lines(file: DataFile, blocks: Iterator[bytes]) -> Iterator[Lines]:
    number, parts = 1, list[bytes]()
    for block in blocks:
        whole, newline, rest = block.rpartition(b"\n")
        if newline:
            data = b"".join((*parts, whole))
            yield Lines(file.name, number, data)
            number, parts = number + data.count(b"\n") + 1, []
        parts.append(rest)
    if data := b"".join(parts):
        yield Lines(file.name, number, data)


class _Text:
    """The text of a file, read on as far as the next JSON value needs."""

    def __init__(self, file: DataFile, blocks: Iterator[bytes]):
        self.file = file
        self.blocks = blocks
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at = "", 0
        self.line = 1  # of the first character of `text`
        self.ended = False

    def read(self, least: int = 1) -> None:
        """Read on by at least so many characters, and forget what is done with."""
        self.line += self.text.count("\n", 0, self.at)
        parts, size = [self.text[self.at :]], 0
        self.at = 0
        try:
            while size < least and not self.ended:
                block = next(self.blocks, b"")
                self.ended = not block
                parts.append(self.decoder.decode(block, final=self.ended))
                size += len(parts[-1])
        except UnicodeDecodeError:
            raise not_utf8(self.file) from None
        self.text = "".join(parts)

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read()

    def value(self) -> Any:
        """The next value. Read on where it is cut off: doubling, as each attempt starts from its beginning.

        Raises:
            DataError: not JSON.
        """
        size = BLOCK
        while True:
            try:
                value, self.at = _DECODER.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                # A string that goes on is reported where it starts; a word or an escape is short.
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
                if self.ended or not is_cut:
                    raise self.problem(error.msg, error.pos) from None
                self.read(size)
                size *= 2
            except RowProblem as problem:
                raise DataError(f"{self.place(self.at)}: {problem}") from None
            except RecursionError:
                raise self.problem("nested too deeply", self.at) from None
            except ValueError as number:  # of more than 4300 digits
                raise self.problem(first_line(number), self.at) from None

    def place(self, at: int) -> str:
        """The file and the line of a character."""
        return f"{self.file.name}:{self.line + self.text.count(chr(10), 0, at)}"

    def problem(self, text: str, at: int) -> DataError:
        return DataError(f"{self.place(at)}: not JSON ({text})")


def _read_values(text: _Text) -> Iterator[Row]:
    """The elements of a list, or values one after another."""
    name = text.file.name
    if text.peek() != "[":
        while text.peek():
            place, value = text.place(text.at), text.value()
            yield place, value if isinstance(value, dict) else _no_object(value)
        return
    text.at += 1
    number = 0
    while text.peek() != "]" or number:
        number += 1
        value = text.value()
        yield f"{name}:[{number}]", value if isinstance(value, dict) else _no_object(value)
        sign = text.peek()
        if sign not in (",", "]"):
            raise text.problem("the list does not end" if not sign else "expecting ',' between objects", text.at)
        if sign == "]":
            break
        text.at += 1
    text.at += 1
    if text.peek():
        raise text.problem("more text after the list", text.at)
