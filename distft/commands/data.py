"""`distft data`: rows as they are trained, from a process that has the tokenizer. No torch here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft import extras
from distft.config.loading import DATA_FILES, dump_recipe, read_recipe
from distft.config.recipe import Recipe
from distft.data.overlap import TRAINED
from distft.data.reading import are_here, checked_whole
from distft.errors import DataError, MissingPartError, NoTokenizerError, RunError
from distft.views.data_page import UNKNOWN_MIX
from distft.views.summary import data_lines

SAMPLE = 1000  # rows that are read for a summary


def show_rows(
    path: str, sets: Sequence[str] = (), row: int | None = None, sample: int = SAMPLE, only_eval: bool = False
) -> dict[str, Any]:
    """What becomes of row `row` of the training data (counted from 1), or of `sample` rows of each split.

    With `only_eval`, the same of the evaluation data: of data.eval, or of what is held out.

    Returns:
        split ("train", "eval") → the fields of SplitReport in train/show_rows.py.

    Raises:
        MissingPartError: the train part is not installed.
        DistftError: the recipe, its tokenizer or its data cannot be used.
    """
    loaded = read_recipe(path, sets, DATA_FILES)
    extras.require()
    with tempfile.TemporaryDirectory() as temporary:
        file, answer = Path(temporary) / "recipe.yaml", Path(temporary) / "answer.json"
        file.write_text(dump_recipe(loaded.recipe))
        options = ["--sample", str(sample)] if row is None else ["--row", str(row)]
        options += ["--eval"] * only_eval
        command = [sys.executable, "-m", "distft.train.show_rows", str(file), str(answer), *options]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
        if done.returncode or not answer.exists():
            raise RunError(f"the rows could not be read:\n{done.stderr.strip()}")
        found: dict[str, Any] = json.loads(answer.read_text())
    if "error" in found:
        if found["no_tokenizer"]:
            raise NoTokenizerError(f"{found['error']}{loaded.model_hint}")
        raise DataError(found["error"])
    return found


@dataclass(frozen=True)
class SampleCheck:
    """What `validate` learns from rows as they are trained: lines to print, why rows were not looked at, and tokens of
    a row of the training data in the mean, as far as data.max_length."""

    lines: list[str]
    warnings: list[str]
    row_tokens: float | None = None


def check_sample(
    path: str, sets: Sequence[str], recipe: Recipe, sample: int, said: Collection[str] = ()
) -> SampleCheck:
    """Encode `sample` rows of each split, the first of each file, where the data and the tokenizer are on this machine.

    Args:
        said: what check_files found, which is printed too: nothing is said twice.

    Raises:
        DataError: rows that would not be trained as they are meant.
    """
    if not sample or not are_here(recipe):
        return SampleCheck([], [])
    try:
        found = show_rows(path, sets, sample=sample)
    except (MissingPartError, NoTokenizerError) as error:
        return SampleCheck([], [f"how rows are tokenized is not checked: {error}"])
    if wrong := problems(found):
        raise DataError("\n".join(wrong))
    counts = {split: report["counts"] for split, report in found.items()}
    whole = checked_whole(recipe)
    for split, count in counts.items():
        if split in whole:  # what is shared with rows of the hub is found here alone
            odd = {kind: count["odd"][kind] for kind in {TRAINED} & count["odd"].keys() if "train" not in whole}
            count |= {"untrained": {}, "odd": odd, "empty": []}
    rows = {split: report["which"] for split, report in found.items()}
    each = "; ".join(f"{split}: {which}" for split, which in rows.items()) if len(rows) > 1 else rows["train"]
    which = "all rows" if all(report["all_read"] for report in found.values()) else each
    mixed = ", before they are mixed" if any(report["mixed"] for report in found.values()) else ""
    lines = [line for line in data_lines(counts) if line not in said]
    if any(report["mixed"] and not report["all_read"] for report in found.values()):
        lines.append(UNKNOWN_MIX)
    lengths = [min(length, recipe.data.max_length) for length in found["train"]["lengths"]]
    tokens = sum(lengths) / len(lengths) if lengths else None
    return SampleCheck([f"as they are trained, {which}{mixed}:", *lines], [], tokens)


def problems(found: dict[str, Any]) -> list[str]:
    """The problems of the rows of all splits, as lines."""
    return [line for report in found.values() for line in report["problems"]]
