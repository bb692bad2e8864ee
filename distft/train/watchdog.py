"""A run that hangs: noticed, explained and ended, so that it can continue from its checkpoint.

One rank that is suspended or stuck keeps all others waiting in a collective: for ever on gloo, for minutes on NCCL.
Each rank times its own steps. When none ends for too long, the rank writes its stacks into its log and a note into
logs/. The rank that writes no note is the one that the others wait for.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque

from distft.errors import Hang
from distft.runs.directory import RunDir
from distft.train import worker

FACTOR = 20  # times the median step is too long
LEAST_SECONDS = 300.0  # never less; DISTFT_HANG_SECONDS replaces it
ANSWER_SECONDS = 5.0  # ranks notice within a step of each other
KNOWN_STEPS = 5  # for a median; the first steps compile and fill caches


class Watchdog:
    """Watches this rank from its first steps to `rest`. `hosts` has every rank's host, by rank."""

    def __init__(self, run: RunDir, rank: int, hosts: list[str]):
        self.run, self.rank, self.hosts = run, rank, hosts
        self.least = float(os.environ.get("DISTFT_HANG_SECONDS") or LEAST_SECONDS)
        self.steps: deque[float] = deque(maxlen=50)
        self.last: float | None = None  # time of the last sign of life; None while there is nothing to watch
        self.began = time.monotonic()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def step(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        self.steps.append(now - self.began)
        self.began = self.last = now

    def alive(self) -> None:
        """Work other than a step has progressed: a batch of the evaluation, a save."""
        if self.last is not None:
            self.last = time.monotonic()

    def rest(self) -> None:
        """No more steps will come: stop watching."""
        self.last = None

    def limit(self) -> float:
        """Seconds without a sign of life that count as a hang."""
        return max(self.least, FACTOR * statistics.median(self.steps))

    def _watch(self) -> None:
        while True:
            time.sleep(1)
            last = self.last
            if last is not None and len(self.steps) >= KNOWN_STEPS and time.monotonic() - last > self.limit():
                self._end(time.monotonic() - last)

    def _end(self, seconds: float) -> None:
        print(f"no step for {seconds:.0f} s; stacks of this rank:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        self.run.rank_note(self.rank).touch()
        time.sleep(ANSWER_SECONDS)
        noted = [rank for rank in range(len(self.hosts)) if self.run.rank_note(rank).exists()]
        if self.rank == noted[0]:
            usual = statistics.median(self.steps)
            silent = [rank for rank in range(len(self.hosts)) if rank not in noted]
            who, where = (silent[0], self.hosts[silent[0]]) if silent else (self.rank, "")
            why = (
                f"rank {', '.join(map(str, silent))} does not answer: suspended, or cut off from the network"
                if silent
                else "all ranks answer: their logs show where each of them waits"
            )
            error = Hang(f"no step for {seconds:.0f} s, when one usually takes {usual:.2g} s; {why}")
            worker.record_error(self.run, who, error, where)
        os._exit(1)
