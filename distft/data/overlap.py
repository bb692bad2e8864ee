"""What is in more than one place: files of the training data that are there twice, and files and rows of the evaluation
data that are trained on too."""

from __future__ import annotations

import filecmp
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from distft.config.recipe import Data
from distft.data.files import DataFile, Found, LeftOut
from distft.errors import DataError

# The kind of rows of data.eval that are trained on too, and what is said of them.
TRAINED = "trained"
TRAINED_TEXT = "that data.train has too: eval_loss says less about new text (remove such rows from one of the two)"
_SORTED = 2**18  # rows


class TrainedRows:
    """The keys (Example.key) of the rows that are trained on, in 8 bytes each: 80 MB for ten million rows."""

    def __init__(self) -> None:
        self._sorted: list[array[int]] = []
        self._last: set[int] = set()

    def update(self, keys: Iterable[int]) -> None:
        """Add these keys."""
        self._last.update(keys)
        if len(self._last) >= _SORTED:
            self._sorted.append(array("Q", sorted(self._last)))
            self._last = set()

    def __contains__(self, key: int) -> bool:
        return key in self._last or any(_is_in(keys, key) for keys in self._sorted)


def _is_in(keys: array[int], key: int) -> bool:
    place = bisect_left(keys, key)
    return place < len(keys) and keys[place] == key


def can_share_rows(data: Data) -> bool:
    """Whether rows may be both trained on and evaluated: not where a hash of their content tells them apart."""
    return data.eval is not None and not isinstance(data.eval, float)


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
    _check_copied([file for found in kept for file in found.files])
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


def _check_copied(train: list[DataFile]) -> None:
    """Raises DataError where two files of the training data have the same content: `train (1).jsonl`."""
    alike: dict[tuple[int, bytes], list[DataFile]] = {}
    for file in train:
        if file.path is None or not (size := file.path.stat().st_size):
            continue
        with suppress(OSError), file.path.open("rb") as data:  # who reads its rows says what is wrong
            others = alike.setdefault((size, data.read(4096)), [])
            for other in others:
                if other.path is not None and filecmp.cmp(other.path, file.path, shallow=False):
                    raise DataError(
                        f"data.train: {file.name} has the same content as {other.name}; remove one, or, to train on it "
                        "more than once, name it once, with epochs"
                    )
            others.append(file)


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
