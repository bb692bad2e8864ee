"""What a warm rank trains on, written down."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def record_rows(job: dict[str, Any]) -> None:
    """Have this rank write a line for each step into logs/samples-RANK.jsonl: the tokens of its rows."""
    from distft.train.trainer import RecipeTrainer

    path = Path(job["run_dir"]) / "logs" / f"samples-{os.environ['RANK']}.jsonl"
    original = RecipeTrainer.get_batch_samples

    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        batches, tokens = original(self, *args, **kwargs)
        rows = [[i for i in row if i != 0] for batch in batches for row in batch["input_ids"].tolist()]
        with path.open("a") as file:
            file.write(json.dumps({"step": self.state.global_step + 1, "rows": rows}) + "\n")
        return batches, tokens

    RecipeTrainer.get_batch_samples = get_batch_samples
