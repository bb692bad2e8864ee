"""A run that hangs: noticed, explained and ended, so that it can continue from its checkpoint.

One rank that is suspended or stuck keeps all others waiting in a collective: for ever on gloo, for minutes on NCCL.
Each rank times its own steps. When none ends for too long, the rank writes its stacks into its log and a note into
logs/, with the collective that it is in. The rank that writes no note is the one that the others wait for, or the one
that has not entered the collective that others are in.
"""

from __future__ import annotations

import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections import deque

from distft.errors import Hang
from distft.runs.directory import RunDir
from distft.runs.files import write_atomically
from distft.train import collectives, worker

FACTOR = 20  # times the median step is too long
LEAST_SECONDS = 300.0  # never less; DISTFT_HANG_SECONDS replaces it
START_SECONDS = 3600.0  # to load the model, and for each of the first steps; DISTFT_HANG_START_SECONDS replaces it
ANSWER_SECONDS = 5.0  # ranks notice within a step of each other
KNOWN_STEPS = 5  # for a median; the first steps compile and fill caches


class Watchdog:
    """Watches this rank from now on to `rest`. `hosts` has every rank's host, by rank."""

    def __init__(self, run: RunDir, rank: int, hosts: list[str]):
        self.run, self.rank, self.hosts = run, rank, hosts
        self.least = float(os.environ.get("DISTFT_HANG_SECONDS") or LEAST_SECONDS)
        self.start = float(os.environ.get("DISTFT_HANG_START_SECONDS") or START_SECONDS)
        self.steps: deque[float] = deque(maxlen=50)
        self.began = time.monotonic()
        self.last: float | None = self.began  # time of the last sign of life; None while there is nothing to watch
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
        if len(self.steps) < KNOWN_STEPS:
            return self.start
        return max(self.least, FACTOR * statistics.median(self.steps))

    def _watch(self) -> None:
        while True:
            time.sleep(1)
            last = self.last
            if last is not None and time.monotonic() - last > self.limit():
                self._end(time.monotonic() - last)

    def _end(self, seconds: float) -> None:
        print(f"no step for {seconds:.0f} s; stacks of this rank:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        write_atomically(self.run.rank_note(self.rank), json.dumps(collectives.newest()))
        time.sleep(ANSWER_SECONDS)
        noted = [rank for rank in range(len(self.hosts)) if self.run.rank_note(rank).exists()]
        if self.rank == noted[0]:
            who, why = self._explain(noted)
            usual = f", when one usually takes {statistics.median(self.steps):.2g} s" if self.steps else ""
            error = Hang(f"no step for {seconds:.0f} s{usual}; {why}")
            worker.record_error(
                self.run, self.rank if who is None else who, error, "" if who is None else self.hosts[who]
            )
        os._exit(1)

    def _explain(self, noted: list[int]) -> tuple[int | None, str]:
        """The rank to blame, if there is one, and why."""
        notes = {rank: json.loads(self.run.rank_note(rank).read_text()) for rank in noted}
        known = {rank: {name: collectives.Last(*last) for name, last in note.items()} for rank, note in notes.items()}
        if silent := [rank for rank in range(len(self.hosts)) if rank not in noted]:
            return silent[0], f"{_ranks(silent)} does not answer: suspended, or cut off from the network"
        if found := collectives.behind(known):
            late, where = found
            return late[0], f"{_ranks(late)} did not enter {where}, in which others wait: its log shows where it is"
        return None, "all ranks answer, and none is behind: their logs show where each of them waits"


def _ranks(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
