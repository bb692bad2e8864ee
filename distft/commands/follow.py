"""Following a run to its end, and what `--json` prints of runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distft.errors import RunError
from distft.runs.directory import FINISHED, RunDir
from distft.schedulers import dispatch, slurm
from distft.shell import quote
from distft.views import summary

if TYPE_CHECKING:
    from rich.console import Console

FOLLOW_SECONDS = 0.3
SLURM_SECONDS = 15.0  # the longest between two questions to SLURM: controllers suffer from those who ask often


def follow(run: RunDir, console: Console, resumed: bool = False) -> None:
    """Show a run of SLURM's to its end. Ctrl-C leaves the job alone.

    Raises:
        RunError: the run failed or was cancelled.
    """
    from distft.runs.failure import first_failure
    from distft.views.progress import Follower, say

    try:
        with Follower(run, console, resumed) as follower:
            asked, wait = 0.0, 1.0
            while True:
                if time.monotonic() - asked >= wait or run.read_status().get("state") in FINISHED:
                    status = slurm.state_now(run)
                    asked, wait = time.monotonic(), min(wait * 1.3, SLURM_SECONDS)
                    follower.waiting(status)
                    if status.get("state") in FINISHED:
                        break
                follower.poll()
                time.sleep(FOLLOW_SECONDS)
    except KeyboardInterrupt:
        name = quote(str(run.path))
        say(
            console,
            [f"job {run.jobs()[-1]} goes on; come back with: distft logs -f {name}; end it with: distft cancel {name}"],
        )
        raise SystemExit(130) from None
    if status["state"] == "completed":
        say(console, summary.result_lines(run))
    elif status.get("exit_status"):  # it said itself how it ended
        raise RunError(first_failure(run, status["exit_status"]).text)
    else:
        raise RunError(f"{status['state']}: {status.get('reason') or 'no reason is known'}")


def describe_runs(runs: Sequence[RunDir]) -> list[dict[str, Any]]:
    """Runs as `--json` prints them: folder and status."""
    states = dispatch.states_now(runs)
    return [{"run": run.name, "run_dir": str(run.path), **state} for run, state in zip(runs, states, strict=True)]


def describe_run(run: RunDir) -> dict[str, Any]:
    """The same for one run."""
    return describe_runs([run])[0]
