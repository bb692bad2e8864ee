"""This machine as a scheduler: a job script under a supervisor that cleans up after it, whatever ends it.

`python -m distft.schedulers.local RUN_DIR` is the supervisor in the background (`launch --detach`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from distft.errors import RunError
from distft.jobs.job import Job
from distft.runs import processes
from distft.runs.directory import PLAN, RunDir
from distft.runs.status import State, Status, read_status, update_status
from distft.runs.stop_file import ask_to_stop
from distft.schedulers.launcher import Heart, Launcher
from distft.shell import command_line, quote

STOP_SECONDS = 30  # as SLURM's KillWait


def render(job: Job) -> str:
    """The job script. Pure: the same job gives the same text."""
    exports = [f"export {name}={quote(value)}" for name, value in sorted(job.env.items())]
    if job.topology.nnodes > 1:  # what differs from node to node
        exports += [
            'export PET_NODE_RANK="${NODE_RANK:?}"',
            'export PET_RDZV_ENDPOINT="${HEAD:?HOST:PORT of node 0}"',
            f"export PET_RDZV_ID={quote(job.run.path.name)}",
        ]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# distft run {job.name}: starts every rank on this machine and waits for them.",
            "set -euo pipefail",
            *exports,
            f"{command_line([job.argv[0], '-m', 'distft.hardware.here', str(_gpus(job))])} || exit 2",
            f"exec {command_line(job.argv)}",
            "",
        ]
    )


def _gpus(job: Job) -> int:
    """The GPUs that the ranks of a node were planned for; 0 for CPU ranks."""
    topology = json.loads(job.files[PLAN])["topology"]
    return job.topology.nproc_per_node if topology["gpu"] else 0


def detach(run: RunDir) -> None:
    """Start a supervisor that outlives this process."""
    with (run.logs / "launcher.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "distft.schedulers.local", str(run.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def supervise(run: RunDir, watch: Callable[[], None] = lambda: None) -> Status:
    """Run the job script to its end, calling `watch` while it runs. Returns the final status.

    After SIGINT, SIGTERM or SIGHUP, a run that trains saves a checkpoint at its next step and ends; a second signal, or
    STOP_SECONDS, ends it at once. Whatever happens, no process is left behind and status.json tells the truth.

    Raises:
        RunError: the run failed, was stopped or cancelled; the message says why.
    """
    from distft.runs.failure import first_failure  # not while a script is only rendered
    from distft.schedulers.attempts import less_memory

    if read_status(run).state is State.CANCELLED:
        raise RunError("cancelled before it started")
    received: list[int] = []
    with Heart(run) as heart, _signals(received.append):
        update_status(run, job_id=Launcher.this().job_id, started=time.time())

        def look() -> None:
            heart.beat()
            watch()

        while True:
            returncode = _attempt(run, look, received)
            if not run.path.is_dir():
                raise RunError(f"{run.path} was removed while the run trained; nothing is left of it")
            if returncode == 0 or received or not run.trains_recipe:
                break
            failure = first_failure(run, returncode)
            if not (failure.out_of_memory and less_memory(run, failure)):
                break
        return _conclude(run, returncode, received)


def _attempt(run: RunDir, watch: Callable[[], None], received: list[int]) -> int:
    """Run the job script to its end, or until a signal ends it."""
    with run.torchrun_log.open("ab") as log:
        process = subprocess.Popen(
            ["bash", str(run.script)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # the terminal's Ctrl-C reaches the supervisor only
            preexec_fn=processes.die_with_parent,
            env={**os.environ, processes.RUN_VARIABLE: str(run.path)},
        )
        until = math.inf
        try:
            while process.poll() is None and len(received) < 2 and time.monotonic() < until:
                if received and until == math.inf:
                    if not run.trains_recipe:  # a user's script does not read the stop file
                        break
                    ask_to_stop(run, signal.Signals(received[0]).name)
                    until = time.monotonic() + STOP_SECONDS
                watch()
                time.sleep(processes.POLL_SECONDS)
        finally:
            processes.end(run.path, reap=process.poll)
            process.wait()
        watch()
        return process.returncode


def _conclude(run: RunDir, returncode: int, received: list[int]) -> Status:
    from distft.schedulers.attempts import conclude

    status = read_status(run)
    if received and status.state is not State.COMPLETED and not status.stop_reason:
        reason = signal.Signals(received[0]).name
        update_status(run, state=State.CANCELLED, ended=time.time(), reason=reason)
        raise RunError(f"cancelled by {reason}")
    return conclude(run, returncode)


def status_now(run: RunDir) -> Status:
    """status.json, corrected for a run whose launcher is gone; where it is on another host, with that host's name."""
    status = read_status(run)
    launcher = Launcher.of(status.job_id or "")
    if launcher is None or status.finished:
        return status
    if why := launcher.gone(run):
        return replace(status, state=State.FAILED, reason=why)
    return status if launcher.is_here else replace(status, reason=f"on {launcher.host}, as seen from its files")


def cancel(run: RunDir) -> Status:
    """End a run that was started here and wait for it; one that has ended stays as it is.

    Raises:
        RunError: it runs on another host, or did not end.
    """
    status = status_now(run)
    if status.finished:
        return status
    launcher = Launcher.of(status.job_id or "")
    if launcher is None:  # it is not up yet, or never came
        return update_status(run, state=State.CANCELLED, ended=time.time())
    if not launcher.is_here:
        raise RunError(f"{run.path.name} runs on {launcher.host}, and cannot be ended from here: run cancel there")
    for _ in range(2):  # twice: at once, without a checkpoint
        with contextlib.suppress(ProcessLookupError):
            os.kill(launcher.pid, signal.SIGTERM)
        time.sleep(processes.POLL_SECONDS)
    deadline = time.monotonic() + processes.TERM_SECONDS + processes.KILL_SECONDS + 5
    while time.monotonic() < deadline:
        status = status_now(run)
        if status.state is State.STOPPED:  # it had saved already
            return update_status(run, state=State.CANCELLED)
        if status.finished:
            return status
        time.sleep(processes.POLL_SECONDS)
    raise RunError(f"{run.path.name} did not end; its processes: {list(processes.of_run(run.path))}")


@contextlib.contextmanager
def _signals(receive: Callable[[int], None]) -> Iterator[None]:
    """Collect signals instead of dying from them, so that a second Ctrl-C does not cut the clean-up short."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, frame: receive(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    try:
        supervise(RunDir(Path(sys.argv[1])))
    except RunError as error:
        sys.exit(str(error))
