"""Merging a run's adapter into its base: what is checked before, and the process that does it. No torch here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from distft import extras
from distft.config.document import load_yaml
from distft.config.loading import validate
from distft.config.recipe import Recipe
from distft.errors import DistftError, RecipeError, RunError
from distft.runs import checkpoints
from distft.runs.directory import RunDir
from distft.schedulers import dispatch
from distft.units import GIB


def merge(run: RunDir, output: Path, step: int | None = None) -> dict[str, Any]:
    """Write the merged model of `step`, or of final/, into the new folder `output` (train/merge.py, Merged).

    Raises:
        DistftError: nothing was written.
        RunError: it could not be merged, or the result is not what was trained; nothing is left of it.
    """
    check(run, output, step)
    extras.require()
    command = [sys.executable, "-m", "distft.train.merge", str(run.path), str(output.absolute())]
    done = subprocess.run([*command, *([] if step is None else [str(step)])], capture_output=True, text=True)
    last = next(reversed(done.stdout.strip().splitlines()), "")
    said = json.loads(last) if last.startswith("{") else {}
    if done.returncode == DistftError.exit_status and "error" in said:
        raise RecipeError(said["error"].splitlines())
    if done.returncode or not said:
        raise RunError(f"{run.name} could not be merged: {said.get('error') or _why(done)}")
    return said


def check(run: RunDir, output: Path, step: int | None) -> None:
    """Raises RecipeError for a run that has nothing to merge, and for an `output` that exists."""
    if not run.recipe.is_file():
        raise RecipeError(f"RUN: {run.name} is a script of one's own; what it saved is for it to merge")
    if validate(load_yaml(run.recipe, Recipe)).lora is None:
        raise RecipeError(f"RUN: {run.name} trained all weights; nothing is to be merged: final/ is the whole model")
    found = checkpoints.complete(run)
    have = f"complete checkpoints: {', '.join(str(c.step) for c in reversed(found)) or 'none'}"
    if step is not None and step not in [checkpoint.step for checkpoint in found]:
        raise RecipeError(f"--step: got {step}; {run.name} has {have}")
    if step is None and not run.final.is_dir():
        state = dispatch.status_now(run).state
        mend = f"; --step N merges a checkpoint ({have})"
        raise RecipeError(f"RUN: {run.name} is {state} and has no final/{mend}")
    if output.exists():
        raise RecipeError(f"-o: {output} exists already; name a new folder")


def _why(done: subprocess.CompletedProcess) -> str:
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}" + (" (out of memory?)" if done.returncode == -9 else "")
    return next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")


def lines(merged: dict[str, Any]) -> list[str]:
    """What was written and what was compared, for people."""
    plain = f", {merged['dequantised']} others dequantised" if merged["dequantised"] else ""
    said = [
        f"{merged['merged']} weights merged from {merged['source']}{plain}; {merged['tensors']} tensors, "
        f"{merged['bytes'] / GIB:.2f} GiB in {merged['dtype']}",
        f"compared: outputs of every merged layer on random inputs in float32, largest difference "
        f"{merged['layers_difference']:.1e} of their size",
    ]
    if merged["logits_difference"] is None:
        said.append(f"warning: logits are not compared: {merged['logits_unknown']}")
    else:
        what = "largest" if merged["dtype"] == "float32" else "root mean square of the"
        said.append(
            f"compared: logits of the trained and the written model, {what} difference "
            f"{merged['logits_difference']:.1e} of their size (at most {merged['logits_tolerance']:.1e})"
        )
    return [*said, f"done: {merged['output']}"]
