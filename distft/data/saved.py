"""Folders that datasets' save_to_disk wrote: which files and splits they list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distft.errors import DataError

STATE, INFO, DICT = "state.json", "dataset_info.json", "dataset_dict.json"


def is_saved(folder: Path) -> bool:
    """Whether a folder holds one saved data set. (LLaMA-Factory's data folder has a dataset_info.json too.)"""
    return (folder / STATE).is_file() and (folder / INFO).is_file()


def saved_files(folder: Path) -> list[str]:
    """The names of the files of a saved data set. Others are of datasets' cache, or of an earlier version of it.

    Raises:
        DataError: they are not listed, or not there.
    """
    state = _read(folder / STATE)
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise DataError(f"{folder / STATE}: lists no _data_files; save the data set once more") from None
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: has indices; save the data set once more, after flatten_indices()")
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: {STATE} lists it, and it is not there")
    return names


def saved_splits(folder: Path) -> dict[str, list[str]] | None:
    """split → files, relative to the folder, of a saved data set or of a dict of them; None for any other folder.

    Raises:
        DataError: files that are listed are not there.
    """
    if (folder / DICT).is_file():
        splits = _read(folder / DICT).get("splits")
        if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
            raise DataError(f"{folder / DICT}: lists no splits; save the data set once more")
        return {split: [f"{split}/{name}" for name in saved_files(folder / split)] for split in splits}
    if is_saved(folder):
        return {"train": saved_files(folder)}
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; copy all that save_to_disk wrote") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({str(error.strerror).lower()})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: got a JSON {type(value).__name__}, need an object")
    return value
