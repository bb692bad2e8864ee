"""`torchrun ... -m distft.train.script RUN_DIR script.py args...`: an unmodified script as a rank of a run.

It runs as under `python script.py args...`, and gets its strategy through the environment that accelerate reads.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from distft.runs.directory import RunDir
from distft.runs.status import State, update_status
from distft.strategies.kinds import KINDS
from distft.train import worker


def main() -> None:
    run = RunDir(Path(sys.argv[1]))
    plan = worker.enter(run)
    if int(os.environ.get("RANK", "0")) == 0:
        update_status(run, state=State.RUNNING)
    if not KINDS[plan["strategy"]].replicates:
        from distft.train import cpu_ranks

        cpu_ranks.apply()
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as Python sets it for a script
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:  # from argparse, say; no exception hook sees it
        if error.code not in (0, None):
            worker.record_error(run, int(os.environ.get("RANK", "0")), error)
            raise
    worker.ended_well()


if __name__ == "__main__":
    main()
