"""`torchrun ... several_runs.py RUN_DIR...`: the same ranks train one run directory after the other.

Importing the stack takes most of a tiny job's time; all runs must have the same strategy and width. Each rank writes
what it trains on into logs/samples-RANK.jsonl: a line a step, the rows' tokens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from distft.runs.directory import RunDir
from distft.train import worker
from distft.train.stopping import Stopping


def main() -> None:
    original = None
    for word in sys.argv[1:]:
        run = RunDir(Path(word).absolute())
        for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG"))]:
            del os.environ[name]
        plan = worker.enter(run)
        with worker.importing():
            from distft.train import cpu_ranks

            cpu_ranks.apply()
            from accelerate.state import AcceleratorState, GradientState
            from transformers.integrations import unset_hf_deepspeed_config

            from distft.train import trainer
            from distft.train.run import leave, train

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()
        original = original or trainer.RecipeTrainer.get_batch_samples
        trainer.RecipeTrainer.get_batch_samples = recording(run, original)
        train(run, plan, Stopping(run))
    leave()
    worker.ended_well()


def recording(run: RunDir, original: Any) -> Any:
    path = run.logs / f"samples-{os.environ['RANK']}.jsonl"

    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        batches, tokens = original(self, *args, **kwargs)
        rows = [[i for i in row if i != 0] for batch in batches for row in batch["input_ids"].tolist()]
        with path.open("a") as file:
            file.write(json.dumps({"step": self.state.global_step + 1, "rows": rows}) + "\n")
        return batches, tokens

    return get_batch_samples


if __name__ == "__main__":
    main()
