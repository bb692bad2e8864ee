"""Ranks that need not import the training stack: for tests of the training, where the launcher is not the subject.

Importing torch, transformers, DeepSpeed and the others takes a rank longer than to train a tiny model. A server
(warm_server.py) imports them once and forks the ranks of job after job, of any strategy and world size. Each rank is a
process of its own that runs what `python -m distft.train RUN_DIR` runs, with nothing left of any job before it.
test_warm.py holds these ranks against those of a real launch, bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import subprocess
import sys
from pathlib import Path

from distft.runs.directory import RunDir

SECONDS = 120  # for one job


class WarmRanks:
    """Start the server with the first job; stop it with `close`."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def train(self, run: RunDir, *, record: bool = False) -> None:
        """Train a run directory to its end. `record`: write down each rank's rows (recording.py).

        Raises:
            AssertionError: a rank failed; with the ends of all logs.
        """
        import torch.distributed as dist

        ranks = json.loads(run.plan.read_text())["topology"]["world_size"]
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # torchrun's agent has it too
        job = {"run_dir": str(run.path), "ranks": ranks, "port": store.port, "env": exports(run), "record": record}
        statuses = json.loads(self._ask(json.dumps(job)))
        logs = (f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(run.logs.glob("rank-*.log")))
        assert statuses == [0] * ranks, "\n".join([f"{run.path.name}: exit statuses {statuses}", *logs])

    def close(self) -> None:
        if self._server:
            self._server.stdin.close()
            self._server.wait(60)

    def _ask(self, line: str) -> str:
        if self._server is None:
            quiet = {
                "OMP_NUM_THREADS": "1",
                "JE_ARROW_MALLOC_CONF": "background_thread:false",
            }  # else imports start threads
            fixed = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
            command = [sys.executable, "-u", str(Path(__file__).with_name("warm_server.py"))]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._server = subprocess.Popen(command, env={**os.environ, **quiet, **fixed}, **pipes)
            assert self._answer() == "ready\n"
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        ready, _, _ = select.select([self._server.stdout], [], [], SECONDS)
        if not ready:
            self._server.kill()  # its ranks are ended by that too
            self._server = None
            raise AssertionError(f"no answer in {SECONDS} s")
        return self._server.stdout.readline()


def exports(run: RunDir) -> dict[str, str]:
    """The variables that a run's job script sets."""
    lines = re.findall(r"^export (\w+)=(.*)$", run.script.read_text(), re.MULTILINE)
    return {name: "".join(shlex.split(value)) for name, value in lines}
