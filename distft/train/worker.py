"""What every rank does first, whatever it trains: open its log, record its first error, take its strategy.

Nothing heavy is imported here: a package that cannot be imported must show in this rank's log.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from distft.errors import DistftError, Hang, PlanError
from distft.runs.directory import RunDir
from distft.runs.files import write_atomically
from distft.runs.processes import die_with_parent
from distft.strategies.accelerate import accelerate_environment

_status: list[int] = []  # what this rank ends with, once it knows


def enter(run: RunDir) -> dict[str, Any]:
    """Make this process a rank of `run`, and return the run's plan.json."""
    atexit.register(_leave)  # before all others, so that it runs after them
    rank = int(os.environ.get("RANK", "0"))
    die_with_parent()  # the ranks of a torchrun that is killed must not stay behind and hold their GPUs
    _log_to(run, rank)
    _record_first_error(run, rank)
    plan: dict[str, Any] = json.loads(run.plan.read_text())
    planned, started = plan["topology"]["world_size"], int(os.environ.get("WORLD_SIZE", "1"))
    if planned != started:
        raise PlanError(f"this run was planned for {planned} ranks, and {started} were started: start its job script")
    if plan["topology"]["gpu"] and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Before torch reads it. Without it the allocator was seen to take 4 to 49% more than tensors need (GAPS in
        # planner/memory.py). A value of the user's stays.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    config = yaml.safe_load(run.accelerate.read_text())
    # Of a DeepSpeed job accelerate.yaml has no precision.
    os.environ.update(accelerate_environment(config, config.get("mixed_precision") or plan["mixed_precision"]))
    return plan


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import the training stack without the garbage collector.

    It would look through a million objects that stay anyway, for a fifth of the time that the imports take.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def ended_well() -> None:
    """This rank has done its work: its process ends after its exit handlers, without the interpreter's finalization.
    So does one that fails: it may hold its GPU and wait for peers in a destructor.

    gloo's threads may meet a half finalized interpreter and abort the rank, even those of a destroyed group while an
    engine still refers to it: https://github.com/pytorch/pytorch/pull/179291.
    """
    _status.append(0)


def _leave() -> None:
    # torchrun makes a folder in TMPDIR for its ranks' errors, and leaves it there. Those of distft's ranks are in the
    # run directory.
    for folder in Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents:
        if folder.name.startswith("torchelastic_"):
            shutil.rmtree(folder, ignore_errors=True)
    if _status:
        sys.stdout.flush()
        sys.stderr.flush()
        ctypes.CDLL(None).fflush(None)
        os._exit(_status[0])


def _log_to(run: RunDir, rank: int) -> None:
    """Send standard output and error to logs/rank-N.log, C libraries' too."""
    log = os.open(run.rank_log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable()


def _record_first_error(run: RunDir, rank: int) -> None:
    """Have an uncaught exception written to logs/rank-N.error.json with its time: the earliest one is the cause.

    The ranks that lose a peer fail a moment later, with a network error that explains nothing.
    """
    default = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            record_error(run, rank, error)
        default(kind, error, trace)
        _status.append(1)

    sys.excepthook = hook


def host() -> str:
    """The name of this machine, in a SLURM job SLURM's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def record_error(run: RunDir, rank: int, error: BaseException, where: str | None = None) -> None:
    """Write logs/rank-N.error.json.

    `where` is the host to blame: this one unless given, "" for none. `user_error` in the file says that only a person
    can fix it, so that another attempt would end the same way.
    """
    record = {
        "rank": rank,
        "host": host() if where is None else where,
        "time": time.time(),
        "type": type(error).__name__,
        "message": str(error),
        "user_error": isinstance(error, DistftError) and not isinstance(error, Hang),
        "traceback": "".join(traceback.format_exception(error)),
    }
    with contextlib.suppress(OSError):  # a full disk may be the very error
        write_atomically(run.rank_error(rank), json.dumps(record))
