"""The bytes of a file, decompressed, in bounded memory."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import itertools
import lzma
import tempfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any

from distft.data.files import COMPRESSIONS, DataFile
from distft.errors import DataError, MissingPartError, first_line

BLOCK = 2**20  # bytes that are read at once
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


# The first bytes of a file that is compressed, and of others that are no text.
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ": ".xz"}
_OTHER = {
    b"PAR1": "parquet; give it a name that ends in .parquet",
    b"ARROW1": "Arrow; give it a name that ends in .arrow",
    b"PK\x03\x04": "a zip archive (or a workbook of Excel's); unpack it, or save it as CSV",
}


def _check_text(file: DataFile, head: bytes) -> None:
    """Raises DataError for a file that has no text, by its first bytes."""
    if file.kind not in ("parquet", "arrow"):
        for magic, what in _OTHER.items():
            if head.startswith(magic):
                raise DataError(f"{file.name}: is {what}")
    if file.compression is not None:
        return
    for magic, suffix in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{file.name}: is compressed, and its name does not say so; add {suffix} to its name")


def _check_compressed(file: DataFile) -> None:
    """Raises DataError where a file is not compressed as its name says."""
    if file.compression is None:
        return
    with file.local().open("rb") as stream:
        head = stream.read(8)
    own = next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), None)
    if head and (own is None or COMPRESSIONS[own] != file.compression):
        fix = f"name it {own} instead" if own else "remove the last suffix of its name"
        raise DataError(f"{file.name}: is not compressed with {file.compression}; {fix}")


def _open(file: DataFile) -> AbstractContextManager[Any]:
    path = file.local()
    if file.compression == "gzip":
        return gzip.open(path, "rb")
    if file.compression == "bz2":
        return bz2.open(path, "rb")
    if file.compression == "xz":
        return lzma.open(path, "rb")
    if file.compression == "zstd":
        return _open_zstd(file)
    return path.open("rb")


def _open_zstd(file: DataFile) -> AbstractContextManager[Any]:
    stream: AbstractContextManager[Any]
    try:
        import pyarrow

        stream = pyarrow.input_stream(str(file.local()), compression="zstd")
    except ImportError:
        try:
            import zstandard
        except ImportError:
            raise MissingPartError(f"{file.name}: reading .zst needs pip install zstandard, or distft[train]") from None
        stream = zstandard.open(file.local(), "rb")
    return stream


def blocks(file: DataFile) -> Generator[bytes]:
    """The bytes of a file, decompressed.

    Raises:
        DataError: it cannot be read to its end.
    """
    try:
        with _open(file) as stream:
            for number in itertools.count():
                block = stream.read(BLOCK)
                if not block:
                    return
                if not number:
                    _check_text(file, block)
                yield block
    except PermissionError:
        raise DataError(f"{file.name}: cannot be read (permission denied)") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        _check_compressed(file)
        what = "cannot be decompressed" if file.compression else "cannot be read"
        fix = "; it is damaged, or only a part of it was copied" if file.compression else ""
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{file.name}: {what} ({reason}){fix}") from None


class BlockStream(io.RawIOBase):
    """Blocks as a file."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks = blocks
        self.rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        if not self.rest:
            self.rest = next(self.blocks, b"")
        part, self.rest = self.rest[: len(view)], self.rest[len(view) :]
        view[: len(part)] = part
        return len(part)


def not_utf8(file: DataFile) -> DataError:
    """For a file that is not UTF-8: names the first such line."""
    with io.BufferedReader(BlockStream(blocks(file))) as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.startswith(UTF16):
                return DataError(f"{file.name}: got UTF-16, need UTF-8; save it as UTF-8")
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return DataError(f"{file.name}:{number}: not UTF-8 (byte {error.start + 1}); save it as UTF-8")
    return DataError(f"{file.name}: not UTF-8; save it as UTF-8")


def seekable(file: DataFile) -> AbstractContextManager[Any]:
    """A file in which one can go back: decompressed on disk, not in memory."""
    import pyarrow

    if file.compression is None:
        source: AbstractContextManager[Any] = pyarrow.OSFile(str(file.local()))
        return source
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    for block in blocks(file):
        copy.write(block)
    copy.seek(0)
    return copy
