"""The warning about a training that has hardly any optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distft.config.recipe import Recipe

FEW = 10


def warnings(recipe: Recipe, counts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line where data (its `counts`, by split) make fewer than FEW optimizer steps: what to change. Else none."""
    training, rows = recipe.training, counts["train"]["rows"]
    steps = training.optimizer_steps(rows)
    if steps >= FEW:
        return []
    packed = rows < counts["train"]["documents"]
    more = ["a higher training.max_steps" if training.max_steps else "more training.num_train_epochs"]
    if not training.max_steps:  # which is independent of the rows
        more += ["a smaller training.global_batch_size", *(["data.packing: false"] if packed else [])]
    return [
        f"this run makes only {steps} optimizer step{'s' * (steps != 1)}: {rows:,} {'packed ' * packed}rows, "
        f"global batch size {training.global_batch_size:,}"
        + (f", training.max_steps {training.max_steps}" if training.max_steps else "")
        + f". It will learn little; what helps: {', '.join(more)}"
    ]
