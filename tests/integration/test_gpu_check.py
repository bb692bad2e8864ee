"""benchmarks/gpu/check.py on a toy model, and its error without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CHECK = Path(__file__).parents[2] / "benchmarks" / "gpu" / "check.py"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CHECK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_runs_of_a_toy_model(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = check("--tiny", "--only", "loss", "--folder", str(tmp_path), "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert {"date", "gpu", "versions", "model", "anchor", "seconds"} <= set(result)
    assert result["versions"]["torch"] and result["versions"]["bitsandbytes"]
    (equal,) = result["losses"]
    assert equal["name"] == "chunked and full loss, bf16" and equal["status"] == "ok"
    assert len(equal["losses"][0]) == 8 and 0 < equal["difference"] < 2e-2
    assert [ran["loss"] for ran in equal["ran"]] == ["full", "chunked"]
    (row,) = result["rows"]
    assert row["name"] == "loss: full" and row["status"] == "ok"
    assert row["ran"]["loss"] == "full" and row["ran"]["attention"] == "sdpa"
    assert abs(row["loss_last"] - row["loss_first"]) < 1 and row["tokens_per_second"] > 0
    assert row["name"] in done.stdout and equal["name"] in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["check.json"]


def test_what_no_time_is_left_for(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = check("--tiny", "--only", "nf4", "--budget-seconds", "0", "--out", str(out))
    assert done.returncode == 0 and "nf4: skipped, no time left" in done.stdout
    assert json.loads(out.read_text())["rows"] == [{"name": "nf4", "status": "skipped"}]


def test_without_a_gpu_it_says_so() -> None:
    done = check()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no CUDA GPU" in done.stderr


def test_plan_accuracy_on_a_toy_model(tmp_path: Path) -> None:
    out, script = tmp_path / "plan.json", CHECK.with_name("plan_accuracy.py")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["measured"]["status"] for row in rows] == ["ok"] * 4
    assert all(row["predicted"]["fits"] and row["predicted"]["peak"] > 2**19 for row in rows)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no CUDA GPU" in done.stderr
