"""training.compile: the blocks are really compiled, and train as those of one process that are not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import FP32, SAVED, STEPS, Job, alone, assert_ran
from running import Result, create
from test_resume import metrics, whole
from tiny import Tiny
from warm import WarmRanks

from distft.runs.directory import RunDir

COMPILED = {"training__compile": True, "training__gradient_checkpointing": True}
JOB = Job("fsdp", 2, "full", COMPILED)
SECONDS = 600  # a C++ compiler starts for each kernel


def test_goes_on_from_one_process_that_is_not_compiled(
    trained: Callable[..., Result], warm: WarmRanks, tiny: Tiny, tmp_path: Path
) -> None:
    before = RunDir(trained(alone("full").recipe(tiny)).run_dir)
    run = create(JOB.recipe(tiny), tmp_path, JOB.ranks)
    shutil.copytree(before.checkpoint(SAVED), run.checkpoint(SAVED))
    shutil.copy(before.metrics, run.metrics)
    warm.train(run, SECONDS)
    result, reference = Result(0, "", "", run.path), Result(0, "", "", before.path)
    assert_ran(result, JOB)
    ran = result.status["ran"]
    assert ran["compiled"] == 2  # _compiled_call_impl of both blocks, as the strategy has wrapped them
    assert ran["graphs"] == 1 and ran["graph_breaks"] == 0 and ran["first_step_seconds"] > 0
    assert reference.status["ran"]["compiled"] == 0
    log = run.rank_log(0).read_text()
    assert "compiling the blocks (2 of them)" in log and "first step: " in log
    assert "hit config." not in log and not any("uncompiled" in text for text in result.status["warnings"])
    found, wanted = metrics(run), metrics(before)
    for step in range(SAVED + 1, STEPS + 1):
        for column in ("loss", "grad_norm"):
            assert found[step][column] == pytest.approx(wanted[step][column], abs=FP32), column
    assert result.status["eval_loss_after"] == pytest.approx(reference.status["eval_loss_after"], abs=FP32)
    saved = [{n for n in whole(r.checkpoint(STEPS)) if not n.startswith("rng/")} for r in (run, before)]
    assert saved[0] == saved[1]  # no _orig_mod in a name
    names = [sorted(path.name for path in folder.iterdir()) for folder in (run.final, before.final)]
    assert names[0] == names[1]
    assert b"_orig_mod" not in next(run.final.glob("*model.safetensors")).read_bytes()
