"""Warm ranks against those of `distft launch`: losses, weights, states and generators to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import STRATEGIES, Job, assert_ran
from running import Result, launch
from safetensors.torch import load_file
from tiny import Tiny

CASES = [
    *(
        Job(strategy, 2, "lora") for strategy in ("ddp", "zero3", "fsdp")
    ),  # an engine each; a launch takes 10 CPU seconds
    *(Job(strategy, ranks, "lora", changes) for strategy, ranks, changes in STRATEGIES if strategy == "hsdp"),
    Job("ddp", 2, "nf4"),
]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.startswith("samples-")}


@pytest.mark.real_ranks
@pytest.mark.parametrize("job", CASES, ids=str)
def test_as_a_real_launch(trained: Callable[..., Result], tiny: Tiny, tmp_path: Path, job: Job) -> None:
    """Through the command line, the supervisor, bash and torchrun; with imports of its own in every rank."""
    real, warm = launch(job.recipe(tiny), tmp_path, ranks=job.ranks), trained(job.recipe(tiny), job.ranks)
    for result in (real, warm):
        assert_ran(result, job)
    for column in ("step", "loss", "grad_norm", "learning_rate", "tokens"):
        assert real.column(column) == warm.column(column), column
    for name in ("state", "step", "max_steps", "data", "identity", "ran", "versions"):
        assert real.status[name] == warm.status[name], name
    assert real.status["eval_loss_after"] == warm.status["eval_loss_after"]
    for path in [*real.run_dir.glob("final/*.safetensors"), *real.run_dir.glob("checkpoints/*/*.safetensors")]:
        found, wanted = load_file(warm.run_dir / path.relative_to(real.run_dir)), load_file(path)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), path.name
    assert names(real.run_dir) == names(warm.run_dir) | {"logs/torchrun.log"}
