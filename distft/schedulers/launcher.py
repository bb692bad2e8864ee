"""Who launched a run on this or another machine, as job_id in status.json has it, and whether it is alive.

local:PID:START:HOST:BOOT.NAMESPACE. A process id means nothing on another host, after a restart, or in another
container: there, only the file that a launcher touches (RunDir.launcher_alive) tells.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from distft.runs import processes
from distft.runs.directory import RunDir
from distft.runs.status import LOCAL
from distft.units import plural

BEAT_SECONDS = 5
SILENT_SECONDS = 180  # clocks of hosts differ, and file systems show each other's changes late
JOB_ID = re.compile(rf"{LOCAL}(\d+):(\w+)(?::([^:]*):([^:]*))?")


@cache
def place() -> str:
    """This host since it was started, and the processes that are seen here: containers have their own."""
    boot, namespace = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = "".join(filter(str.isdigit, str(Path("/proc/self/ns/pid").readlink())))
    return f"{boot}.{namespace}"


@dataclass(frozen=True)
class Launcher:
    """A process that supervises a run."""

    pid: int
    started: str  # in clock ticks since boot
    host: str = ""  # "" and `place` "": of an earlier version, which were taken to be here
    place: str = ""

    @classmethod
    def this(cls) -> Launcher:
        """This process."""
        host = socket.gethostname().replace(":", "-")
        return cls(os.getpid(), processes.start_time(os.getpid()) or "", host, place())

    @classmethod
    def of(cls, job_id: str) -> Launcher | None:
        """None where the job id is none of a launcher's."""
        found = JOB_ID.fullmatch(job_id)
        return cls(int(found[1]), found[2], found[3] or "", found[4] or "") if found else None

    @property
    def job_id(self) -> str:
        return f"{LOCAL}{self.pid}:{self.started}:{self.host}:{self.place}"

    @property
    def is_here(self) -> bool:
        """Whether its process could be seen from here."""
        return self.place in ("", place())

    def gone(self, run: RunDir) -> str | None:
        """Why it is not alive any more, None while it is."""
        if self.is_here:
            alive = processes.start_time(self.pid) == self.started
            return None if alive else "its launcher is gone (killed, or the machine restarted)"
        try:
            file = run.launcher_alive if run.launcher_alive.exists() else run.status  # it took it away and said no more
            silent = time.time() - file.stat().st_mtime
        except OSError:
            return None  # the folder cannot be read
        minutes = plural(int(silent / 60), "minute")
        return f"its launcher on {self.host} shows no sign of life for {minutes}" if silent > SILENT_SECONDS else None


class Heart:
    """Touches the file that shows others that this launcher is alive, until the run has ended."""

    def __init__(self, run: RunDir):
        self.file, self.beaten = run.launcher_alive, 0.0

    def beat(self) -> None:
        """Cheap: it does so every BEAT_SECONDS only. A full disk or a folder that is gone is for others to find."""
        if time.monotonic() - self.beaten >= BEAT_SECONDS:
            self.beaten = time.monotonic()
            with contextlib.suppress(OSError):
                self.file.touch()

    def __enter__(self) -> Heart:
        self.beat()
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):
            self.file.unlink(missing_ok=True)
