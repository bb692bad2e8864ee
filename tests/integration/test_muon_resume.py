"""distft's own optimizers go on from checkpoints of other strategies; test_equivalence.py has their losses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import FP32, SAVED, STEPS, Job, alone
from running import Result, create
from test_resume import assert_same_tensors, metrics, whole
from tiny import Tiny, make_model, make_tokenizer
from warm import WarmRanks

from distft.runs.directory import RunDir

TUNING = "muon full"


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (alone(TUNING), Job("fsdp", 2, TUNING)),
        (Job("ddp", 2, TUNING), Job("fsdp", 4, TUNING)),
        (Job("fsdp", 4, TUNING), Job("ddp", 2, TUNING)),
        (Job("hsdp", 4, TUNING, {"parallelism__hsdp_shard_size": 2}), alone(TUNING)),
        (alone("galore full"), Job("ddp", 2, "galore full")),
        (Job("ddp", 2, "apollo full"), alone("apollo full")),
    ],
    ids=lambda job: str(job),
)
def test_goes_on_from_another(
    trained: Callable[..., Result], warm: WarmRanks, tiny: Tiny, tmp_path: Path, target: Job, source: Job
) -> None:
    before, reference = (RunDir(trained(job.recipe(tiny), job.ranks).run_dir) for job in (source, alone(target.tuning)))
    run = create(target.recipe(tiny), tmp_path, target.ranks)
    shutil.copytree(before.checkpoint(SAVED), run.checkpoint(SAVED))
    shutil.copy(before.metrics, run.metrics)
    warm.train(run)
    found, wanted = metrics(run), metrics(reference)
    for step in range(SAVED + 1, STEPS + 1):
        for name in ("loss", "grad_norm", "tokens"):
            assert found[step][name] == pytest.approx(wanted[step][name], abs=FP32), (step, name)
    assert_same_tensors(run.final, reference.final)


def test_a_matrix_has_one_state(trained: Callable[..., Result], tiny: Tiny) -> None:
    run = RunDir(trained(Job("fsdp", 2, TUNING).recipe(tiny), 2).run_dir)
    states: dict[str, set[str]] = {}
    for name in whole(run.checkpoint(SAVED)):
        if not name.startswith("rng/"):
            states.setdefault(name.partition("/")[0], set()).add(name.partition("/")[2])
    assert states.pop("model.embed_tokens.weight") == states.pop("lm_head.weight") == {"", "exp_avg", "exp_avg_sq"}
    for name, found in states.items():
        assert found == ({"", "exp_avg", "exp_avg_sq"} if "norm" in name else {"", "momentum_buffer"}), name


def test_rows_that_do_not_divide(once: Callable[..., Path], trained: Callable[..., Result], tiny: Tiny) -> None:
    """130 rows are 33, 33, 33 and 31 on four ranks."""

    def make(folder: Path) -> None:
        make_tokenizer(folder)
        make_model(folder, intermediate_size=130)

    changes = {"model__name_or_path": str(once("muon/odd", make))}
    one, four = (
        trained(Job(name, ranks, TUNING, changes).recipe(tiny), ranks) for name, ranks in (("ddp", 1), ("fsdp", 4))
    )
    for column in ("loss", "grad_norm"):
        assert four.column(column) == pytest.approx(one.column(column), abs=FP32), column
