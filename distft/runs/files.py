"""Files of a run: written whole or not at all, and read a block at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

BLOCK = 2**16  # bytes read at a time from a file that grows


def write_atomically(path: Path, text: str) -> None:
    """Write a temporary file beside it and rename that: a reader never sees half a file."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a node that loses power may leave an empty file under the new name
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_blocks(path: Path, start: int = 0) -> Iterator[bytes]:
    """A file from byte `start` on, a block at a time: a log may be larger than memory."""
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            yield block
