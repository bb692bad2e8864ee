"""A process that has imported the training stack, and forks the ranks of a job on request: see warm.py.

A line of JSON in is a job, a line of JSON out its exit statuses. Nothing else happens here: no second thread, no
process group, nothing computed. So every rank begins as one of torchrun's that has imported the same modules.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO, Any

import recording

TERM_SECONDS = 10  # for the ranks beside one that failed


def import_stack() -> None:
    """Import what ranks of all strategies import, and start no thread by it."""
    from distft.train import cpu_ranks, worker

    with worker.importing():
        for name in ("bitsandbytes", "deepspeed.runtime.zero.muon.original_muon"):
            cpu_ranks._import_uncompiled(name)  # as cpu_ranks.apply() does, which is for each rank to call
        import deepspeed  # noqa: F401

        import distft.train.__main__
        import distft.train.run  # noqa: F401
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads: a fork would lose all but one, with what they have locked"


def serve(answers: IO[str]) -> dict[str, Any] | None:
    """Fork the ranks of the jobs that come in. Returns a job in each of its ranks, None at the end of the input."""
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pids = {}
        for rank in range(job["ranks"]):
            if (pid := os.fork()) == 0:
                become(job, rank)
                return job
            pids[pid] = rank
        print(json.dumps(collect(pids)), file=answers, flush=True)
    return None


def become(job: dict[str, Any], rank: int) -> None:
    """Give a forked process what torchrun gives a rank."""
    import torch

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    local = {"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RESTART_COUNT": 0}
    sizes = {f"{of}WORLD_SIZE": job["ranks"] for of in ("", "LOCAL_", "ROLE_")} | {"GROUP_WORLD_SIZE": 1}
    master = {"MASTER_ADDR": "localhost", "MASTER_PORT": job["port"], "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in {**job["env"], **local, **sizes, **master}.items()})
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # OpenMP read the variable when torch was imported


def collect(pids: dict[int, int]) -> list[int]:
    """Exit statuses by rank, -N after signal N. As torchrun does, end the others when one has failed."""
    statuses: dict[int, int] = {}
    deadline = None
    while len(statuses) < len(pids):
        pid, status = os.waitpid(-1, 0 if deadline is None else os.WNOHANG)
        if pid:
            statuses[pids[pid]] = os.waitstatus_to_exitcode(status)
        left = [pid for pid, rank in pids.items() if rank not in statuses]
        if deadline is None and any(statuses.values()):
            deadline = time.monotonic() + TERM_SECONDS
            kill(left, signal.SIGTERM)
        elif deadline is not None:
            if time.monotonic() > deadline:
                kill(left, signal.SIGKILL)
            time.sleep(0.05)
    return [statuses[rank] for rank in range(len(pids))]


def kill(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # packages print while they are imported
    import_stack()
    job = serve(answers)
    if job is not None:  # this is a rank
        sys.argv = ["distft.train", job["run_dir"]]
        if job["record"]:
            recording.record_rows(job)
        from distft.train.__main__ import main

        main()
