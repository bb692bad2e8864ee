"""Following a run to its end, and what `--json` prints of runs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.errors import RunError
from distft.runs.directory import RunDir
from distft.runs.files import read_blocks
from distft.runs.status import State, Status, job_ids, read_status
from distft.schedulers import dispatch, slurm
from distft.shell import quote
from distft.views import summary

if TYPE_CHECKING:
    from rich.console import Console

FOLLOW_SECONDS = 0.3  # between two looks at the files of a run
FIRST_SECONDS = 1.0
SLURM_SECONDS = 15.0  # the longest between two questions to SLURM: controllers suffer from frequent ones
GROWTH = 1.3


class Pace:
    """When to ask about a run again: SLURM less and less often."""

    def __init__(self, on_slurm: bool = True) -> None:
        self.asked, self.wait = -math.inf, FIRST_SECONDS
        self.longest = SLURM_SECONDS if on_slurm else FIRST_SECONDS

    def is_due(self) -> bool:
        return time.monotonic() - self.asked >= self.wait

    def just_asked(self) -> None:
        self.asked, self.wait = time.monotonic(), min(self.wait * GROWTH, self.longest)


def follow(run: RunDir, console: Console, resumed: bool = False, warned: bool = False) -> None:
    """Show a run of SLURM's to its end; its warnings too, unless `warned`. Ctrl-C leaves the job alone.

    Raises:
        RunError: the run did not complete.
    """
    from distft.runs.failure import first_failure
    from distft.views.progress import Follower, say

    pace = Pace()
    try:
        with Follower(run, console, resumed, warned) as follower:
            while True:
                if pace.is_due() or read_status(run).finished:
                    status = slurm.status_now(run)
                    pace.just_asked()
                    follower.waiting(status)
                    if status.finished:
                        break
                follower.poll()
                time.sleep(FOLLOW_SECONDS)
    except KeyboardInterrupt:
        name = quote(str(run.path))
        job = f"job {job_ids(run)[-1]} keeps running"
        say(console, [f"{job}; follow it again with: distft logs -f {name}; end it with: distft cancel {name}"])
        raise SystemExit(130) from None
    if status.state is State.COMPLETED:
        say(console, summary.result_lines(run))
    elif status.exit_status:  # the run itself wrote how it ended
        raise RunError(first_failure(run, status.exit_status).text)
    else:
        raise RunError(f"{status.state}: {status.reason or 'no reason is known'}")


def follow_log(run: RunDir, path: Path, to_the_end: bool) -> Iterator[bytes]:
    """What is in a log of a run, in blocks; `to_the_end` of the run, also what is written to it meanwhile."""
    offset, pace = 0, Pace(on_slurm=bool(job_ids(run)))
    while True:
        status = read_status(run)
        if not status.finished and pace.is_due():
            status = dispatch.status_now(run)
            pace.just_asked()
        if path.exists():
            for block in read_blocks(path, offset):
                offset += len(block)
                yield block
        if not to_the_end or status.finished:
            return
        time.sleep(FOLLOW_SECONDS)


def described(run: RunDir, status: Status) -> dict[str, Any]:
    """A run as `--json` prints it: its name, its folder and its status."""
    return {"run": run.name, "run_dir": str(run.path), **status.to_json()}


def describe_runs(runs: Sequence[RunDir]) -> list[dict[str, Any]]:
    """Runs as `--json` prints them. SLURM is asked once for all."""
    return [described(run, status) for run, status in zip(runs, dispatch.statuses_now(runs), strict=True)]


def describe_run(run: RunDir) -> dict[str, Any]:
    """The same for one run."""
    return describe_runs([run])[0]
