"""Files of a run that are larger than a block: nothing is lost or doubled at a block's end."""

from __future__ import annotations

import json
from pathlib import Path

from running import distft

from distft.runs.directory import RunDir
from distft.runs.files import BLOCK
from distft.runs.metrics import last_metrics, read_metrics
from distft.runs.status import State, update_status


def test_metrics_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 8001)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8001, "lo')
    assert path.stat().st_size > 3 * BLOCK
    found, offset = [], 0
    while True:
        more, offset = read_metrics(path, offset, BLOCK)
        if not more:
            break
        found += more
    assert found == lines
    run = RunDir(tmp_path)
    assert last_metrics(run) == lines[-1]
    assert last_metrics(RunDir(tmp_path / "none")) == {}


def test_a_log_of_many_blocks(tmp_path: Path) -> None:
    run = RunDir.create(str(tmp_path), "mine")
    update_status(run, state=State.COMPLETED)
    text = "1 € für jede Zeile\n" * BLOCK
    run.rank_log(0).write_text(text)
    for options in ([], ["-f"]):
        done = distft("logs", "mine", "--output-dir", ".", *options, cwd=tmp_path)
        assert done.stdout == text
