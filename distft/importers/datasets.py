"""Data sets as other tools name them → data.train and data.eval."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from distft.importers.draft import Draft

_SLICE = re.compile(r"(?P<split>\w+)(?:\[(?P<start>\d*%?):(?P<end>\d*%?)\])?")


@dataclass(frozen=True)
class DataSet:
    """A data set of a file.

    Args:
        path: as the file has it; `name` is its configuration, `files` are some of its files.
        split: a split of it, which may be cut: `train[:20%]`.
        most: at most so many rows are used.
        share: its weight in the mix.
        is_here: `path` is a local one, relative to the recipe's folder.
    """

    path: str
    split: str | None = None
    name: str | None = None
    revision: str | None = None
    files: tuple[str, ...] = ()
    most: int | None = None
    share: float | None = None
    is_here: bool = False


@dataclass(frozen=True)
class Part:
    """Which part of a split is used: a fraction of its rows, or a number of them."""

    split: str | None
    start: float = 0.0
    end: float = 1.0
    rows: int | None = None

    @property
    def fraction(self) -> float:
        return round(self.end - self.start, 6)


def read_split(text: str | None) -> Part | None:
    """A split in the spelling of `datasets`; None for one that cannot be read: sums, or rows from the middle."""
    if text is None:
        return Part(None)
    match = _SLICE.fullmatch(text.strip())
    if match is None:
        return None
    split, start, end = match["split"], match["start"] or "", match["end"] or ""
    numbers = [part for part in (start, end) if part]
    if all(part.endswith("%") for part in numbers):
        low, high = (int(part[:-1]) / 100 if part else default for part, default in ((start, 0.0), (end, 1.0)))
        return Part(split, low, high) if 0 <= low < high <= 1 else None
    if start in ("", "0") and int(end):
        return Part(split, rows=int(end))
    return None


def sources(draft: Draft, data_set: DataSet, where: str) -> list[str | dict[str, Any]] | None:
    """The entries of data.train that read a data set; None for a split that cannot be said.

    Args:
        where: the option, for warnings.
    """
    part = read_split(data_set.split)
    if part is None:
        return None
    share: dict[str, Any] = {} if data_set.share is None else {"weight": data_set.share}
    if part.rows is not None or data_set.most is not None:
        share["rows"] = min(n for n in (part.rows, data_set.most) if n is not None)
        draft.warn(
            f"{where}: {share['rows']} rows are drawn by training.seed, not the first ones; a data set that has fewer "
            "gives rows twice"
        )
    elif part.fraction < 1:
        share["epochs"] = part.fraction
        draft.warn(f"{where}: {part.fraction:.0%} of the rows are drawn by training.seed, not those of the slice")
    found: list[str | dict[str, Any]] = []
    for path in _paths(draft, data_set):
        split = "" if part.split in (None, "train") or data_set.files else f":{part.split}"
        entry = {"path": path + split, **({"config": data_set.name} if data_set.name else {}), **share}
        found.append(entry if len(entry) > 1 else path + split)
    return found


def _paths(draft: Draft, data_set: DataSet) -> list[str]:
    """The paths of a data set, or of the files of it that are named."""
    if data_set.is_here:
        return [data_set.path]
    local = draft.locate(data_set.path)
    if data_set.path in ("json", "csv", "parquet", "arrow", "text") and data_set.files and (local is None):
        return [draft.data_path(file) for file in data_set.files]  # a loader of `datasets`
    if not data_set.files:
        path = draft.data_path(data_set.path)
        return [f"{path}@{data_set.revision}" if data_set.revision and local is None else path]
    if local is not None and local.is_dir():
        return [draft.relative(local / file) for file in data_set.files]
    at = f"@{data_set.revision}" if data_set.revision else ""
    return [f"hf://datasets/{data_set.path}{at}/{file}" for file in data_set.files]


def simplest(entries: list[str | dict[str, Any]]) -> str | list[str | dict[str, Any]]:
    """data.train of these entries: one alone is no list, unless it has a share."""
    return entries[0] if len(entries) == 1 and isinstance(entries[0], str) else entries


def merge_formats(formats: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The format of several data sets: the one that all have, or `auto` where that tells them apart. None otherwise."""
    if not formats:
        return {}
    if all(one == formats[0] for one in formats):
        return formats[0]
    plain = {"alpaca", "sharegpt", "messages", "prompt_completion", "text", "tokens"}
    if all(set(one) == {"data.format"} and one["data.format"] in plain for one in formats):
        return {"data.format": "auto"}
    return None
