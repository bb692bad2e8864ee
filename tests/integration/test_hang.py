"""Ranks that wait for one that does not come: which one, and in which collective; and ranks that may wait."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import inject, launch
from tiny import Tiny

from distft.train.collectives import Last, behind

pytestmark = pytest.mark.real_ranks(warm_torchrun=True)
LATE = "if os.environ['RANK'] == '1' and {when}:\n    time.sleep(600)"


@pytest.mark.parametrize(
    ("where", "when", "seconds", "said"),
    [
        (
            "transformers.trainer:Trainer.training_step",
            "args[0].state.global_step == 6",
            "HANG",
            "when one usually takes",
        ),
        ("distft.train.run:build_model", "True", "HANG_START", ""),
    ],
    ids=["at a step", "while it loads"],
)
def test_the_rank_that_did_not_enter(
    tiny: Tiny, tmp_path: Path, where: str, when: str, seconds: str, said: str
) -> None:
    env = inject(tmp_path, where, LATE.format(when=when)) | {f"DISTFT_{seconds}_SECONDS": "5"}
    result = launch(tiny.recipe(training__max_steps=20), tmp_path, ranks=2, env=env, expect=1)
    reason = result.status["reason"]
    assert reason.startswith("rank 1: Hang: no step for "), result.log()
    assert "; rank 1 did not enter gloo:" in reason and "in which others wait" in reason
    assert said in reason
    assert "in before" in (result.run_dir / "logs" / "rank-1.log").read_text()  # its stack


def test_while_one_writes(tiny: Tiny, tmp_path: Path) -> None:
    """final/ may take longer than the time-out of the training's connections."""
    env = inject(tmp_path, "distft.train.save:verify", "time.sleep(8)")
    recipe = tiny.recipe()
    recipe["trainer"] = {"overrides": {"ddp_timeout": 3}}
    result = launch(recipe, tmp_path, ranks=2, env=env)
    assert result.status["state"] == "completed"
    assert json.loads((result.run_dir / "final" / "adapter_config.json").read_text())["r"] == 4


def test_behind() -> None:
    """Groups are looked at one by one: one in which nobody waits says nothing, and a rank is behind only in its own."""
    done, waits = Last(7, "nccl:all_reduce", False), Last(8, "nccl:all_gather", True)
    assert behind({0: {"a [0, 1]": done}, 1: {"a [0, 1]": done}}) is None
    assert behind({0: {"a [0, 1]": waits}, 1: {"a [0, 1]": waits}}) is None
    two = {0: {"a [0, 1]": done, "b [0, 2]": waits}, 1: {"a [0, 1]": done}, 2: {"b [0, 2]": done}}
    assert behind(two) == ([2], "nccl:all_gather number 8 of the group b [0, 2]")
