"""Files that are in more than one source: of the training data twice, or of the evaluation data too."""

from __future__ import annotations

import filecmp
from dataclasses import replace
from pathlib import Path

from distft.data.files import DataFile, Found, LeftOut
from distft.errors import DataError


def without_evaluated(train: list[Found], evaluated: list[Found]) -> list[Found]:
    """The training data without the files of the evaluation data, which a folder or pattern may hold too.

    Raises:
        DataError: both name the same, so that leaving it out is not what was meant; or two files have the same content.
    """
    held: dict[object, tuple[Found, DataFile]] = {
        file.identity(): (found, file) for found in evaluated for file in found.files
    }
    kept = []
    for found in train:
        files = [file for file in found.files if file.identity() not in held]
        for file in found.files:
            if file in files:
                continue
            other = held[file.identity()][0]
            if found.is_named or other.source.path == found.source.path or not files:
                raise DataError(
                    f"data.eval: {file.name} is also trained on, by data.train; name other data, or hold some of it "
                    "out with a fraction such as data.eval: 0.05"
                )
        shared = tuple(LeftOut(file.name, "in data.eval") for file in found.files if file not in files)
        kept.append(replace(found, files=tuple(files), left_out=(*found.left_out, *shared)))
    _check_twice(kept)
    _check_copies([file for found in kept for file in found.files], [file for _, file in held.values()])
    return kept


def _check_copies(train: list[DataFile], evaluated: list[DataFile]) -> None:
    """Raises DataError where a file of the evaluation data has a copy in the training data."""
    sizes: dict[int, list[Path]] = {}
    for file in train:
        if file.path is not None:
            sizes.setdefault(file.path.stat().st_size, []).append(file.path)
    for file in evaluated:
        if file.path is None or not (size := file.path.stat().st_size):
            continue
        for path in sizes.get(size, ()):
            if filecmp.cmp(path, file.path, shallow=False):
                raise DataError(f"data.eval: {file.name} has the same content as {path}, which data.train trains on")


def _check_twice(train: list[Found]) -> None:
    """Raises DataError for a file that two sources of the training data hold."""
    held: dict[object, Found] = {}
    for found in train:
        for file in found.files:
            other = held.setdefault(file.identity(), found)
            if other is not found:
                raise DataError(
                    f"data.train: {file.name} is in {other.source.path} and in {found.source.path}; to train on it "
                    "more than once, name it once, with epochs"
                )
