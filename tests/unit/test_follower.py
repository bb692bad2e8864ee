"""The display of a run, which ends no training, whatever happens to it (views/progress.py)."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distft.runs.directory import RunDir
from distft.runs.status import State, update_status
from distft.views.progress import Follower, say


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir.create(str(tmp_path), "run")
    made.recipe.write_text("name: run\n")
    update_status(made, state=State.RUNNING, max_steps=10)
    return made


def write_steps(run: RunDir, *steps: int) -> None:
    line: dict[str, Any] = {"loss": 2.0, "tokens_per_second": 10.0, "peak_memory_bytes": 2**30, "time": 1.0}
    new = run.metrics.with_name("new")
    new.write_text("".join(json.dumps(line | {"step": step, "time": 100.0 + step}) + "\n" for step in steps))
    new.replace(run.metrics)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_that_begins_anew_after_it_ran_out_of_memory(run: RunDir, terminal: bool) -> None:
    """Its metrics.jsonl is empty for a while."""
    shown = io.StringIO()
    with Follower(run, Console(file=shown, force_terminal=terminal, width=100)) as follower:
        write_steps(run, 1, 2)
        follower.poll(last=True)
        write_steps(run)
        follower.poll(last=True)
        assert not follower.latest
        write_steps(run, 1)
        follower.poll(last=True)
        assert follower.latest["step"] == 1
    assert not follower.broken
    assert "step 2/10" in shown.getvalue() or terminal


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_that_cannot_be_written(run: RunDir, terminal: bool) -> None:
    follower = Follower(run, Console(file=Broken(), force_terminal=terminal))
    write_steps(run, 1)
    with follower:
        follower.poll(last=True)
        follower.poll(last=True)
    say(follower.console, ["done"])


def test_a_pipe_that_nobody_reads(run: RunDir) -> None:
    """`distft launch recipe.yaml | head -1`: rich ends the program there."""
    reader, writer = os.pipe()
    os.close(reader)
    before = os.dup(1)
    try:
        with open(writer, "w") as pipe, Follower(run, Console(file=pipe)) as follower:
            write_steps(run, 1)
            follower.poll(last=True)
            follower.poll(last=True)
            pipe.close() if not pipe.closed else None
    except BrokenPipeError:
        pass  # of the file's own close
    finally:
        os.dup2(before, 1)  # rich sends stdout to /dev/null
        os.close(before)
    assert follower.console.quiet


def test_what_is_odd_is_left_in_the_log(run: RunDir) -> None:
    run.metrics.write_text('{"step": 1, "time": 3.0}\n')  # of nothing that is known here
    shown = io.StringIO()
    with Follower(run, Console(file=shown)) as follower:
        follower.poll(last=True)
    assert follower.broken and "the display ended, the run goes on" in shown.getvalue()
    said = (run.logs / "launcher.log").read_text()
    assert said.startswith("the display ended, the run goes on:") and "KeyError" in said


def test_a_run_directory_that_is_gone(run: RunDir) -> None:
    with Follower(run, Console(file=io.StringIO())) as follower:
        shutil.rmtree(run.path)
        follower.poll(last=True)
