"""`torchrun ... several_runs.py RUN_DIR...`: the same ranks train one run directory after the other.

Importing the stack takes most of a tiny job's time; all runs must have the same strategy and width.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from distft.run_dir import RunDir
from distft.train import worker
from distft.train.stopping import Stopping


def main() -> None:
    for word in sys.argv[1:]:
        run = RunDir(Path(word).absolute())
        for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG"))]:
            del os.environ[name]
        plan = worker.enter(run)
        from accelerate.state import AcceleratorState, GradientState
        from transformers.integrations import unset_hf_deepspeed_config

        from distft.train.run import train

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()
        train(run, plan, Stopping(run))
    from distft.train.run import leave

    leave()


if __name__ == "__main__":
    main()
