"""Where jobs run: this machine (local) or SLURM. A run knows which by its job id."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distft.run_dir import RunDir


def __getattr__(name: str) -> ModuleType:
    """schedulers.local and schedulers.slurm are imported when they are first used."""
    if name not in ("local", "slurm"):
        raise AttributeError(name)
    return importlib.import_module(f"distft.schedulers.{name}")


def states_now(runs: Sequence[RunDir]) -> list[dict[str, Any]]:
    """status.json of each run with the truth about those that could not say themselves how they ended.

    SLURM is asked once for all.
    """
    from distft.schedulers import local, slurm

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
    from distft.schedulers import local, slurm

    return (slurm if _on_slurm(run) else local).cancel(run)


def _on_slurm(run: RunDir) -> bool:
    return bool(run.jobs()) and not str(run.read_status().get("job_id")).startswith("local:")
