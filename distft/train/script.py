"""`torchrun ... -m distft.train.script RUN_DIR script.py args...`: an unmodified script as a rank of a run.

It runs as under `python script.py args...`, or `python -m module args...` where the first word is -m, and gets its
strategy through the environment that accelerate reads.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from distft.runs.directory import RunDir
from distft.runs.status import State
from distft.strategies.kinds import KINDS
from distft.train import worker
from distft.train.imports import AfterImport
from distft.train.script_strategy import ScriptStrategy
from distft.train.status import StatusWriter


def main() -> None:
    run, rank = RunDir(Path(sys.argv[1])), int(os.environ.get("RANK", "0"))
    plan = worker.enter(run)
    status = StatusWriter(run, rank)
    status.begin(state=State.RUNNING)
    strategy = ScriptStrategy(plan, status)
    strategy.watch(AfterImport())
    if not KINDS[plan["strategy"]].replicates:
        from distft.train import cpu_ranks

        cpu_ranks.apply()
    try:
        _run(sys.argv[2:])
    except SystemExit as error:  # from argparse, say; no exception hook sees it
        if error.code not in (0, None):
            worker.record_error(run, rank, error)
            raise
    if missed := strategy.missed():
        status.update(warnings=[missed])
    worker.ended_well()


def _run(words: list[str]) -> None:
    """Run a script, or the module after -m, as Python does."""
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], str(Path.cwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = words
    sys.path[0] = str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
