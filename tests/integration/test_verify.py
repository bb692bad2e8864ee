"""`distft verify`: real runs held against one of them, and what is refused before any starts."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console
from running import distft
from tiny import Tiny

from distft.cli import main
from distft.commands import verify
from distft.commands.launch import Launch
from distft.commands.verify import Trial, Verification
from distft.errors import RunError
from distft.runs.comparison import Comparison, Outcome
from distft.runs.directory import RunDir
from distft.runs.status import State, read_status, update_status
from distft.runs.stop_file import ask_to_stop
from distft.views import comparison


@pytest.fixture
def recipe(tiny: Tiny, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny.recipe(lora={"r": 4, "lora_dropout": 0.1})))
    return path


@pytest.fixture
def planned(recipe: Path) -> Verification:
    """Three runs, of which nothing is started."""
    return verify.plan(str(recipe), [], [1, 2], ["zero3"], 4)


def test_the_same_training(recipe: Path, tmp_path: Path) -> None:
    options = ["--world-sizes", "1,2", "--strategies", "zero3,hsdp", "--json"]
    done = distft("verify", recipe.name, *options, cwd=tmp_path, env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["same"], found["steps"], found["tolerance"]) == (True, 4, 1e-5)
    runs = found["runs"]
    assert [(run["strategy"], run["ranks"]) for run in runs] == [("ddp", 1), ("zero3", 1), ("zero3", 2)]
    assert [run["wrapped"] for run in runs] == ["DistributedDataParallel", "DeepSpeedEngine", "DeepSpeedEngine"]
    assert [run["reference"] for run in runs] == [True, False, False]
    for run in runs:
        for column in ("loss", "grad_norm"):
            assert run[column] == pytest.approx(runs[0][column], abs=1e-5)
            distances = [abs(a - b) for a, b in zip(run[column], runs[0][column], strict=True)]
            assert run[f"{column}_difference"] <= max(distances) <= 1e-5
        assert run["tokens"] == runs[0]["tokens"]
        assert len(run["loss"]) == 4
        assert run["loss"][-1] < run["loss"][0] - 0.01  # updates are compared, not only first losses
    assert found["largest"]["difference"] == max(
        run[f"{column}_difference"] for run in runs for column in ("loss", "grad_norm")
    )
    left_out = {(left["strategy"], left["ranks"]): left["reason"] for left in found["left_out"]}
    assert left_out["hsdp", 1] == "one rank has nothing to shard"
    assert "[hsdp-needs-whole-groups]" in left_out["hsdp", 2]
    (note,) = found["notes"]
    assert note.startswith("lora.lora_dropout: 0.1 in the recipe, 0 here")
    assert "3/3  zero3 on 2 ranks: " in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]  # no runs/, nothing temporary


def test_above_the_tolerance(recipe: Path, tmp_path: Path) -> None:
    """Two widths of bf16 round otherwise: never equal to the last bit."""
    options = ["--world-sizes", "1,2", "--strategies", "ddp", "--tolerance", "0", "--steps", "3", "--keep", "kept"]
    sets = ["--set", "training.mixed_precision=bf16"]
    done = distft("verify", recipe.name, *options, *sets, cwd=tmp_path, env={"COLUMNS": "100"})
    assert done.returncode == 1, done.stdout + done.stderr
    table, _, rest = done.stdout.partition("\n\n")
    header, reference, other = table.splitlines()
    assert header.split("  ")[0] == "strategy"
    assert reference.split()[:3] == ["ddp", "1", "DistributedDataParallel"]
    assert reference.split()[-2:] == ["-", "-"]
    assert other.split()[:3] == ["ddp", "2", "DistributedDataParallel"]
    assert "2^-8 (0.4%)" in rest
    last = rest.splitlines()[-1]
    assert last.startswith("largest difference ")
    assert ", ddp on 2 ranks) exceeds 0: not the same training" in last
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["ddp-x1", "ddp-x2"]
    kept = yaml.safe_load((tmp_path / "kept" / "ddp-x2" / "recipe.yaml").read_text())
    assert kept["lora"]["lora_dropout"] == 0
    assert kept["training"]["max_steps"] == 3
    again = distft("verify", recipe.name, *options, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert "--keep: kept is not empty" in again.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--world-sizes", "0"], "--world-sizes: got '0', need numbers of ranks >= 1"),
        (["--world-sizes", "x,2"], "--world-sizes: got 'x'"),
        (["--world-sizes", "1,,2"], "--world-sizes: got ''"),
        (["--world-sizes", "1,2,2"], "--world-sizes: got '2' twice"),
        (["--world-sizes", "1,3,5"], "--world-sizes: 5: training.global_batch_size: got 8"),
        (["--world-sizes", "1"], "zero2, zero3, fsdp on 1 rank: one rank has nothing to shard"),
        (["--strategies", "zero9"], "--strategies: got 'zero9', need some of ddp, zero1"),
        (["--strategies", "ddp,ddp"], "--strategies: got 'ddp' twice"),
        (["--steps", "2"], "--steps: got 2, need >= 3"),
        (["--tolerance", "-1"], "--tolerance: got -1.0, need >= 0"),
        (["--set", "lora.r=0"], "lora.r: got 0"),
        (["--set", "data.train=missing.jsonl"], "data.train: no such file"),
        (["--set", "model.name_or_path=."], "has no config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_starts_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Launch, "start", lambda *args: pytest.fail("it was started"))
    done = CliRunner().invoke(main, ["verify", recipe.name, *options])
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_ctrl_c_leaves_nothing(recipe: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "distft", "verify", recipe.name, "--world-sizes", "1,2"]
    env = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(temporary.glob("*/ddp-x1/logs/rank-0.log")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped at ddp on 1 rank; nothing was compared" in said
    assert "Traceback" not in said
    assert list(temporary.iterdir()) == []


# ---- without processes


def test_the_usual_runs(recipe: Path) -> None:
    found = verify.plan(str(recipe), [], [2, 4], None, 4)
    names = [str(trial) for trial in found.trials]
    assert names[0] == "ddp on 2 ranks"  # the first width's is the reference
    assert sorted(names) == sorted(f"{s} on {n} ranks" for s in ("ddp", "zero2", "zero3", "fsdp") for n in (2, 4))
    assert found.left_out == ()


def test_the_recipes_own_strategy(recipe: Path) -> None:
    """Also with offload, which the reference has not."""
    own = ["parallelism.strategy=zero1", "parallelism.offload=optimizer"]
    found = verify.plan(str(recipe), own, [1, 2], None, 4)
    names = [str(trial) for trial in found.trials]
    assert names[0] == "ddp on 1 rank"
    assert "zero1+offload on 2 ranks" in names
    (left,) = [left for left in found.left_out if left.ranks == 2 and "ddp" in left.strategies]
    assert "[offload-needs-a-strategy-that-can]" in left.reason


@pytest.mark.parametrize(
    ("sets", "allowed", "words"),
    [
        ([], 1e-5, "lora.lora_dropout"),
        (["training.mixed_precision=bf16"], 2e-2, "training.mixed_precision: bf16"),
        (["training.optim=adamw_bnb_8bit"], 1e-3, "training.optim: adamw_bnb_8bit"),
    ],
)
def test_what_cannot_be_equal(recipe: Path, sets: list[str], allowed: float, words: str) -> None:
    found = verify.plan(str(recipe), sets, [1, 2], ["ddp"], 4)
    assert found.tolerance == allowed
    assert any(note.startswith(words) for note in found.notes)
    assert all(trial.recipe.lora.lora_dropout == 0 for trial in found.trials)
    assert verify.plan(str(recipe), sets, [1, 2], ["ddp"], 4, 0.5).tolerance == 0.5


def test_dropout_of_the_model_itself(recipe: Path, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (tiny.path / "model").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    config = json.loads((tiny.path / "model" / "config.json").read_text()) | {"attention_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    found = verify.plan(str(recipe), [f"model.name_or_path={folder}"], [1, 2], ["ddp"], 4)
    assert any("attention_dropout 0.1" in note for note in found.notes)


def outcome(trial: Trial, *losses: float, norm: float | None = 1.0, failure: str | None = None) -> Outcome:
    metrics = [{"step": n, "loss": loss, "grad_norm": norm, "tokens": 8 * n} for n, loss in enumerate(losses, 1)]
    return Outcome(trial.strategy, trial.ranks, tuple(metrics), "FSDPPeftModelForCausalLM", 1.0, failure)


def compared(planned: Verification, *outcomes: Outcome) -> Comparison:
    return Comparison(outcomes, planned.steps, planned.tolerance)


def test_verdicts(planned: Verification) -> None:
    first, second, third = planned.trials
    reference, near = outcome(first, 5, 4, 3, 2), outcome(second, 5, 4, 3 + 2e-6, 2)
    result = compared(planned, reference, near, outcome(third, 5, 4, 3, 2))
    assert result.same
    assert comparison.verdict(result) == (
        "largest difference 2.0e-06 (loss at step 3, zero3 on 1 rank), allowed 1e-05: the same training"
    )
    far = replace(result, outcomes=(reference, near, outcome(third, 5, 4, 3, 2, norm=1.5)))
    assert not far.same
    assert comparison.verdict(far) == (
        "largest difference 5.0e-01 (grad_norm at step 1, zero3 on 2 ranks) exceeds 1e-05: not the same training"
    )
    broken = replace(result, outcomes=(reference, near, outcome(third, 5, math.nan, 3, 2)))
    assert not broken.same
    assert "largest difference inf (loss at step 2, zero3 on 2 ranks) exceeds" in comparison.verdict(broken)
    found = json.loads(json.dumps(comparison.as_json(broken), allow_nan=False))
    assert (found["largest"]["difference"], found["runs"][2]["loss"]) == (None, [5, None, 3, 2])
    unmeasured = replace(result, outcomes=(reference, outcome(second, 5, 4, 3, 2, norm=None)))
    assert comparison.as_json(unmeasured)["runs"][1]["grad_norm_difference"] is None


def test_a_large_norm_is_compared_relative(planned: Verification) -> None:
    first, second, _ = planned.trials
    result = compared(planned, outcome(first, 5, norm=100.0), outcome(second, 5, norm=100.0001))
    assert result.largest.size == pytest.approx(1e-6)


@pytest.mark.parametrize("width", [60, 120])
def test_it_fits_the_terminal(planned: Verification, width: int) -> None:
    outcomes = [outcome(trial, 5.25, 4, 3, 2.125) for trial in planned.trials]
    said = comparison.lines(compared(planned, *outcomes), width)
    assert max(map(len, said)) <= width
    assert sum("FSDPPeftModelForCausalLM" in line for line in said) == 3
    assert sum("5.250000" in line and "2.125000" in line for line in said) == 3


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Launches that write what a run would write. `state` and `rows` change the second."""
    second: dict[str, Any] = {}

    def start(self: Launch, console: Console, started: Any) -> RunDir:
        run = RunDir.create(self.settings.output_dir, self.settings.name)
        started(run)
        changed = second if run.path.name != "ddp-x1" else {}
        tokens = changed.get("tokens", 8)
        rows = [{"step": n, "loss": 5.0, "grad_norm": 1.0, "tokens": tokens * n} for n in range(1, 5)]
        run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        update_status(run, state=State(changed.get("state", "completed")), ran={"wrapped": "DeepSpeedEngine"})
        if changed.get("stop"):
            ask_to_stop(run, "SIGINT")
        if read_status(run).state is not State.COMPLETED:
            raise RunError("rank 1: CUDA out of memory\n  the traceback\nlog: /gone")
        return run

    monkeypatch.setattr(Launch, "start", start)
    return second


@pytest.mark.parametrize("keep", [True, False])
def test_a_run_that_fails(planned: Verification, fake: dict[str, Any], tmp_path: Path, keep: bool) -> None:
    """The others are compared all the same."""
    fake["state"] = "failed"
    result = verify.run(planned, tmp_path / "runs", Console(quiet=True), keep)
    assert [outcome.failure is None for outcome in result.outcomes] == [True, False, False]
    assert not result.same
    said = "\n".join(comparison.lines(result, 120))
    assert "failed: zero3 on 1 rank: rank 1: CUDA out of memory\n  the traceback\n" in said
    assert ("log: /gone" in said, "--keep DIR keeps its logs" in said) == (keep, not keep)
    assert said.endswith("nothing was compared: every run but the reference failed")
    assert len(list((tmp_path / "runs").iterdir())) == (3 if keep else 0)


def test_other_rows_are_another_training(planned: Verification, fake: dict[str, Any], tmp_path: Path) -> None:
    fake["tokens"] = 9
    result = verify.run(planned, tmp_path / "runs", Console(quiet=True), False)
    assert not result.same
    assert "its rows are not those" in result.failed[0].failure


def test_a_stop_ends_it_though_the_run_completed(planned: Verification, fake: dict[str, Any], tmp_path: Path) -> None:
    fake["stop"] = True
    with pytest.raises(RunError, match="stopped at zero3 on 1 rank"):
        verify.run(planned, tmp_path / "runs", Console(quiet=True), False)
