"""`torchrun ... -m distft.train RUN_DIR`: a rank of a run that trains the recipe in RUN_DIR."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from distft.run_dir import RunDir
from distft.train import worker
from distft.train.stopping import Stopping


def main() -> None:
    run = RunDir(Path(sys.argv[1]).absolute())
    plan = worker.enter(run)
    stopping = Stopping(run)
    try:
        from distft.train.run import leave, train  # only now: what fails to import ends in this rank's log

        train(run, plan, stopping)
        leave()
    except KeyboardInterrupt:
        if stopping.why is None:
            raise
        sys.exit(1)  # torchrun must end ranks that wait for this one


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    main()
