"""Traces side by side, in forked processes: each is Python on one core."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from distft.errors import SimulationError
from distft.runs.processes import die_with_parent

T = TypeVar("T")
R = TypeVar("R")


def in_processes(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What `function` gives for each item, on as many cores as this process may use.

    A single item is forked, too: where there is a GPU, autograd refuses to go backward in a process that is forked
    after its parent has. Here only where the system is not Linux.

    Raises:
        SimulationError: a process was ended from outside.
    """
    if sys.platform != "linux" or not items:
        return [function(item) for item in items]
    workers = min(len(items), len(os.sched_getaffinity(0)))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start, (function,))
    try:
        return list(pool.map(_call, items))
    except BrokenProcessPool:
        raise SimulationError("a process that traced a step was killed; out of memory, perhaps") from None
    finally:
        pool.shutdown(cancel_futures=True)


_function: list[Callable[[Any], Any]] = []  # of a forked process: what it calls need not be pickled


def _start(function: Callable[[Any], Any]) -> None:
    """First in a forked process."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all: no traceback of each
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _function.append(function)


def _call(item: Any) -> Any:
    return _function[0](item)
