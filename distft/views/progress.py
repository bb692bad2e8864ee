"""What a run looks like while it goes: one live display on a terminal, plain lines elsewhere.

Reads the run directory alone, so that any run can be followed from anywhere that sees it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from distft.runs.directory import BLOCK, RunDir, read_metrics
from distft.units import GIB

PLAIN_SECONDS = 5.0  # at most one plain line in so many seconds, and always the last one


class Follower:
    """Shows what has come since the last `poll`. Use as a context manager.

    Of a run that `resumed`, what was before is known.
    """

    def __init__(self, run: RunDir, console: Console, resumed: bool = False):
        self.run, self.console = run, console
        self.since = time.time() if resumed else 0.0
        self.offset, self.latest, self.shown_step, self.shown_at = 0, {}, 0, 0.0
        self.first: dict[str, Any] | None = None
        self.file: int | None = None
        self.max_steps: int | None = None
        self.said: set[str] = {"eval_loss_before"} if resumed else set()
        self.description = "starting"
        self.display: Progress | None = None

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
            self.display.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.poll(last=True)
        if self.display:
            self.display.stop()

    def poll(self, last: bool = False) -> None:
        """Read what is new and show it."""
        status = self.run.read_status()
        self.max_steps = status.get("max_steps")
        if (file := self.run.metrics_file()) != self.file:  # a run that goes on from a checkpoint writes it anew
            self.file, self.offset, self.first = file, 0, None
        lines, self.offset = read_metrics(self.run.metrics, self.offset, BLOCK)
        while lines:
            if new := [line for line in lines if line["time"] >= self.since]:
                self.first, self.latest = self.first or new[0], new[-1]
            lines, self.offset = read_metrics(self.run.metrics, self.offset, BLOCK)
        if (problem := status.get("checkpoint_problem")) and problem not in self.said:
            self.said.add(problem)
            say(self.console, [f"warning: {problem}"])
        if self.display is None:
            self._milestone("eval_loss_before", status, "eval loss before training: {:.4f}")
            self._print_step(last)
            self._milestone("eval_loss_after", status, "eval loss after training: {:.4f}")
            return
        description, step = self.description, self.latest.get("step", 0)
        if step:
            description = "saving" if step == self.max_steps else "training"
        elif status.get("state") == "running" and status.get("max_steps"):
            description = "loading"
        self.display.update(
            self.task,
            description=description,
            total=self.max_steps,
            # Never quite full: rich stops the clock and the spinner at the end, and evaluation and saving come then.
            completed=step * 0.999,
            steps=f"{step}/{self.max_steps}" if step else "",
            numbers=self._numbers() if self.latest else "",
        )

    def waiting(self, status: dict[str, Any]) -> None:
        """Show a run that has not begun to train: queued and why, or its nodes being checked."""
        if self.latest or status.get("state") not in ("queued", "running"):
            return
        text = "queued" if status["state"] == "queued" else f"started on {status.get('nodes') or 'its nodes'}"
        if status.get("reason"):
            text += f": {status['reason']}"
        if status.get("expected_start"):
            text += f", expected to start {status['expected_start']}"
        self.description = text
        if self.display is None and text not in self.said:
            self.said.add(text)
            say(self.console, [text])

    def _milestone(self, key: str, status: dict[str, Any], text: str) -> None:
        if status.get(key) is not None and key not in self.said:
            self.said.add(key)
            say(self.console, [text.format(status[key])])

    def _print_step(self, last: bool) -> None:
        step, now = self.latest.get("step", 0), time.monotonic()
        if step > self.shown_step and (last or step == self.max_steps or now - self.shown_at >= PLAIN_SECONDS):
            self.shown_step, self.shown_at = step, now
            say(self.console, [f"step {step}/{self.max_steps}  {self._numbers()}"])

    def _numbers(self) -> str:
        m = self.latest
        parts = [
            f"loss {m['loss']:.4f}",
            f"{m['tokens_per_second']:,.0f} tok/s",
            f"{m['peak_memory_bytes'] / GIB:.1f} GiB",
        ]
        if m["step"] > self.first["step"] and self.max_steps:
            seconds = (m["time"] - self.first["time"]) / (m["step"] - self.first["step"])
            parts.append(f"{clock(seconds * (self.max_steps - m['step']))} left")
        return "  ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as people read them: 0:07, 12:30, 3:05:00."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(console: Console, lines: Iterable[str]) -> None:
    """Lines as they are: no markup, no highlighting, not cut to the window."""
    for line in lines:
        style = "yellow" if line.startswith("warning:") else None
        console.print(line, highlight=False, markup=False, soft_wrap=True, style=style)
