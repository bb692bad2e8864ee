"""Files of rows, by their names: their kind and compression, and what is no such file."""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from distft.config.recipe import Source
from distft.data.hub import HubFile
from distft.errors import DataError

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
SUFFIXES = f"{', '.join(KINDS)} (also with {', '.join(COMPRESSIONS)} after it)"


@dataclass(frozen=True)
class DataFile:
    """A file of rows. `name` is what messages call it; `separator` is that of a CSV file's fields, where it is known.

    A file of the hub is downloaded when `local` is first asked for.
    """

    name: str
    kind: str
    compression: str | None = None
    path: Path | None = None
    hub: HubFile | None = None
    separator: str | None = None

    def local(self) -> Path:
        """Where it is on this machine.

        Raises:
            DataError: it cannot be downloaded.
        """
        if self.path is not None:
            return self.path
        assert self.hub is not None
        return self.hub.download()

    def identity(self) -> object:
        """Equal for two names of one file."""
        if self.path is None:
            return self.hub
        found = self.path.stat()
        return found.st_dev, found.st_ino


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not used, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Found:
    """The files of a source. `folder` is where they are, `how` is what told its splits apart; `is_named`: the source
    is one file."""

    source: Source
    files: tuple[DataFile, ...]
    left_out: tuple[LeftOut, ...] = ()
    split: str | None = None
    how: str = ""
    folder: str = ""
    is_named: bool = False

    def lines(self) -> list[str]:
        """What is used and what is left out, to be printed."""
        split = f" of split {self.split} ({self.how})" if self.split else ""
        if self.is_named:
            return [self.source.path]
        count = f"{len(self.files)} file{'s' * (len(self.files) != 1)}"
        lines = [f"{self.source.path}: {count}{split}: {some([file.name for file in self.files], self.folder)}"]
        reasons: dict[str, list[str]] = {}
        for left in self.left_out:
            reasons.setdefault(left.why, []).append(left.name)
        return [*lines, *(f"  left out, {why}: {some(names, self.folder)}" for why, names in reasons.items())]


def some(names: Sequence[str], folder: str = "", most: int = 4) -> str:
    """The first of several names, relative to `folder`, and how many more there are."""
    names = [name.removeprefix(f"{folder}/") if folder else name for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def kind_of(name: str) -> tuple[str, str | None] | None:
    """Kind and compression of a file, by its name in any case; None for what is no data file."""
    path = PurePath(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    kind = KINDS.get(PurePath(path.stem).suffix if compression else path.suffix)
    return (kind, compression) if kind else None


def why_not(path: Path) -> str:
    """Why a path that is no folder is no data file, to be printed."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "a link to nothing" if path.is_symlink() else str(error.strerror).lower()
    if not stat.S_ISREG(mode):
        kinds: list[tuple[Callable[[int], bool], str]] = [(stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket")]
        return next((what for test, what in kinds if test(mode)), "a device")
    return f"not a data file ({path.suffix or 'no suffix'})"


def named_file(path: Path) -> DataFile:
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({str(error.strerror).lower()})") from None
    if not is_file:
        raise DataError(f"{path}: is {why_not(path)}; need a file, {SUFFIXES}")
    kind = kind_of(path.name)
    if kind is None:
        raise DataError(f"{path}: got a {path.suffix or 'suffix-less'} file, need {SUFFIXES}")
    return DataFile(str(path), *kind, path)
