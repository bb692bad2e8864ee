"""What ranks write about a run: errors, and the status of the newest attempt alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distft.errors import DataError, Hang, RunError
from distft.runs.directory import RunDir
from distft.runs.failure import rank_errors
from distft.runs.status import read_status
from distft.train.status import StatusWriter
from distft.train.worker import record_error


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(str(tmp_path), "run")


@pytest.mark.parametrize(
    ("error", "by_the_user"),
    [
        (DataError("rows.jsonl:7: not JSON"), True),
        (RunError("what was saved is not what was trained"), True),
        (Hang("no step for 300 s"), False),  # a machine's fault, which another attempt may not meet
        (RuntimeError("CUDA error"), False),
    ],
)
def test_an_error_says_whether_only_the_user_can_fix_it(run: RunDir, error: Exception, by_the_user: bool) -> None:
    record_error(run, 3, error, where="node7")
    (found,) = rank_errors(run)
    assert (found["rank"], found["host"], found["user_error"]) == (3, "node7", by_the_user)
    assert (found["type"], found["message"]) == (type(error).__name__, str(error))


def test_the_newest_attempt_owns_the_status(run: RunDir) -> None:
    first, other_rank, second = StatusWriter(run, rank=0), StatusWriter(run, rank=1), StatusWriter(run, rank=0)
    first.begin()
    first.write(step=3)
    other_rank.write(step=99)
    assert (read_status(run).step, first.owns()) == (3, True)
    second.begin()
    assert (first.owns(), second.owns()) == (False, True)
    second.write(step=4)
    assert read_status(run).step == 4


def test_an_attempt_that_was_replaced_exits(run: RunDir) -> None:
    code = (
        "import sys; from pathlib import Path; from distft.runs.directory import RunDir\n"
        "from distft.runs.status import update_status; from distft.train.status import StatusWriter\n"
        "run = RunDir(Path(sys.argv[1])); writer = StatusWriter(run, 0); writer.begin(); writer.write(step=1)\n"
        "update_status(run, owner='another'); writer.update(step=2); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "another attempt has taken over this run" in done.stderr
    assert read_status(run).step == 1


def test_a_full_disk_costs_only_what_may_be_lost(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.train import status

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    writer = StatusWriter(run, rank=0)
    writer.begin()
    monkeypatch.setattr(status, "update_status", full)
    writer.update(step=2)
    with pytest.raises(OSError, match="No space left"):
        writer.write(step=2)
