"""`torchrun ... -m distft.train RUN_DIR`: a rank of a run that trains the recipe in RUN_DIR."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from distft.runs.directory import RunDir
from distft.train import worker
from distft.train.stopping import Stopping


def main() -> None:
    run = RunDir(Path(sys.argv[1]).absolute())
    plan = worker.enter(run)
    stopping = Stopping(run)
    try:
        # bitsandbytes looks on the hub for a CPU kernel whose absence changes nothing.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        with worker.importing():  # only now, so that a failing import shows in this rank's log
            from distft.train import cpu_ranks

            cpu_ranks.apply()
            from distft.train.run import leave, train

        train(run, plan, stopping)
        leave()
        worker.ended_well()
    except KeyboardInterrupt:
        if stopping.why is None:
            raise
        sys.exit(1)  # not 0: torchrun must end the ranks that wait for this one


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    main()
