"""This machine as a scheduler: a job script under a supervisor that cleans up after it, whatever ends it.

`python -m distft.schedulers.local RUN_DIR` supervises in the background (`launch --detach`).
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distft.errors import RunError
from distft.jobs.job import Job
from distft.runs import processes
from distft.runs.directory import FINISHED, RunDir
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
            f"exec {command_line(job.argv)}",
            "",
        ]
    )


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


def supervise(run: RunDir, watch: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run the job script to its end, calling `watch` while it runs. Returns the final status.

    After SIGINT, SIGTERM or SIGHUP a run that trains saves a checkpoint at its next step and ends; a second signal, or
    STOP_SECONDS, ends it at once. Whatever happens, no process is left behind and status.json tells the truth.

    Raises:
        RunError: the run failed or was cancelled; the message says why.
    """
    from distft.runs.failure import first_failure  # not while a script is only rendered
    from distft.schedulers.attempts import less_memory

    if run.read_status().get("state") == "cancelled":
        raise RunError("cancelled before it started")
    run.update_status(job_id=f"local:{os.getpid()}:{processes.start_time(os.getpid())}", started=time.time())
    received: list[int] = []
    with _signals(received.append):
        while True:
            returncode = _attempt(run, watch, received)
            if returncode == 0 or received or not run.recipe.exists():
                break
            failure = first_failure(run, returncode)
            if not failure.out_of_memory or less_memory(run, failure) is None:
                break
        return _conclude(run, returncode, received)


def _attempt(run: RunDir, watch: Callable[[], None], received: list[int]) -> int:
    """Run the job script to its end, or to the end that a signal puts to it."""
    with run.torchrun_log.open("ab") as log:
        process = subprocess.Popen(
            ["bash", str(run.script)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # the terminal's Ctrl-C comes to the supervisor alone
            preexec_fn=processes.die_with_parent,
            env={**os.environ, processes.RUN_VARIABLE: str(run.path)},
        )
        until = math.inf
        try:
            while process.poll() is None and len(received) < 2 and time.monotonic() < until:
                if received and until == math.inf:
                    if not run.recipe.exists():  # a script of one's own knows nothing of this
                        break
                    run.ask_to_stop(signal.Signals(received[0]).name)
                    until = time.monotonic() + STOP_SECONDS
                watch()
                time.sleep(processes.POLL_SECONDS)
        finally:
            processes.end(run.path, reap=process.poll)
            process.wait()
        watch()
        return process.returncode


def _conclude(run: RunDir, returncode: int, received: list[int]) -> dict[str, Any]:
    from distft.schedulers.attempts import conclude

    status = run.read_status()
    if received and status.get("state") != "completed" and not status.get("stopped"):
        reason = signal.Signals(received[0]).name
        run.update_status(state="cancelled", ended=time.time(), reason=reason)
        raise RunError(f"cancelled by {reason}")
    return conclude(run, returncode)


def state_now(run: RunDir) -> dict[str, Any]:
    """status.json, with the truth about a run whose supervisor was killed outright."""
    status = run.read_status()
    job_id = status.get("job_id") or ""
    if status.get("state") not in FINISHED and job_id.startswith("local:"):
        _, pid, started = job_id.split(":")
        if processes.start_time(int(pid)) != started:
            return status | {"state": "failed", "reason": "its launcher is gone (killed, or the machine restarted)"}
    return status


def cancel(run: RunDir) -> dict[str, Any]:
    """End a run that was started here and wait for it. Does nothing to one that has ended.

    Raises:
        RunError: it did not end.
    """
    status = state_now(run)
    if status.get("state") in FINISHED:
        return status
    if not status.get("job_id"):  # its supervisor is not up yet, or never came
        return run.update_status(state="cancelled", ended=time.time())
    _, pid, _ = status["job_id"].split(":")
    for _ in range(2):  # at once, without a checkpoint
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGTERM)
        time.sleep(processes.POLL_SECONDS)
    deadline = time.monotonic() + processes.TERM_SECONDS + processes.KILL_SECONDS + 5
    while time.monotonic() < deadline:
        status = state_now(run)
        if status.get("state") == "preempted":  # it had saved already
            return run.update_status(state="cancelled")
        if status.get("state") in FINISHED:
            return status
        time.sleep(processes.POLL_SECONDS)
    raise RunError(f"{run.path.name} did not end; its processes: {list(processes.of_run(run.path))}")


@contextlib.contextmanager
def _signals(receive: Callable[[int], None]) -> Iterator[None]:
    """Collect signals instead of dying of them, so that the clean-up is not cut short by a second Ctrl-C."""
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
