"""Who launched a run, and whether it is alive: here, on another host, in another container, after a restart."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from distft.errors import RunError
from distft.runs.directory import RunDir
from distft.runs.status import State, read_status, update_status
from distft.schedulers import local
from distft.schedulers.launcher import SILENT_SECONDS, Heart, Launcher


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    return RunDir(tmp_path / "run")


def started_by(run: RunDir, launcher: Launcher) -> None:
    update_status(run, state=State.RUNNING, job_id=launcher.job_id)


ELSEWHERE = replace(Launcher.this(), host="login1", place="another-boot.1")


def test_a_job_id_says_where() -> None:
    this = Launcher.this()
    assert Launcher.of(this.job_id) == this
    assert this.is_here and not ELSEWHERE.is_here
    assert Launcher.of("local:12:345") == Launcher(12, "345")  # of an earlier version
    assert [Launcher.of(text) for text in ("", "1234", "local:x:y", "local:1")] == [None] * 4


def test_alive_here_and_gone(run: RunDir) -> None:
    started_by(run, Launcher.this())
    assert local.status_now(run).state is State.RUNNING
    started_by(run, replace(Launcher.this(), started="1"))  # another process has that id now
    status = local.status_now(run)
    assert (status.state, status.reason) == (State.FAILED, "its launcher is gone (killed, or the machine restarted)")


def test_another_host_is_believed_while_it_shows_life(run: RunDir) -> None:
    started_by(run, ELSEWHERE)
    Heart(run).beat()
    status = local.status_now(run)
    assert (status.state, status.reason) == (State.RUNNING, "on login1, as seen from its files")
    before = run.status.read_bytes()
    with pytest.raises(RunError, match="runs on login1, and cannot be ended from here: run cancel there"):
        local.cancel(run)
    long_ago = time.time() - SILENT_SECONDS - 120
    os.utime(run.launcher_alive, (long_ago, long_ago))
    status = local.status_now(run)
    assert (status.state, status.reason) == (
        State.FAILED,
        "its launcher on login1 shows no sign of life for 5 minutes",
    )
    assert run.status.read_bytes() == before  # who looks writes nothing
    run.launcher_alive.unlink()
    assert local.status_now(run).state is State.RUNNING  # status.json is new
    os.utime(run.status, (long_ago, long_ago))
    assert local.status_now(run).state is State.FAILED


def test_a_heart_beats_now_and_then(run: RunDir) -> None:
    heart = Heart(run)
    heart.beat()
    os.utime(run.launcher_alive, (1, 1))
    heart.beat()
    assert run.launcher_alive.stat().st_mtime == 1
    heart.beaten -= 60
    heart.beat()
    assert run.launcher_alive.stat().st_mtime > 1
    run.launcher_alive.unlink()
    run.logs.rmdir()
    heart.beaten -= 60
    heart.beat()  # a folder that is gone is no news to it
    assert read_status(run).state is None
