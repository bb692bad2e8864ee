"""training.master_weights: none: what is bf16, and what a checkpoint has of it; test_equivalence.py has the losses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import SAVED, STEPS, Job, alone
from running import Result, create
from test_resume import assert_same_tensors, metrics, whole
from tiny import Tiny
from warm import WarmRanks

from distft.runs.directory import RunDir
from distft.train.kahan import STATES

TUNING = "no masters full bf16"
DDP, FSDP, ZERO1, ZERO3 = (Job(strategy, 2, TUNING) for strategy in ("ddp", "fsdp", "zero1", "zero3"))


@pytest.mark.parametrize(
    ("target", "source", "tolerance"),
    [
        # Two ranks of DDP and of FSDP2 average the same gradients in float32.
        (DDP, FSDP, 0),
        (ZERO1, ZERO3, 0),
        (alone(TUNING), Job("zero2", 2, TUNING), 1e-3),
    ],
    ids=str,
)
def test_goes_on_from_another(
    trained: Callable[..., Result],
    warm: WarmRanks,
    tiny: Tiny,
    tmp_path: Path,
    target: Job,
    source: Job,
    tolerance: float,
) -> None:
    before, reference = (RunDir(trained(job.recipe(tiny), job.ranks).run_dir) for job in (source, target))
    run = create(target.recipe(tiny), tmp_path, target.ranks)
    shutil.copytree(before.checkpoint(SAVED), run.checkpoint(SAVED))
    shutil.copy(before.metrics, run.metrics)
    warm.train(run)
    found, wanted = metrics(run), metrics(reference)
    for step in range(SAVED + 1, STEPS + 1):
        assert found[step]["loss"] == pytest.approx(wanted[step]["loss"], abs=tolerance), step
    if not tolerance:
        assert_same_tensors(run.final, reference.final)


def test_all_of_it_is_bf16(trained: Callable[..., Result], tiny: Tiny) -> None:
    """And the same in both checkpoints to the last bit: what was rounded off is there, too."""
    first, second = (whole(RunDir(trained(job.recipe(tiny), 2).run_dir).checkpoint(SAVED)) for job in (DDP, FSDP))
    names = {name for name in first if not name.startswith("rng/")}
    weights = {name for name in names if "/" not in name}
    assert names == weights | {f"{weight}/{state}" for weight in weights for state in STATES}
    assert {first[name].dtype for name in names} == {torch.bfloat16}
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert any(first[name].any() for name in names if name.endswith("kahan_comp"))
