"""`distft merge`: the checks before a run's adapter is merged into its base, and the process that merges. No torch."""

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
    """Write the merged model of `step`, or of final/, into the new folder `output`.

    Returns:
        The fields of Merged in train/merge.py.

    Raises:
        DistftError: nothing was written.
        RunError: it could not be merged, or the result is not what was trained; nothing is left of it.
    """
    check(run, output, step)
    extras.require()
    command = [sys.executable, "-m", "distft.train.merge", str(run.path), str(output.absolute())]
    done = subprocess.run([*command, *([] if step is None else [str(step)])], capture_output=True, text=True)
    last = next(reversed(done.stdout.strip().splitlines()), "")
    answer: dict[str, Any] = json.loads(last) if last.startswith("{") else {}
    if done.returncode == DistftError.exit_status and "error" in answer:
        raise RecipeError(answer["error"].splitlines())
    if done.returncode or not answer:
        raise RunError(f"{run.name} could not be merged: {answer.get('error') or _why(done)}")
    return answer


def check(run: RunDir, output: Path, step: int | None) -> None:
    """Raises RecipeError for a run that has nothing to merge, or an `output` that exists."""
    if not run.trains_recipe:
        raise RecipeError(f"RUN: {run.name} ran your own script; distft does not know what it saved")
    if validate(load_yaml(run.recipe, Recipe)).lora is None:
        raise RecipeError(f"RUN: {run.name} has no adapter, so there is nothing to merge: final/ is the whole model")
    found = checkpoints.complete(run)
    have = f"complete checkpoints: {', '.join(str(c.step) for c in reversed(found)) or 'none'}"
    if step is not None and step not in [checkpoint.step for checkpoint in found]:
        raise RecipeError(f"--step: got {step}; {run.name} has {have}")
    if step is None and not run.final.is_dir():
        state = dispatch.status_now(run).state
        fix = f"; --step N merges a checkpoint ({have})"
        raise RecipeError(f"RUN: {run.name} is {state} and has no final/{fix}")
    if output.exists():
        raise RecipeError(f"-o: {output} already exists; name a new folder")


def _why(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}" + (" (out of memory?)" if done.returncode == -9 else "")
    return next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")


def lines(merged: dict[str, Any]) -> list[str]:
    """What was written and what was compared, for people."""
    plain = f", {merged['dequantized']} others dequantized" if merged["dequantized"] else ""
    found = [
        f"{merged['merged']} weights merged from {merged['source']}{plain}; {merged['tensors']} tensors, "
        f"{merged['bytes'] / GIB:.2f} GiB in {merged['dtype']}",
        f"compared: the output of every merged layer on random inputs in float32, largest difference "
        f"{merged['layers_difference']:.1e}, relative to its size",
    ]
    what = "largest" if merged["dtype"] == "float32" else "root mean square"
    found.append(
        f"compared: the logits of the trained and of the written model, {what} difference "
        f"{merged['logits_difference']:.1e}, relative to their size (allowed {merged['logits_tolerance']:.1e})"
    )
    return [*found, f"done: {merged['output']}"]
