"""`distft quickstart`: data, recipes, and the base model, trained on the spot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distft import extras, quickstart
from distft.commands import launch
from distft.errors import RecipeError, RunError
from distft.hardware.devices import visible_gpus
from distft.jobs.target import Target, plan_recipe
from distft.runs.metrics import read_metrics
from distft.views.progress import say

if TYPE_CHECKING:
    from rich.console import Console

FALLBACK_RANKS = 2  # CPU processes, where there are as many cores


def build(folder: Path, gpus_per_node: int | None, console: Console) -> None:
    """Fill `folder`; a build that was interrupted restarts from the beginning.

    Raises:
        RecipeError: the folder holds something else, or a finished quickstart.
        RunError: the base model could not be trained.
    """
    if (folder / "base").exists():
        raise RecipeError(f"{folder}: already holds a quickstart; train it with: distft launch {folder}/recipe.yaml")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "base.yaml").exists())):
        raise RecipeError(f"{folder}: exists and is not a quickstart; name a new folder")
    extras.require()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        quickstart.write_recipes(folder)
    except OSError as error:
        raise RecipeError(f"{folder}: cannot be written ({error.strerror}); name another folder") from None
    counts = quickstart.write_data(folder)
    say(
        console,
        [
            f"quickstart in {folder}: text of Python's standard library, {counts.train_rows:,} rows to train on from "
            f"{counts.files - counts.heldout_files} files, {counts.heldout_rows:,} held-out rows from "
            f"{counts.heldout_files} others",
            "1. train the base model on the text",
        ],
    )
    made = subprocess.run(
        [sys.executable, "-m", "distft.quickstart.model", str(folder)], capture_output=True, text=True
    )
    if made.returncode:
        raise RunError(f"the tokenizer and the untrained model could not be created:\n{made.stderr.strip()}")
    if gpus_per_node is None and not visible_gpus():
        gpus_per_node = min(FALLBACK_RANKS, len(os.sched_getaffinity(0)))
    sets = [f"output_dir={json.dumps(str(folder / 'runs'))}"]
    target = Target(gpus_per_node=gpus_per_node)
    recipe, plan = plan_recipe(str(folder / "base.yaml"), sets, target, for_launch=True)
    run = launch.RecipeLaunch(recipe, plan).start(console)
    losses = [line["loss"] for line in read_metrics(run.metrics)[0]]
    shutil.copytree(run.final, folder / "base")
    say(
        console,
        [
            f"base model in {folder / 'base'}: loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps",
            f"next: distft launch {folder / 'recipe.yaml'} --gpus-per-node {plan.topology.nproc_per_node}",
        ],
    )
