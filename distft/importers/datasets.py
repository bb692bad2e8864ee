"""Data sets as other tools name them → data.train and data.eval."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.data.layouts import CONTENTS, CONVERSATIONS, PAIRS, ROLES
from distft.importers.draft import Draft
from distft.importers.options import Options

# Formats that `auto` tells by the fields of rows, and reads as if they were named.
_TOLD_APART = ("alpaca", "sharegpt", "messages", "prompt_completion", "text", "tokens")
_SLICE = re.compile(r"(?P<split>\w+)(?:\[(?P<start>\d*%?):(?P<end>\d*%?)\])?")

SECONDS = 5  # that the hub may take to answer


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


def with_share(entries: list[str | dict[str, Any]], share: dict[str, Any]) -> list[str | dict[str, Any]]:
    """The entries with how much of each is used."""
    return [({"path": entry} if isinstance(entry, str) else entry) | share for entry in entries]


def hub_file(repo: str, name: str) -> Path | None:
    """A file of a data set on the hub, from the hub's cache or downloaded; None where it cannot be had from here."""
    with contextlib.suppress(Exception):  # the hub's errors, httpx's, OSError
        import huggingface_hub as hub

        found = hub.try_to_load_from_cache(repo, name, repo_type="dataset")
        if isinstance(found, str):
            return Path(found)
        return Path(hub.hf_hub_download(repo, name, repo_type="dataset", etag_timeout=SECONDS))
    return None


def simplest(entries: list[str | dict[str, Any]]) -> str | list[str | dict[str, Any]]:
    """data.train of these entries: one alone is no list, unless it has a share."""
    return entries[0] if len(entries) == 1 and isinstance(entries[0], str) else entries


@dataclass(frozen=True)
class Format:
    """How the rows of a data set are read: data.format, and where it needs them data.columns and data.roles; nothing
    where that was refused. `option` of `options` says so."""

    options: Options
    option: str
    settings: dict[str, Any]


def set_formats(draft: Draft, formats: list[Format]) -> None:
    """One format for all data sets, trained and evaluated: a recipe has no other for one of them. The first that does
    not go together with those before it is refused."""
    formats = [one for one in formats if one.settings]
    for number, one in enumerate(formats):
        if _merged([other.settings for other in formats[: number + 1]]) is None:
            one.options.refuse(
                one.option,
                f"a recipe has one data.format and data.columns for all its data; here it would be {_words(one)}, and "
                f"for {formats[0].options.path(formats[0].option)} {_words(formats[0])}; write these rows in that form",
            )
            formats = formats[:number]
            break
    if not formats:
        return
    first, settings = formats[0], _merged([one.settings for one in formats]) or {}
    is_same = settings == first.settings
    shown = " + ".join(one.options.path(one.option) for one in (formats[:1] if is_same else formats))
    for name, value in settings.items():
        given = first.options.data.get(first.option) if is_same else None
        draft.set(name, value, shown, given, first.options.line(first.option))


def _words(one: Format) -> str:
    names = ", ".join(f"{theirs} as {ours}" for ours, theirs in one.settings.get("data.columns", {}).items())
    return f"{one.settings['data.format']}" + f" ({names})" * bool(names)


def _merged(formats: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The settings of several data sets: those that all have, or `auto` where the fields of their rows say as much.
    None where it cannot be said."""
    if all(one == formats[0] for one in formats):
        return formats[0]
    if not all(one["data.format"] in _TOLD_APART and _is_guessed(one.get("data.columns", {})) for one in formats):
        return None
    roles: dict[str, str] = {}
    for one in formats:
        for name, target in one.get("data.roles", {}).items():
            if roles.setdefault(name, target) != target:
                return None
    return {"data.format": "auto", **({"data.roles": roles} if roles else {})}


def _is_guessed(columns: dict[str, str]) -> bool:
    """Whether `auto` finds these columns by itself."""
    guessed = {"messages": CONVERSATIONS, "role": ROLES, "content": CONTENTS, "input": ("input", "context")}
    guessed |= {"system": ("system", "system_prompt"), "tools": ("tools", "functions")}
    pair = columns.get("instruction", "instruction"), columns.get("output", "output")
    rest = {name: column for name, column in columns.items() if name not in ("instruction", "output")}
    return pair in PAIRS and all(column in guessed.get(name, ()) for name, column in rest.items())
