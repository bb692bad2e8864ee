"""metrics.jsonl: one line per optimizer step, read while it grows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from distft.runs.directory import RunDir
from distft.runs.files import write_atomically

LAST_BYTES = 2**14  # more than the last line has


def read_metrics(path: Path, start: int = 0, limit: int = -1) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a metrics.jsonl from byte `start` on, and the byte after the last of them.

    `limit` is in bytes and must exceed the longest line; without it, the lines of a long run take gigabytes of memory.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(limit)
    except FileNotFoundError:
        return [], start
    end = data.rfind(b"\n") + 1
    return [json.loads(line) for line in data[:end].splitlines()], start + end


def last_metrics(run: RunDir) -> dict[str, Any]:
    """The newest line, {} before the first; reads only the end of the file."""
    try:
        with run.metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    line: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return line


def cut_metrics(run: RunDir, step: int) -> None:
    """Drop the lines after `step`: these steps are trained again."""
    kept = [line for line in read_metrics(run.metrics)[0] if line["step"] <= step]
    write_atomically(run.metrics, "".join(json.dumps(line) + "\n" for line in kept))


def metrics_inode(run: RunDir) -> int | None:
    """Tells one metrics.jsonl from the one that a resumed run puts in its place; None while there is none."""
    try:
        return run.metrics.stat().st_ino
    except FileNotFoundError:
        return None
