"""`distft data`: rows as they are trained, from a process that has the tokenizer. No torch here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distft import extras
from distft.config.loading import DATA_FILES, dump_recipe, read_recipe
from distft.errors import DataError, RunError

SAMPLE = 1000  # rows that are read for a summary


def show_rows(path: str, sets: Sequence[str] = (), row: int | None = None, sample: int = SAMPLE) -> dict[str, Any]:
    """What becomes of row `row` of the training data (counted from 1), or of the first `sample` rows of each split.

    Returns:
        split ("train", "eval") → the fields of SplitReport in train/show_rows.py.

    Raises:
        MissingPartError: the train part is not installed.
        DistftError: the recipe, its tokenizer or its data cannot be used.
    """
    recipe = read_recipe(path, sets, DATA_FILES).recipe
    extras.require()
    with tempfile.TemporaryDirectory() as temporary:
        file, answer = Path(temporary) / "recipe.yaml", Path(temporary) / "answer.json"
        file.write_text(dump_recipe(recipe))
        options = ["--sample", str(sample)] if row is None else ["--row", str(row)]
        command = [sys.executable, "-m", "distft.train.show_rows", str(file), str(answer), *options]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
        if done.returncode or not answer.exists():
            raise RunError(f"the rows could not be read:\n{done.stderr.strip()}")
        found: dict[str, Any] = json.loads(answer.read_text())
    if "error" in found:
        raise DataError(found["error"])
    return found


def problems(found: dict[str, Any]) -> list[str]:
    """The problems of the rows of all splits, as lines."""
    return [line for report in found.values() for line in report["problems"]]
