"""Ranks that need not import the training stack: for tests in which the start of a rank is not the subject.

Importing torch, transformers, DeepSpeed and the others takes a rank longer than to train a tiny model. A server
(warm_server.py) imports them once and forks the ranks of job after job, of any strategy and world size. Each rank is a
process of its own that runs what `python -m distft.train RUN_DIR` runs, with nothing left of any job before it. The
command line, the supervisor and the job script are the real ones; torchrun is not there (warm_path/sitecustomize.py).
test_warm.py holds these ranks against those of a real launch, bit for bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from distft.runs.directory import RunDir

HERE = Path(__file__).parent
IMPORT_SECONDS = 120
VARIABLE = "DISTFT_WARM_RANKS"  # the server's socket
ONLY_TORCHRUN = {"DISTFT_WARM_ONLY": "torchrun"}  # which then starts ranks that import their stack


def real_environment() -> dict[str, str]:
    """os.environ without warm ranks, for a fixture in which torchrun matters."""
    return {name: value for name, value in os.environ.items() if name != VARIABLE}


class WarmRanks:
    """Started with the first use; `close` ends it."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")  # the path of a unix socket ends at 107 characters
        self._socket = Path(self._folder.name, "socket")
        path = [str(HERE / "warm_path"), os.environ.get("PYTHONPATH", "")]
        # Also for a launch with ranks of torchrun's: there, the stand-in stands aside.
        self.path = {"PYTHONPATH": os.pathsep.join(filter(None, path))}

    def environment(self) -> dict[str, str]:
        """Variables with which a launch has warm ranks."""
        if self._server is None:
            # Else numpy and Arrow start threads when they are imported.
            quiet = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
            fixed = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
            command = [sys.executable, "-u", str(HERE / "warm_server.py"), str(self._socket)]
            self._server = subprocess.Popen(
                command, env={**os.environ, **quiet, **fixed}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
            deadline = time.monotonic() + IMPORT_SECONDS
            while not self._socket.exists():
                assert self._server.poll() is None and time.monotonic() < deadline, "the warm ranks did not start"
                time.sleep(0.02)
        return {VARIABLE: str(self._socket), **self.path}

    def train(self, run: RunDir, timeout: float = 120) -> None:
        """Run the job script of a run directory, to its end. Each rank writes down its rows (logs/samples-RANK.jsonl).

        Raises:
            AssertionError: it failed; with the ends of all logs.
        """
        env = {**os.environ, **self.environment(), "DISTFT_RECORD_ROWS": "1"}
        done = subprocess.run(["bash", run.script], env=env, capture_output=True, text=True, timeout=timeout)
        logs = (f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(run.logs.glob("rank-*.log")))
        assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *logs])

    def close(self) -> None:
        if self._server:
            self._server.stdin.close()
            self._server.wait(60)
        self._folder.cleanup()
