"""The processes of a run on this machine: found by a variable that they inherit, and all of them ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

RUN_VARIABLE = "DISTFT_RUN_DIR"
POLL_SECONDS = 0.2
# torchrun forwards SIGTERM and waits up to 30 s for its ranks; people wait for 10 s at most.
TERM_SECONDS = 6
KILL_SECONDS = 3
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent is gone, however the parent ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start_time(pid: int) -> str | None:
    """When a live process started, in clock ticks since boot (proc(5), field 22): pids are used again."""
    fields = _stat(Path(f"/proc/{pid}"))
    return fields[19] if fields else None


def of_run(run_dir: Path) -> Iterator[int]:
    """Every live process of a run except this one. Ranks have their own sessions: no process group holds them all."""
    mark = f"{RUN_VARIABLE}={run_dir}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended, or belongs to another user
                if mark in (entry / "environ").read_bytes().split(b"\0") and _stat(entry):
                    yield int(entry.name)


def end(run_dir: Path, reap: Callable[[], object]) -> None:
    """Send SIGTERM, then SIGKILL, to every process of a run, until none is left. `reap` collects our child's status."""
    for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        for pid in of_run(run_dir):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            reap()
            if not any(of_run(run_dir)):
                return
            time.sleep(POLL_SECONDS)


def _stat(entry: Path) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None for a process that is gone or a zombie."""
    try:
        fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields
