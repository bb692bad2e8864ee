"""training.compile: the blocks are really compiled, and train as those of one process that are not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import FP32, SAVED, STEPS, Job, alone, assert_ran
from running import Result, create
from test_equivalence import assert_same
from test_resume import metrics, whole
from tiny import Tiny
from warm import WarmRanks

from distft.runs.directory import RunDir

COMPILED = {"training__compile": True, "training__gradient_checkpointing": True}
JOB = Job("fsdp", 2, "full", COMPILED)


@pytest.fixture(scope="module")
def runs(trained: Callable[..., Result], tiny: Tiny) -> Callable[[Job], Result]:
    return lambda job: trained(job.recipe(tiny), job.ranks)


def assert_compiled(result: Result) -> None:
    ran = result.status["ran"]
    assert ran["compiled"] == 2  # _compiled_call_impl of both blocks, as the strategy has wrapped them
    assert ran["graphs"] == 1 and ran["graph_breaks"] == 0 and ran["first_step_seconds"] > 0
    log = (result.run_dir / "logs" / "rank-0.log").read_text()
    assert "compiling the blocks (2 of them)" in log and "first step: " in log
    assert "hit config." not in log and not any("uncompiled" in text for text in result.status["warnings"])


def test_as_one_process_that_is_not_compiled(runs: Callable[[Job], Result]) -> None:
    result, reference = runs(JOB), runs(alone("full"))
    assert_ran(result, JOB)
    assert_compiled(result)
    assert reference.status["ran"]["compiled"] == 0
    assert_same(result, reference)
    for name in ("eval_loss_before", "eval_loss_after"):
        assert result.status[name] == pytest.approx(reference.status[name], abs=FP32), name
    run, other = RunDir(result.run_dir), RunDir(reference.run_dir)
    saved = [{n for n in whole(r.checkpoint(SAVED)) if not n.startswith("rng/")} for r in (run, other)]
    assert saved[0] == saved[1]  # no _orig_mod in a name
    names = [sorted(path.name for path in folder.iterdir()) for folder in (run.final, other.final)]
    assert names[0] == names[1]
    assert b"_orig_mod" not in next(run.final.glob("*model.safetensors")).read_bytes()


def test_goes_on_from_one_that_is_not_compiled(
    runs: Callable[[Job], Result], warm: WarmRanks, tiny: Tiny, tmp_path: Path
) -> None:
    """Under another strategy, which compiles the same graphs: kernels take most of the time here."""
    before = RunDir(runs(alone("full")).run_dir)
    run = create(Job("zero2", 2, "full", COMPILED).recipe(tiny), tmp_path, 2)
    shutil.copytree(before.checkpoint(SAVED), run.checkpoint(SAVED))
    shutil.copy(before.metrics, run.metrics)
    warm.train(run)
    assert_compiled(Result(0, "", "", run.path))
    found, wanted = metrics(run), metrics(before)
    for step in range(SAVED + 1, STEPS + 1):
        assert found[step]["loss"] == pytest.approx(wanted[step]["loss"], abs=FP32)
