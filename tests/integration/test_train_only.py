"""training.train_only: that part is trained the same under every strategy; the rest is the base's to the last bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import FP32, SAVED, STEPS, STRATEGIES, Job, alone, assert_ran
from running import Result, create
from safetensors.torch import load_file
from test_equivalence import assert_same
from test_resume import metrics, whole
from tiny import Tiny
from warm import WarmRanks

from distft.runs.directory import RunDir

# Of the two layers the upper one, and of the lower one a matrix; in a unit of FSDP2 both kinds of weights.
TRAINED = ("model.layers.1.", "model.layers.0.mlp.down_proj.", "lm_head.")
JOBS = [Job(strategy, ranks, "part full", changes) for strategy, ranks, changes in STRATEGIES if ranks == 2]
JOBS += [
    Job("hsdp", 4, "part full", {"parallelism__hsdp_shard_size": 2}),
    *(Job(name, 2, "part full", {"training__gradient_checkpointing": True}) for name in ("ddp", "zero3", "fsdp")),
]


@pytest.fixture(scope="module")
def runs(trained: Callable[..., Result], tiny: Tiny) -> Callable[[Job], Result]:
    return lambda job: trained(job.recipe(tiny), job.ranks)


def assert_rest_is_the_base(run: RunDir, base: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (base, run.final))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(TRAINED)}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


@pytest.mark.parametrize("job", [alone("part full"), *JOBS], ids=str)
def test_as_one_process_does(runs: Callable[[Job], Result], tiny: Tiny, job: Job) -> None:
    result, reference = runs(job), runs(alone(job.tuning))
    if job != alone(job.tuning):
        assert_ran(result, job)
    assert_same(result, reference)
    losses = result.column("loss")
    assert losses[-1] < losses[0] - 0.05
    run = RunDir(result.run_dir)
    assert_rest_is_the_base(run, tiny.path / "model")
    weights = {name: len(value) for name, value in whole(run.checkpoint(SAVED)).items() if "/" not in name}
    assert all(name.startswith(TRAINED) for name in weights)
    assert sum(weights.values()) == json.loads(run.plan.read_text())["model"]["trainable_parameters"]


def test_all_is_another(runs: Callable[[Job], Result]) -> None:
    whole, part = (runs(alone(tuning)).column("loss")[1:] for tuning in ("full", "part full"))
    assert part != pytest.approx(whole, abs=FP32)


IN_BF16 = [Job(strategy, 2, "part full bf16") for strategy in ("ddp", "zero2", "zero3", "fsdp")]
IN_BF16 += [Job(strategy, 2, "no masters part full bf16") for strategy in ("ddp", "fsdp")]


@pytest.mark.parametrize("job", IN_BF16, ids=str)
def test_in_16_bit_the_rest_is_the_base(runs: Callable[[Job], Result], tiny: Tiny, job: Job) -> None:
    """Frozen weights are held in bf16, and the base has float32 ones."""
    result, reference = runs(job), runs(alone("part full"))
    assert_ran(result, job)
    assert result.column("loss") == pytest.approx(reference.column("loss"), abs=2e-2)
    assert_rest_is_the_base(RunDir(result.run_dir), tiny.path / "model")


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (Job("fsdp", 2, "part full"), Job("zero3", 2, "part full")),
        (Job("zero2", 2, "part full"), Job("ddp", 2, "part full")),
        (Job("ddp", 1, "part full"), Job("fsdp", 2, "part full")),
    ],
    ids=lambda job: str(job),
)
def test_goes_on_from_another(
    runs: Callable[[Job], Result], warm: WarmRanks, tiny: Tiny, tmp_path: Path, target: Job, source: Job
) -> None:
    before, reference = RunDir(runs(source).run_dir), RunDir(runs(alone(target.tuning)).run_dir)
    run = create(target.recipe(tiny), tmp_path, target.ranks)
    shutil.copytree(before.checkpoint(SAVED), run.checkpoint(SAVED))
    shutil.copy(before.metrics, run.metrics)
    warm.train(run)
    found, wanted = metrics(run), metrics(reference)
    for step in range(SAVED + 1, STEPS + 1):
        for name in ("loss", "grad_norm", "tokens"):
            assert found[step][name] == pytest.approx(wanted[step][name], abs=FP32), (step, name)
    assert_rest_is_the_base(run, tiny.path / "model")
