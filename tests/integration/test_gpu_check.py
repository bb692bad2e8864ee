"""benchmarks/gpu/check.py on a toy model, and its error without a GPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

CHECK = Path(__file__).parents[2] / "benchmarks" / "gpu" / "check.py"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CHECK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_every_part_on_a_toy_model(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = check("--device", "cpu", "--tiny", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert {"date", "gpu", "versions", "size", "rows", "anchor", "above_anchor", "fsdp_offload", "seconds"} <= set(
        result
    )
    assert result["anchor"]["tokens_per_second"] == 12_473
    assert result["versions"]["torch"] and result["versions"]["bitsandbytes"]
    assert result["fsdp_offload"]["status"] == "skipped"

    kinds = [(row["method"], row["gradient_checkpointing"]) for row in result["rows"]]
    assert kinds == [("lora", False), ("lora", True), ("qlora", False), ("qlora", True)]
    for row in result["rows"]:
        assert row["status"] == "ok", row
        assert math.isfinite(row["loss_first"]) and row["loss_last"] < row["loss_first"]
        assert row["tokens_per_second"] > 0 and row["mfu"] is None
        assert f"{row['method']}, " in done.stdout
    plain, checkpointing = result["rows"][:2]
    assert checkpointing["flops_per_token"] * 4 == plain["flops_per_token"] * 6
    assert checkpointing["loss_last"] == plain["loss_last"]


def test_without_a_gpu_it_says_so() -> None:
    done = check()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no CUDA GPU" in done.stderr


def test_rows_beyond_the_time_budget_are_listed(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = check("--device", "cpu", "--tiny", "--budget-seconds", "0", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["status"] for row in rows] == ["skipped"] * 4
    assert "budget" in rows[0]["reason"]


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
