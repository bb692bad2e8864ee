"""Launching on this machine: what is shown, what a failure says, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import Result, distft, launch
from tiny import Tiny, make_model
from warm import real_environment

from distft.runs import processes
from distft.runs.directory import RunDir
from distft.runs.failure import first_failure

LONG = {"training__max_steps": 100_000}
END_SECONDS = 10


def start(tiny: Tiny, folder: Path, *arguments: str, ranks: int = 2, **changes: Any) -> tuple[subprocess.Popen, Path]:
    """A launch that runs; returns it with its run directory once it trains."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(**LONG, **changes)))
    command = [sys.executable, "-m", "distft", "launch", "recipe.yaml", "--gpus-per-node", str(ranks), *arguments]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    run_dir = folder / "runs" / "tiny"
    wait_for(lambda: (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").read_text(), 120)
    return process, run_dir


def wait_for(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def status_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    for run_dir in tmp_path.glob("**/status.json"):
        assert list(processes.of_run(run_dir.parent)) == []


@pytest.fixture(scope="module")
def two_at_once(tiny: Tiny, once: Callable[..., Path]) -> list[Result]:
    """The same launch twice at the same time, in one folder, with ranks of torchrun's."""

    def make(folder: Path) -> None:
        recipe = tiny.recipe(data__eval=str(tiny.path / "heldout.jsonl"), training__eval_steps=2)
        recipe["checkpoint"] = {"save_steps": 2, "save_total_limit": 1}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "distft", "launch", "recipe.yaml", "--gpus-per-node", "2", "--json"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        (folder / "tmp").mkdir()
        env = real_environment() | {"TMPDIR": str(folder / "tmp")}
        started = [subprocess.Popen(command, cwd=folder, env=env, **pipes) for _ in range(2)]
        for process in started:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, out + err
            run_dir = Path(json.loads(out)["run_dir"])
            assert "distft.train" in (run_dir / "job.sh").read_text()
        assert not list((folder / "tmp").glob("torchelastic_*"))

    folder = once("two-at-once", make)
    return [Result(0, "", "", folder / "runs" / name) for name in ("tiny", "tiny-2")]


def test_two_runs_at_once_do_not_collide(two_at_once: list[Result]) -> None:
    first, second = sorted(two_at_once, key=lambda result: result.run_dir.name)
    assert [first.run_dir.name, second.run_dir.name] == ["tiny", "tiny-2"]
    assert first.column("loss") == pytest.approx(second.column("loss"), abs=1e-6)


def test_run_directory(two_at_once: list[Result]) -> None:
    """The contract: names, keys, units."""
    result = two_at_once[0]
    names = {path.name for path in result.run_dir.iterdir()}
    assert names == {
        "recipe.yaml", "plan.json", "accelerate.yaml", "job.sh", "logs", "checkpoints", "final", "metrics.jsonl",
        "status.json",
    }  # fmt: skip
    assert {p.name for p in (result.run_dir / "logs").iterdir()} == {"rank-0.log", "rank-1.log", "torchrun.log"}
    line = result.metrics[0]
    assert list(line)[:9] == [
        "step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "peak_memory_bytes", "time", "mfu",
    ]  # fmt: skip
    assert line["mfu"] is None  # on a CPU
    assert line["peak_memory_bytes"] > 50e6
    assert result.column("tokens") == sorted(result.column("tokens"))
    status = result.status
    assert (status["state"], status["step"], status["max_steps"], status["reason"]) == ("completed", 4, 4, None)
    assert status["started"] < status["ended"]
    plan = json.loads((result.run_dir / "plan.json").read_text())
    assert plan["schema"] == 1
    assert plan["topology"] == {"nnodes": 1, "nproc_per_node": 2, "world_size": 2, "gpu": None}
    assert plan["batch"] == {"global_batch_size": 8, "micro_batch_size": 4, "gradient_accumulation_steps": 1}
    assert plan["memory"]["capacity"] > plan["memory"]["peak"] > 0


def test_eval_loss(two_at_once: list[Result], tiny: Tiny) -> None:
    """Measured before and after, and at eval_steps; equal to a plain loop's over the same rows."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from distft.config.loading import load_recipe
    from distft.train.data import load_prepared

    result = two_at_once[0]
    status = result.status
    assert status["eval_loss_after"] < status["eval_loss_before"]
    assert [line["step"] for line in result.metrics if "eval_loss" in line] == [2, 4]
    assert result.metrics[-1]["eval_loss"] == pytest.approx(status["eval_loss_after"], abs=1e-6)
    base = AutoModelForCausalLM.from_pretrained(tiny.path / "model")
    heldout = load_prepared(load_recipe(result.run_dir / "recipe.yaml")).eval

    def loss(model: Any) -> float:
        total, count = 0.0, 0
        for row in heldout:
            start = 0
            for length in row["seq_lengths"]:
                ids = torch.tensor([row["input_ids"][start : start + length]])
                labels = torch.tensor(row["labels"][start + 1 : start + length])
                logits = model(input_ids=ids).logits[0, :-1]
                total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                count += int((labels != -100).sum())
                start += length
        return total / count

    with torch.no_grad():
        assert loss(base) == pytest.approx(status["eval_loss_before"], abs=1e-5)
        assert loss(PeftModel.from_pretrained(base, result.run_dir / "final")) == pytest.approx(
            status["eval_loss_after"], abs=1e-5
        )


def test_checkpoints_are_kept_to_the_limit(two_at_once: list[Result]) -> None:
    run_dir = two_at_once[0].run_dir
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-4"]
    assert (run_dir / "checkpoints" / "step-4" / "manifest.json").exists()


def test_status_and_logs(two_at_once: list[Result]) -> None:
    folder = two_at_once[0].run_dir.parent.parent
    done = distft("status", cwd=folder)
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["tiny", "completed"], ["tiny-2", "completed"]]
    answer = json.loads(distft("status", "tiny", "--json", cwd=folder).stdout)
    assert [run["state"] for run in answer["runs"]] == ["completed"]
    assert "attention: sdpa (no GPU)" in distft("logs", "tiny", cwd=folder).stdout
    assert "attention: sdpa" in distft("logs", "-f", "tiny", "--rank", "1", cwd=folder).stdout
    done = distft("logs", "tiny", "--rank", "7", cwd=folder)
    assert (done.returncode, "tiny has logs of 0, 1" in done.stderr) == (2, True)
    done = distft("status", "nowhere", cwd=folder)
    assert done.returncode == 2
    assert "no run directory of that name or path; runs/ has tiny, tiny-2" in done.stderr


def test_dry_run_is_what_launch_writes(two_at_once: list[Result]) -> None:
    folder = two_at_once[0].run_dir.parent.parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = distft("launch", "recipe.yaml", "--gpus-per-node", "2", "--dry-run", "--json", cwd=folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    files = json.loads(done.stdout)["files"]
    written = two_at_once[0].run_dir
    assert set(files) == {"recipe.yaml", "plan.json", "accelerate.yaml", "job.sh"}
    for name, text in files.items():
        assert text.replace("runs/tiny-3", f"runs/{written.name}") == (written / name).read_text()
    shown = distft("launch", "recipe.yaml", "--gpus-per-node", "2", "--dry-run", cwd=folder).stdout
    assert all(text.rstrip() in shown for text in files.values())
    assert "nothing was written or started" in shown


def test_render_leaves_a_folder_that_bash_runs(two_at_once: list[Result], tmp_path: Path) -> None:
    recipe = two_at_once[0].run_dir / "recipe.yaml"
    target = tmp_path / "it's rendered"
    assert distft("render", str(recipe), "-o", str(target), cwd=tmp_path).returncode == 0
    assert distft("render", str(recipe), "-o", str(target), cwd=tmp_path).returncode == 2
    subprocess.run(["bash", str(target / "job.sh")], check=True, cwd=tmp_path, capture_output=True, timeout=300)
    assert status_of(target)["state"] == "completed"
    losses = [json.loads(line)["loss"] for line in (target / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(two_at_once[0].column("loss"), abs=1e-5)


def test_no_secret_is_written(tiny: Tiny, tmp_path: Path) -> None:
    secret = "hf_" + "s3cret" * 5
    result = launch(tiny.recipe(training__max_steps=1), tmp_path, env={"HF_TOKEN": secret, "WANDB_API_KEY": secret})
    for path in result.run_dir.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()


@pytest.mark.real_ranks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(tiny: Tiny, tmp_path: Path, number: int) -> None:
    process, run_dir = start(tiny, tmp_path)
    ranks = list(processes.of_run(run_dir))
    assert len(ranks) >= 3  # torchrun and two ranks
    began = time.monotonic()
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < END_SECONDS
    assert process.returncode == 1
    status = status_of(run_dir)
    step = status["step"]
    assert status["state"] == "stopped"
    assert status["reason"] == f"stopped: {signal.Signals(number).name}; step-{step} is saved"
    assert f"{status['reason']}; resume it with: distft resume {run_dir}" in out
    assert "Traceback" not in out
    assert not list(processes.of_run(run_dir))


@pytest.mark.real_ranks
def test_detach_status_cancel(tiny: Tiny, tmp_path: Path) -> None:
    process, run_dir = start(tiny, tmp_path, "--detach")
    assert process.wait(30) == 0
    assert "distft logs -f" in process.stdout.read()
    assert status_of(run_dir)["state"] == "running"
    began = time.monotonic()
    done = distft("cancel", "tiny", "--json", cwd=tmp_path)
    assert time.monotonic() - began < END_SECONDS
    assert json.loads(done.stdout)["state"] == "cancelled"
    assert distft("cancel", "tiny", cwd=tmp_path).returncode == 0  # again: nothing to do


@pytest.mark.real_ranks
def test_a_killed_supervisor_leaves_nothing_and_is_told(tiny: Tiny, tmp_path: Path) -> None:
    process, run_dir = start(tiny, tmp_path)
    process.kill()
    process.wait()
    wait_for(lambda: not list(processes.of_run(run_dir)), 40)
    answer = json.loads(distft("status", "tiny", "--json", cwd=tmp_path).stdout)["runs"][0]
    assert answer["state"] == "failed"
    assert "its launcher is gone" in answer["reason"]


@pytest.mark.real_ranks
def test_a_killed_rank_is_named(tiny: Tiny, tmp_path: Path) -> None:
    process, run_dir = start(tiny, tmp_path)
    victim = next(
        pid for pid in processes.of_run(run_dir) if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
    os.kill(victim, signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    # Rank 0 loses its peer and says so; that is the consequence.
    assert "rank 1 was killed by SIGKILL" in out, out
    assert status_of(run_dir)["state"] == "failed"
    assert "rank 1 was killed by SIGKILL" in status_of(run_dir)["reason"]
    assert "ChildFailedError" not in out
    assert "a package is missing" not in out  # though libraries warn of optional ones in every log


def test_of_several_that_were_killed(tmp_path: Path) -> None:
    """torchrun kills ranks itself that do not end, and NCCL aborts those that lost a peer."""
    summary = """
W0131 12:00:00.000000 1 torch/distributed/elastic/multiprocessing/api.py:1010] Sending process 7 closing signal SIGTERM
distft.train FAILED
Failures:
[1]:
  time      : 2026-01-31_12:00:00
  host      : a
  rank      : 0 (local_rank: 0)
  exitcode  : -9 (pid: 7) Signal 9 (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 7
[2]:
  time      : 2026-01-31_12:00:05
  host      : a
  rank      : {killed} (local_rank: 3)
  exitcode  : -{signal} (pid: 8) Signal {signal}
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-31_12:00:05
  host      : a
  rank      : 1 (local_rank: 1)
  exitcode  : 1 (pid: 9)
"""
    run = RunDir.create(str(tmp_path), "run")
    (run.logs / "torchrun-0.log").write_text(summary.format(killed=3, signal=6))
    failure = first_failure(run, 1)
    assert (failure.reason, failure.host) == ("rank 3 was killed by SIGABRT", "")
    (run.logs / "torchrun-1.log").write_text(summary.format(killed=5, signal=9))
    failure = first_failure(run, 1)
    assert (failure.reason, failure.node, failure.host) == ("rank 5 was killed by SIGKILL", 1, None)


def test_the_first_failing_rank_is_shown(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, time, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "if dist.get_rank() == 1:\n"
        "    time.sleep(1)\n"
        "    raise MemoryError('std::bad_alloc: the second rank')\n"
        "dist.barrier()\n"
    )
    done = distft("launch", "--gpus-per-node", "2", "--", "train.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "rank 1 on " in done.stderr
    assert 'File "train.py", line 5' in done.stderr
    assert "MemoryError: std::bad_alloc: the second rank" in done.stderr
    assert "hint: out of memory: " in done.stderr
    assert "ChildFailedError" not in done.stderr
    assert "Connection closed" not in done.stderr
    shown = distft("logs", "train", "--failed", cwd=tmp_path)
    assert "MemoryError: std::bad_alloc: the second rank" in shown.stdout


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("import not_a_package.inner", "the script needs not_a_package, which the ranks' Python does not have"),
        (
            "raise ModuleNotFoundError(\"No module named 'peft.x'\")",
            'a package is missing or of another version: pip install "distft[train]"',
        ),
        ("raise OSError(28, 'No space left on device')", "the disk is full"),
        ("raise RuntimeError('EADDRINUSE: address already in use')", "the port is in use"),
        ("import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')", "out of memory"),
        ("import sys; sys.exit(3)", None),
    ],
)
def test_hints(tmp_path: Path, code: str, hint: str | None) -> None:
    (tmp_path / "train.py").write_text(code)
    done = distft("launch", "--", "train.py", cwd=tmp_path)
    assert done.returncode == 1
    assert ("hint: " in done.stderr) == (hint is not None)
    assert hint is None or f"hint: {hint}" in done.stderr


def on_a_terminal(command: list[str], folder: Path, columns: int) -> str:
    """What a command writes on a terminal of that width."""
    control, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "30", "TERM": "xterm-256color"}
    process = subprocess.Popen(
        command, cwd=folder, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, close_fds=True
    )
    os.close(terminal)
    seen = b""
    while True:
        ready, _, _ = select.select([control], [], [], 120)
        assert ready, seen
        try:
            data = os.read(control, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        seen += data
    assert process.wait() == 0, seen
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())


@pytest.mark.parametrize("columns", [80, 200])
def test_live_progress_on_a_terminal(tiny: Tiny, tmp_path: Path, columns: int) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(training__max_steps=30)))
    text = on_a_terminal([sys.executable, "-m", "distft", "launch", "recipe.yaml"], tmp_path, columns)
    frames = [line for line in re.split(r"[\r\n]+", text) if "loss" in line and "/30" in line]
    assert frames
    assert "30/30" in frames[-1]
    for part in ("tok/s", "GiB", "left"):
        assert part in frames[-1], frames[-1]
    assert max(map(len, frames)) <= columns
    assert text.count("step 1/30") == 0  # no plain lines beside it


def test_sizes_that_do_not_match_the_weights_fail_loudly(tiny: Tiny, tmp_path: Path) -> None:
    """Not the launcher's to see: the rank says it, and the launcher shows that rank's own words."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.path / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    make_model(folder, hidden_size=32)
    (folder / "config.json").write_text(json.dumps(config))
    result = launch(tiny.recipe(model__name_or_path=str(folder)), tmp_path, expect=1)
    assert result.status["state"] == "failed"
    assert "rank 0" in result.status["reason"]


def test_force_status_and_calibrate(tiny: Tiny, tmp_path: Path) -> None:
    """Rows could need far more memory than there is (and do not: they are short)."""
    recipe = tiny.recipe()
    recipe["data"] |= {"max_length": 20_000_000, "packing": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = distft("launch", "recipe.yaml", "--force", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["name"]
    found = json.loads(distft("status", name, "--json", cwd=tmp_path).stdout)["runs"][0]
    assert found["measured"]["memory_bytes"] > 2**27
    assert found["predicted"]["memory_bytes"] > found["measured"]["memory_bytes"]
    assert found["measured"]["tokens_per_second"] > 0
    text = distft("status", name, cwd=tmp_path).stdout
    assert "  memory of a rank: " in text
    assert ", predicted " in text
    calibrated = distft("plan", "recipe.yaml", "--gpu", "local", "--calibrate", name, "--json", cwd=tmp_path)
    assert json.loads(calibrated.stdout)["time"]["tokens_per_second_per_gpu"] == pytest.approx(
        found["measured"]["tokens_per_second"], rel=0.05
    )
    other = distft("plan", "recipe.yaml", "--gpu", "h100", "--calibrate", name, cwd=tmp_path)
    assert other.returncode == 2 and "ran on the CPU, and this plan is for H100" in other.stderr
