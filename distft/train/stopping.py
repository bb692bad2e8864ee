"""Being asked to stop: by the run's stop file (the launcher's Ctrl-C, the job script's trap) or by SIGTERM.

While a run starts up there is nothing to lose, and the rank ends at once. Once it trains, all ranks agree at the end of
a step, save, and exit cleanly.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from distft.runs.directory import RunDir
from distft.runs.failure import rank_errors
from distft.runs.stop_file import stop_asked

POLL_SECONDS = 0.5
UNWIND_SECONDS = 3  # for a rank stopped during start-up to remove temporary files; one that waits for others is killed


class Stopping:
    """Whether this rank was asked to stop. A rank makes it first of all, so nothing heavy is imported here."""

    def __init__(self, run: RunDir):
        self.run = run
        self.why: str | None = None
        self.handled = False  # the handler of SIGTERM has run
        self.training = False  # the training loop runs, and looks at `why` itself
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for jobs in the background
        awake, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        threading.Thread(target=self._wakened, args=(awake,), daemon=True, name="signals").start()
        threading.Thread(target=self._watch, daemon=True, name="stopping").start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.handled = True
        # torchrun sends SIGTERM to the other ranks when one fails, too: they would wait for it at the next step.
        if not self.training or self._lost_a_rank():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.why = self.why or signal.Signals(number).name

    def _lost_a_rank(self) -> bool:
        return bool(rank_errors(self.run)) or _siblings() < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def _wakened(self, awake: int) -> None:
        """Python runs no handler while the main thread is blocked, in CUDA or in a collective: a rank that waits there
        for a lost one would keep its GPU until torchrun kills it, 30 s later."""
        while number := os.read(awake, 1):
            if number[0] == signal.SIGTERM:
                time.sleep(UNWIND_SECONDS)
                if not self.handled and self._lost_a_rank():
                    os._exit(1)

    def _watch(self) -> None:
        while self.why is None:
            self.why = stop_asked(self.run)
            time.sleep(POLL_SECONDS)
        if self.training:
            return
        os.kill(os.getpid(), signal.SIGINT)  # unwinds the main thread
        time.sleep(UNWIND_SECONDS)
        if not self.training:
            os._exit(1)


def _siblings() -> int:
    """Live processes with the same parent as this one, including this one."""
    found = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
                found += state != "Z" and int(parent) == os.getppid()
    return found
