"""A run directory from one attempt to the next: filled before the first, tidied after each."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distft.errors import RecipeError
from distft.runs.directory import DS_CONFIG, SBATCH, SCRIPT, RunDir
from distft.runs.files import write_atomically
from distft.runs.metrics import last_metrics
from distft.runs.status import Attempt, Cause, State, Status, read_status, update_status

# What status.json says of an end, which a run that continues has no longer.
OF_AN_END = (
    "ended",
    "reason",
    "job_id",
    "stop_reason",
    "attempts",
    "exit_status",
    "eval_loss_after",
    "checkpoint_problem",
)


def fill(run: RunDir, files: Mapping[str, str], name: str, resumed: bool = False) -> None:
    """Write the files, by name, of a run that is about to start or is being resumed, and its first status.

    Raises:
        RecipeError: they cannot be written; the run directory is removed, unless the run is being resumed.
    """
    try:
        ended: dict[str, Any] = {}
        if resumed:
            set_aside(run)
            for file in {SCRIPT, SBATCH, DS_CONFIG} - files.keys():  # of another place or strategy
                (run.path / file).unlink(missing_ok=True)
            empty = Status()
            ended = {field: getattr(empty, field) for field in OF_AN_END}
        write_files(run, files)
        update_status(run, state=State.QUEUED, name=name, **ended)
    except OSError as error:
        if not resumed:
            shutil.rmtree(run.path, ignore_errors=True)
        raise RecipeError(f"output_dir: {run.path} cannot be written ({error.strerror})") from None


def write_files(run: RunDir, files: Mapping[str, str]) -> None:
    """Write files of a run by name."""
    for name, text in files.items():
        write_atomically(run.path / name, text)


def new_attempt(
    run: RunDir, reason: str, cause: Cause, node: str | None = None, bad_nodes: tuple[str, ...] = ()
) -> Attempt:
    """The attempt that has just ended. Writes nothing."""
    step = last_metrics(run).get("step", 0)
    return Attempt(time.time(), step, reason, cause, node, bad_nodes, _next_folder(run).name)


def record_attempt(run: RunDir, attempt: Attempt, **fields: Any) -> None:
    """Add it to status.json, together with other fields of it."""
    update_status(run, attempts=(*read_status(run).attempts, attempt), **fields)


def set_aside(run: RunDir) -> None:
    """Move what an attempt left about its end to logs/attempt-N: it must not explain the end of the next one."""
    patterns = ("rank-*.error.json", "torchrun*.log", "stop", "rank-*.waits")
    ended = [path for pattern in patterns for path in run.logs.glob(pattern)]
    if ended:
        folder = _next_folder(run)
        folder.mkdir()
        for path in ended:
            path.rename(folder / path.name)


def _next_folder(run: RunDir) -> Path:
    """Where the logs of the next attempt that ends will be."""
    return run.logs / f"attempt-{1 + sum(1 for _ in run.logs.glob('attempt-*'))}"
