"""What a run looks like while it runs: one live display on a terminal, plain lines elsewhere.

Reads only the run directory, so any run can be followed from any host that sees it.
"""

from __future__ import annotations

import codecs
import contextlib
import re
import time
import traceback
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from distft.runs.directory import RunDir
from distft.runs.files import BLOCK, read_blocks
from distft.runs.metrics import metrics_inode, read_metrics
from distft.runs.status import State, Status, read_status
from distft.units import GIB
from distft.views import summary

PLAIN_SECONDS = 5.0  # between two plain lines, at least; the last one is always shown
TRACEBACK = re.compile(r"^(\[rank\d+\]: *)?Traceback \(most recent call last\)", re.MULTILINE)
BEFORE, AFTER = "eval_loss_before", "eval_loss_after"


class Follower:
    """Shows what is new since the last `poll`. Use as a context manager.

    For a run that is `resumed`, what happened before is not shown again; nor are its warnings if it is `warned`.
    """

    def __init__(self, run: RunDir, console: Console, resumed: bool = False, warned: bool = False):
        self.run, self.console, self.warned = run, console, warned
        self.since = time.time() if resumed else 0.0
        self.offset, self.inode = 0, metrics_inode(run)
        self.first: dict[str, Any] = {}  # lines of metrics.jsonl; {} before there is one
        self.latest: dict[str, Any] = {}
        self.max_steps: int | None = None
        self.loss = "loss"
        self.shown_step, self.shown_at = 0, 0.0
        self.output = None if run.trains_recipe else ScriptOutput(run)
        self.shown = {BEFORE} if resumed else set()
        self.description = "starting"
        self.display: Progress | None = None
        self.broken = False

    def __enter__(self) -> Follower:
        if self.console.is_terminal:
            self.display = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[steps]}"),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                console=self.console,
                expand=True,
            )
            self.task = self.display.add_task("starting", total=None, steps="", numbers="")
            try:
                self.display.start()
            except (Exception, SystemExit) as error:
                self._give_up(error)
        return self

    def __exit__(self, *exception: object) -> None:
        self.poll(last=True)
        if self.display and not self.broken:
            self.display.stop()

    def poll(self, last: bool = False) -> None:
        """Read what is new and show it. Raises nothing: a display must not end the training that it shows."""
        if self.broken:
            return
        try:
            self._poll(last)
        except (Exception, SystemExit) as error:  # rich raises the latter where nobody reads its pipe
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        """Show nothing any more, and leave why in launcher.log."""
        self.broken = True
        self.console.quiet |= isinstance(error, (OSError, SystemExit))
        with contextlib.suppress(Exception, SystemExit):
            if self.display:
                self.display.stop()
        say(self.console, [f"warning: the display ended, the run goes on; why: {self.run.logs / 'launcher.log'}"])
        with contextlib.suppress(OSError):
            why = "".join(traceback.format_exception(error))
            with (self.run.logs / "launcher.log").open("a") as log:
                log.write(f"the display ended, the run goes on:\n{why}")

    def _poll(self, last: bool) -> None:
        status = read_status(self.run)
        self.max_steps, self.loss = status.max_steps, summary.loss_name(status.loss_type)
        self._read_metrics()
        if self.output:
            say(self.console, self.output.lines(last))
        if status.checkpoint_problem:
            self._once(status.checkpoint_problem, f"warning: {status.checkpoint_problem}")
        for text in () if self.warned else status.warnings:
            self._once(text, f"warning: {text}")
        if self.display is None:
            if status.eval_loss_before is not None:
                self._once(BEFORE, f"eval loss before training: {status.eval_loss_before:.4f}")
            self._print_step(last)
            if status.eval_loss_after is not None:
                self._once(AFTER, f"eval loss after training: {status.eval_loss_after:.4f}")
            return
        description, step = self.description, self.latest.get("step", 0)
        if self.output:
            step = status.step or 0
        if step:
            description = "saving" if step == self.max_steps else "training"
        elif status.state is State.RUNNING and self.max_steps:
            description = "loading"
        self.display.update(
            self.task,
            description=description,
            total=self.max_steps,
            # Never quite full: rich stops the clock and the spinner at the end, and evaluation and saving follow.
            completed=step * 0.999,
            steps=f"{step}/{self.max_steps}" if step else "",
            numbers=self._numbers() if self.latest else "",
        )

    def _read_metrics(self) -> None:
        inode = metrics_inode(self.run)
        if inode != self.inode:  # a run that continues from a checkpoint replaces the file
            self.inode, self.offset, self.first, self.latest, self.shown_step = inode, 0, {}, {}, 0
        while True:
            lines, self.offset = read_metrics(self.run.metrics, self.offset, BLOCK)
            if not lines:
                return
            if new := [line for line in lines if line["time"] >= self.since]:
                self.first, self.latest = self.first or new[0], new[-1]

    def waiting(self, status: Status) -> None:
        """Show a run that does not train yet: queued and why, or its nodes being checked."""
        if self.latest or status.state is None or status.finished:
            return
        text = "queued" if status.state is State.QUEUED else f"started on {status.nodes or 'its nodes'}"
        if status.reason:
            text += f": {status.reason}"
        if status.expected_start:
            text += f", expected to start {status.expected_start}"
        self.description = text
        if self.display is None:
            self._once(text, text)

    def _once(self, key: str, line: str) -> None:
        if key not in self.shown:
            self.shown.add(key)
            say(self.console, [line])

    def _print_step(self, last: bool) -> None:
        step, now = self.latest.get("step", 0), time.monotonic()
        if step > self.shown_step and (last or step == self.max_steps or now - self.shown_at >= PLAIN_SECONDS):
            self.shown_step, self.shown_at = step, now
            say(self.console, [f"step {step}/{self.max_steps}  {self._numbers()}"])

    def _numbers(self) -> str:
        first, latest = self.first, self.latest
        parts = [
            f"{self.loss} {latest['loss']:.4f}",
            f"{latest['tokens_per_second']:,.0f} tok/s",
            f"{latest['peak_memory_bytes'] / GIB:.1f} GiB",
        ]
        if latest["step"] > first["step"] and self.max_steps:
            seconds = (latest["time"] - first["time"]) / (latest["step"] - first["step"])
            parts.append(f"{clock(seconds * (self.max_steps - latest['step']))} left")
        return "  ".join(parts)


class ScriptOutput:
    """What rank 0 of a user's script prints, while it runs."""

    def __init__(self, run: RunDir):
        self.run, self.offset, self.rest, self.failed = run, 0, "", False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def lines(self, last: bool) -> list[str]:
        """The lines that ended since the last call; at the `last` one, also one that has not ended.

        Nothing from the traceback of a failed rank on: at the end that of the first one is shown.
        """
        log, text = self.run.rank_log(0), self.rest
        if self.failed or not log.exists():
            return []
        failed = self.run.rank_error(0).exists()  # written before the traceback is printed
        for block in read_blocks(log, self.offset):
            self.offset += len(block)
            text += self.decoder.decode(block)
        if failed and (found := TRACEBACK.search(text)):
            self.failed, text = True, text[: found.start()]
        *lines, self.rest = text.split("\n")
        if (last or self.failed) and self.rest:
            lines.append(self.rest)
        return [line.rstrip("\r").rpartition("\r")[2] for line in lines]  # a progress bar: what it showed last


def clock(seconds: float) -> str:
    """Seconds as people read them: 0:07, 12:30, 3:05:00."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(console: Console, lines: Iterable[str]) -> None:
    """Print lines as they are: no markup, no highlighting, not cut to the window. Where they cannot be written (a pipe
    that nobody reads, a full disk), nothing is printed any more."""
    try:
        for line in lines:
            style = "yellow" if line.startswith("warning:") else None
            console.print(line, highlight=False, markup=False, soft_wrap=True, style=style)
    except (OSError, SystemExit):
        console.quiet = True
