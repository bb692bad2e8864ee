"""Asks the scheduler that runs a run, which its job id tells."""

from __future__ import annotations

from collections.abc import Sequence

from distft.runs.directory import RunDir
from distft.runs.status import Status, job_ids, read_status
from distft.schedulers import local, slurm


def statuses_now(runs: Sequence[RunDir]) -> list[Status]:
    """status.json of each run, corrected for those that could not write how they ended.

    SLURM is asked once for all.
    """
    of_slurm = [run for run in runs if _on_slurm(run)]
    statuses = dict(zip(of_slurm, slurm.statuses_now(of_slurm), strict=True))
    return [statuses[run] if run in statuses else local.status_now(run) for run in runs]


def status_now(run: RunDir) -> Status:
    """The same for one run."""
    return statuses_now([run])[0]


def cancel(run: RunDir) -> Status:
    """End a run; one that has ended stays as it is. Returns its status.

    Raises:
        DistftError: it could not be ended.
    """
    return slurm.cancel(run) if _on_slurm(run) else local.cancel(run)


def _on_slurm(run: RunDir) -> bool:
    return bool(job_ids(run)) and not read_status(run).is_local
