"""What a run that trains writes into status.json."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

from distft.runs.directory import RunDir
from distft.runs.status import read_status, update_status
from distft.train import worker

SECONDS_BETWEEN_STEPS = 1.0  # at least: not every step of a small model is worth a write


class StatusWriter:
    """Writes status.json from the first rank; on the others every method does nothing.

    `owner` names this attempt. SLURM may give up a node that still runs and start the job elsewhere: the newest
    attempt owns the run, and any other ends its process as soon as it would write.
    """

    def __init__(self, run: RunDir, rank: int):
        self.run, self.writes = run, rank == 0
        self.owner = f"{worker.host()} {os.getpid()} {time.time()}"
        self._last_step = 0.0

    def begin(self, **fields: Any) -> None:
        """Take over the run.

        Raises:
            OSError: status.json cannot be written.
        """
        if self.writes:
            update_status(self.run, owner=self.owner, **fields)

    def owns(self) -> bool:
        """Whether this attempt is the run's newest. On the first rank."""
        try:
            return read_status(self.run).owner in (None, self.owner)
        except OSError:  # a network file system that is away for a moment
            return True

    def write(self, **fields: Any) -> None:
        """Write what must not be lost.

        Raises:
            OSError: status.json cannot be written.
        """
        if not self.writes:
            return
        if not self.owns():
            # No error file: it would be taken for the other attempt's.
            print("another attempt has taken over this run; this one exits", file=sys.stderr, flush=True)
            os._exit(1)
        update_status(self.run, **fields)

    def update(self, **fields: Any) -> None:
        """Write what may be lost: a full disk may have room again later, and a save that fails reports it."""
        with contextlib.suppress(OSError):
            self.write(**fields)

    def step(self, step: int) -> None:
        """Write the step, unless one was written a moment ago."""
        now = time.perf_counter()
        if now - self._last_step > SECONDS_BETWEEN_STEPS:
            self.update(step=step)
            self._last_step = now
