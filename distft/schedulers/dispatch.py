"""The scheduler of a run, which its job id tells, and what it says of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distft.runs.directory import RunDir
from distft.schedulers import local, slurm


def states_now(runs: Sequence[RunDir]) -> list[dict[str, Any]]:
    """status.json of each run with the truth about those that could not say themselves how they ended.

    SLURM is asked once for all.
    """
    of_slurm = [run for run in runs if _on_slurm(run)]
    states = dict(zip(of_slurm, slurm.states_now(of_slurm), strict=True))
    return [states[run] if run in states else local.state_now(run) for run in runs]


def state_now(run: RunDir) -> dict[str, Any]:
    """The same for one run."""
    return states_now([run])[0]


def cancel(run: RunDir) -> dict[str, Any]:
    """End a run. Does nothing to one that has ended. Returns its status.

    Raises:
        DistftError: it could not be ended.
    """
    return (slurm if _on_slurm(run) else local).cancel(run)


def _on_slurm(run: RunDir) -> bool:
    return bool(run.jobs()) and not str(run.read_status().get("job_id")).startswith("local:")
