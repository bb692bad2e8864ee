"""What is in a folder: its data files, what is left out and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distft.data import splits
from distft.data.files import DataFile, LeftOut, kind_of, why_not
from distft.data.saved import STATE, is_saved, saved_files, saved_splits
from distft.errors import DataError


@dataclass(frozen=True)
class Folder:
    """A folder on this machine or on the hub: the names of its data files relative to it, and how one is read.

    `is_of_one_kind`: where files are of several kinds, only the most frequent kind is read.
    """

    where: str
    names: list[str]
    left_out: list[LeftOut]
    text: Callable[[str], str | None]
    file: Callable[[str], DataFile]
    splits: Mapping[str, list[str]] | None = None  # of what save_to_disk wrote: split → names
    subject: str = "this folder"
    is_of_one_kind: bool = False


def local_folder(path: Path) -> Folder:
    """A folder on this machine, with all below it.

    Raises:
        DataError: it cannot be read.
    """

    def text(name: str) -> str | None:
        try:
            return (path / name).read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, IsADirectoryError):
            return None
        except OSError as error:
            raise DataError(f"{path / name}: cannot be read ({str(error.strerror).lower()})") from None

    def file(name: str) -> DataFile:
        kind = kind_of(name)
        assert kind is not None
        return DataFile(str(path / name), *kind, path / name)

    try:
        if (saved := saved_splits(path)) is not None:
            return Folder(str(path), [], [], text, file, saved)
        configs = splits.read_configs(text(splits.README), text(splits.YAML), str(path))
        patterns = [one for config in configs for several in (config.patterns or {}).values() for one in several]
        names, left_out = _walk(path, with_hidden=any(splits.is_unusual(f"{one}/x") for one in patterns))
    except PermissionError as error:  # of a folder whose names may be listed, and nothing more
        raise DataError(f"{error.filename}: cannot be read (permission denied)") from None
    return Folder(str(path), names, left_out, text, file)


def _walk(top: Path, with_hidden: bool) -> tuple[list[str], list[LeftOut]]:
    """The data files below a folder, relative to it, and what is left out.

    Linked folders are followed after all others, and every folder is visited once, so links in a circle end.

    Raises:
        DataError: a folder that cannot be read.
    """
    names: list[str] = []
    left_out: list[LeftOut] = []
    top_real = top.resolve()
    visited: set[tuple[int, int]] = set()
    folders, links = [(top, "")], list[tuple[Path, str]]()
    while folders or links:
        folder, below = folders.pop() if folders else links.pop(0)
        try:
            found = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder}: cannot be read ({str(error.strerror).lower()})") from None
        if (found.st_dev, found.st_ino) in visited:
            left_out.append(LeftOut(str(folder), "a link to a folder that is already there"))
            continue
        visited.add((found.st_dev, found.st_ino))
        saved = saved_files(folder) if is_saved(folder) else None
        for entry in entries:
            path, name = folder / entry.name, below + entry.name
            if path.is_dir():
                if splits.is_unusual(f"{entry.name}/x") and not with_hidden:
                    left_out.append(LeftOut(f"{path}/", "hidden"))
                elif not entry.is_symlink():
                    folders.append((path, f"{name}/"))
                elif top_real.is_relative_to(path.resolve()):
                    left_out.append(LeftOut(str(path), "a link to a folder above it"))
                else:
                    links.append((path, f"{name}/"))
            elif entry.name in splits.IGNORED or entry.name == splits.YAML or (saved and entry.name == STATE):
                continue
            elif kind_of(entry.name) is None or not path.is_file():
                left_out.append(LeftOut(str(path), "hidden" if entry.name.startswith(".") else why_not(path)))
            elif saved is not None and entry.name not in saved:
                left_out.append(LeftOut(str(path), "not one of the files that save_to_disk listed"))
            else:
                names.append(name)
    return sorted(names), left_out
