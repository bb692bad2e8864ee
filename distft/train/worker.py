"""What every rank does before anything else, whatever it trains: its own log, its first error on disk, its strategy.

Imports nothing heavy: a package that fails to import must already end in this rank's log.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import yaml

from distft.errors import DistftError, Hang
from distft.runs.directory import RunDir
from distft.runs.files import write_atomically
from distft.runs.processes import die_with_parent
from distft.strategies.accelerate import accelerate_environment

_ended_well: list[bool] = []


def enter(run: RunDir) -> dict[str, Any]:
    """Set this process up as a rank of `run` and return its plan.json."""
    atexit.register(_leave)  # before all others, so that it runs after them
    rank = int(os.environ.get("RANK", "0"))
    die_with_parent()  # a torchrun that is killed outright must not leave its ranks behind, holding their GPUs
    _log_to(run, rank)
    _record_first_error(run, rank)
    plan = json.loads(run.plan.read_text())
    config = yaml.safe_load(run.accelerate.read_text())
    os.environ.update(accelerate_environment(config, plan["mixed_precision"]))
    return plan


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import the training stack: a million objects that stay, through which the garbage collector need not look.

    It takes a fifth of the time that the imports take.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def ended_well() -> None:
    """This rank has done its work. Its process ends without finalization, once its exit handlers are through.

    gloo's threads may meet an interpreter half gone there, and abort the rank:
    https://github.com/pytorch/pytorch/pull/179291. So do those of a destroyed group, while an engine refers to it.
    """
    _ended_well.append(True)


def _leave() -> None:
    if _ended_well:
        sys.stdout.flush()
        sys.stderr.flush()
        ctypes.CDLL(None).fflush(None)
        os._exit(0)


def _log_to(run: RunDir, rank: int) -> None:
    """Send standard output and error, C libraries' included, to logs/rank-N.log."""
    log = os.open(run.rank_log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable()


def _record_first_error(run: RunDir, rank: int) -> None:
    """Write an uncaught exception to logs/rank-N.error.json with its time: the earliest one is the cause.

    The ranks that lose their peer fail too, a moment later, with a network error that explains nothing.
    """
    default = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            record_error(run, rank, error)
        default(kind, error, trace)

    sys.excepthook = hook


def host() -> str:
    """This machine, as SLURM calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def record_error(run: RunDir, rank: int, error: BaseException, where: str | None = None) -> None:
    """Write logs/rank-N.error.json. `where`: the host to blame, "" for none; this one unless given."""
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
