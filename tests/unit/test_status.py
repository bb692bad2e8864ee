"""status.json: what is read from it, whatever is in it, and that nothing is lost when it is written."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from distft.cli import main
from distft.runs.directory import RunDir
from distft.runs.status import Attempt, Cause, State, Status, add_job_id, read_status, update_status


def test_what_is_not_known_survives_an_update(tmp_path: Path) -> None:
    run = RunDir.create(str(tmp_path), "run")
    run.status.write_text(json.dumps({"state": "running", "step": 3, "of_the_future": {"a": [1]}}))
    assert update_status(run, step=4).state is State.RUNNING
    raw = json.loads(run.status.read_text())
    assert raw["of_the_future"] == {"a": [1]}
    assert (raw["step"], raw["job_id"], raw["eval_loss_after"]) == (4, None, None)
    with pytest.raises(TypeError):
        update_status(run, stpe=5)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "it is no object"),
        (b"null", "it is no object"),
        (b"\xff\xfe", "'utf-8' codec can't decode"),
        (b"[" * 100_000, "maximum recursion depth"),
        (b'{"attempts": 3}', "attempts: got 3, not a list"),
        (b'{"attempts": ["x"]}', "attempts: has something else than objects"),
        (b'{"attempts": [{"step": "x"}]}', 'attempts: step is "x"'),
        (b'{"step": "7"}', 'step: got "7", not a whole number'),
        (b'{"max_steps": true}', "max_steps: got true, not a whole number"),
        (b'{"state": {"a": 1}}', 'state: got {"a": 1}, not a text'),
        (b'{"eval_loss_before": "low"}', 'eval_loss_before: got "low", not a number'),
        (b'{"warnings": [1]}', "warnings: has something else than texts"),
    ],
)
def test_a_damaged_file_says_why_and_breaks_nothing(tmp_path: Path, content: bytes, why: str) -> None:
    run, other = RunDir.create(str(tmp_path), "run"), RunDir.create(str(tmp_path), "other")
    run.status.write_bytes(content)
    update_status(other, state=State.COMPLETED, step=3)
    assert f"status.json is damaged: {why}" in (read_status(run).damaged or "")
    listed = CliRunner().invoke(main, ["status", "--output-dir", str(tmp_path)], catch_exceptions=False)
    assert listed.exit_code == 0
    lines = [line.split()[:2] for line in listed.output.splitlines()]
    assert lines == [["other", "completed"], ["run", "damaged"]]
    resumed = CliRunner().invoke(main, ["resume", str(run.path)])
    assert resumed.exit_code != 0 and run.status.read_bytes() == content
    assert update_status(run, state=State.FAILED).damaged is None
    assert "damaged" not in json.loads(run.status.read_text())


def test_a_file_of_others(tmp_path: Path) -> None:
    run = RunDir.create(str(tmp_path), "run")
    run.status.mkdir()
    assert read_status(run).damaged == "status.json: Is a directory"


def test_a_status_from_another_version_can_be_read() -> None:
    found = Status.from_json({"state": "on_the_moon", "attempts": [{"step": 3, "wind": "west"}], "attempt": None})
    assert (found.state, found.finished, found.attempts[0].step) == (None, False, 3)


def test_a_status_comes_back_from_its_file(tmp_path: Path) -> None:
    run = RunDir.create(str(tmp_path), "run")
    bad = Attempt(1.0, 0, "node1 is bad", Cause.BAD_NODES, bad_nodes=("node1",))
    written = update_status(run, state=State.QUEUED, attempts=(bad,), eval_loss_before=1.5, accepted=["data"])
    assert read_status(run) == written
    assert json.loads(run.status.read_text())["attempts"][0]["cause"] == "bad_nodes"


def test_a_folder_that_was_submitted_by_hand_has_its_job_id(tmp_path: Path) -> None:
    run = RunDir.create(str(tmp_path), "run")
    for job_id in ("7", "8"):
        add_job_id(run, job_id)
    assert update_status(run, state=State.RUNNING).job_id == "8"


def test_two_threads_lose_nothing(tmp_path: Path) -> None:
    """The training writes steps while the thread that saves writes its saves."""
    run = RunDir.create(str(tmp_path), "run")

    def write(name: str, value: Any) -> None:
        for n in range(100):
            update_status(run, **{name: value(n)})
            assert getattr(read_status(run), name) == value(n)

    threads = [
        threading.Thread(target=write, args=("step", lambda n: n)),
        threading.Thread(target=write, args=("owner", str)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (read_status(run).step, read_status(run).owner) == (99, "99")
