"""A training without a result ends as a failure that says why: no step has a loss, or nothing was trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jobs import FULL
from running import inject, launch
from tiny import Tiny

from distft.runs import checkpoints
from distft.runs.directory import RunDir

# After step 3 one rank of two has weights that are no numbers.
POISON = (
    "import torch\n"
    "if args[0].state.global_step == 3 and os.environ['RANK'] == '1':\n"
    "    with torch.no_grad():\n"
    "        for parameter in args[1].parameters():\n"
    "            parameter.requires_grad and parameter.fill_(float('nan'))"
)


@pytest.mark.parametrize(("strategy", "max_steps", "made"), [("ddp", 12, 6), ("zero2", 12, 6), ("fsdp", 5, 5)])
def test_a_loss_that_is_nan_ends_the_run(tiny: Tiny, tmp_path: Path, strategy: str, max_steps: int, made: int) -> None:
    """After three steps, or at the end; the only checkpoint that is kept is one from before."""
    env = inject(tmp_path, "transformers.trainer:Trainer.training_step", POISON)
    recipe = tiny.recipe(
        parallelism__strategy=strategy,
        training__max_steps=max_steps,
        checkpoint__save_steps=1,
        checkpoint__save_total_limit=1,
    )
    result = launch(recipe, tmp_path, ranks=2, expect=1, env=env)
    assert result.status["state"] == "failed"
    assert result.status["reason"].endswith("RunError: the loss is nan since step 4"), result.log()
    assert "Try a lower training.learning_rate" in result.stderr
    assert result.column("step") == [*range(1, made + 1)]
    run = RunDir(result.run_dir)
    assert [found.step for found in checkpoints.complete(run)] == [3]
    assert not run.final.exists()
    assert all(json.loads(path.read_text())["user_error"] for path in run.logs.glob("rank-*.error.json"))


@pytest.mark.parametrize(
    ("strategy", "ranks", "changes"),
    [
        ("ddp", 1, {**FULL, "training__learning_rate": 1e-30}),
        ("ddp", 2, {"training__learning_rate": 1e-60}),
        ("zero2", 2, {**FULL, "training__learning_rate": 1e-30}),
        ("zero3", 2, {"training__learning_rate": 1e-60}),
        ("fsdp", 2, {**FULL, "training__learning_rate": 1e-30}),
    ],
)
def test_a_run_that_trains_nothing_fails(
    tiny: Tiny, tmp_path: Path, strategy: str, ranks: int, changes: dict[str, Any]
) -> None:
    recipe = tiny.recipe(parallelism__strategy=strategy, training__max_steps=2, **changes)
    result = launch(recipe, tmp_path, ranks=ranks, expect=1)
    assert result.status["reason"].endswith("RunError: nothing was trained: 2 steps changed no weight"), result.log()
    assert not (result.run_dir / "final").exists()


def test_a_single_step_trains(tiny: Tiny, tmp_path: Path) -> None:
    """At the default warm-up; `launch` and status.json warn of it."""
    recipe = tiny.recipe(training__max_steps=None, training__global_batch_size=100)
    del recipe["training"]["warmup_ratio"]
    result = launch(recipe, tmp_path)
    assert result.column("learning_rate") == [0.01]
    warning, repeated = result.status["warnings"]
    assert repeated.startswith("each optimizer step trains rows of data.train more than once")
    assert re.match(r"this run makes only 1 optimizer step: \d+ packed rows, global batch size 100\. ", warning)
    assert result.stderr.count(f"warning: {warning}") == 1
