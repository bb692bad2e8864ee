"""Why a run failed: the first failing rank's own error, and the usual fix."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.extras import INSTALL
from distft.runs.directory import RunDir

# On the GPU, as torch, cuBLAS, NCCL and bitsandbytes say it. On the host a rank gets SIGKILL.
OUT_OF_MEMORY = (
    r"OutOfMemoryError|CUDA( error:)? out of memory|CU[A-Z]+_STATUS_ALLOC_FAILED|Cuda failure (\d+ )?'out of memory'|"
    r"Failed to CUDA (calloc|malloc)|Error out of memory at line"
)
LOST_PEER = r"Connection (reset|closed|refused)|[Tt]imed out|NCCL.*remote|ncclRemoteError"
# Packages of distft[train]; another one is a matter of the user's script.
TRAIN_PART = ("torch", "transformers", "accelerate", "peft", "trl", "deepspeed", "bitsandbytes", "datasets", "distft")
# Pattern in the error → the fix. The first that matches is shown. distft's own errors say their fix themselves.
HINTS = (
    (
        rf"(?m){OUT_OF_MEMORY}|can't allocate memory|Cannot allocate memory|std::bad_alloc",
        "out of memory: --set training.micro_batch_size=1, --set training.gradient_checkpointing=true, "
        "--set parallelism.strategy=zero3, or a shorter data.max_length",
    ),
    (
        rf"(?m)^ *(ModuleNotFoundError: |ImportError: cannot import name .* from '({'|'.join(TRAIN_PART)})\b)",
        f"a package is missing or of another version: {INSTALL}",
    ),
    (r"EADDRINUSE|[Aa]ddress already in use", "the port is in use by another process: launch again"),
    (r"No space left on device", "the disk is full: free some space, or set another output_dir"),
    (LOST_PEER, "a rank lost its peer: see the other ranks' logs"),
)
NO_MODULE = re.compile(r"(?m)^ *ModuleNotFoundError: No module named '([\w.]+)'")
ENDED = re.compile(
    r"time *: (\S+)\n *host *:.*\n *rank *: (\d+) \(local_rank: \d+\)\n *exitcode *: (-?\d+) +\(pid: (\d+)\)"
)
ENDED_BY_TORCHRUN = re.compile(r"Sending process (\d+) closing signal")
TAIL_LINES = 15


@dataclass(frozen=True)
class Failure:
    """What ended a run, and the rank that failed first."""

    reason: str  # one line, for status.json
    text: str  # for the terminal
    rank: int | None = None
    host: str | None = None  # to blame; "" if none is, None if at most its number is known (`node`)
    user_error: bool = False  # only a person can fix it: another attempt would end the same way
    node: int | None = None  # number of the node in the job
    out_of_memory: bool = False  # of the GPU


def rank_errors(run: RunDir) -> list[dict[str, Any]]:
    """Every rank's recorded error, the earliest first."""
    found = []
    for path in run.logs.glob("rank-*.error.json"):
        with contextlib.suppress(ValueError, OSError):  # cut short by a kill: the other ranks' still count
            found.append(json.loads(path.read_text()))
    return sorted(found, key=lambda error: float(error["time"]))


def job_logs(run: RunDir) -> list[Path]:
    """The output of torchrun, node by node; while that is empty, the logs of the SLURM jobs, the newest last."""
    torchrun = [path for path in sorted(run.logs.glob("torchrun*.log")) if path.stat().st_size]
    return torchrun or sorted(run.logs.glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)


def first_failure(run: RunDir, returncode: int) -> Failure:
    """What ended a run: the earliest recorded error, else the signal that killed a rank, else torchrun's last lines."""
    errors = rank_errors(run)
    logs = job_logs(run)
    log = "\n".join(path.read_text(errors="replace") for path in logs)
    silent = _silent_rank(logs, {error["rank"] for error in errors})
    # A rank that was killed could write nothing; those that lost it recorded a network error.
    own = [error for error in errors if not (silent and re.search(LOST_PEER, error["message"]))]
    if own:
        first = own[0]
        rank_log = run.rank_log(first["rank"])
        reason = f"rank {first['rank']}: {first['type']}: {_first_line(first['message'])}"
        where = f"rank {first['rank']}" + (f" on {first['host']}" if first["host"] else "") + " failed first"
        # What a person can fix needs no traceback, and a script that exits by itself has printed why.
        body = first["message"] if first["user_error"] else first["traceback"].rstrip()
        if first["type"] == "SystemExit":
            reason = f"rank {first['rank']} exited by itself with status {first['message']}"
            where, body = f"{reason}, on {first['host']}", _tail(rank_log.read_text(errors="replace"))
        said = f"{first['type']}: {first['message']}"
        text = _text(where, body, said, run.rank_log(first["rank"]), run)
        no_memory = re.search(OUT_OF_MEMORY, said, re.MULTILINE) is not None
        host = "" if re.search(LOST_PEER, first["message"]) else first["host"]
        return Failure(reason, text, first["rank"], host, first["user_error"], out_of_memory=no_memory)
    if silent:
        rank, number, node = silent
        how = f"was killed by {_signal_name(-number)}" if number < 0 else f"ended by itself with status {number}"
        reason = f"rank {rank} {how}"
        hint = " (the host ran out of memory, or someone killed it)" if number == -signal.SIGKILL else ""
        tail = _tail(run.rank_log(rank).read_text(errors="replace")) if run.rank_log(rank).exists() else ""
        host = "" if number == -signal.SIGABRT else None
        return Failure(reason, _text(reason + hint, tail, tail, run.rank_log(rank), run), rank, host, node=node)
    if bad := preflight_report(run).get("bad"):
        lines = [f"preflight: bad node {name}: {why}" for name, why in bad.items()]
        return Failure("; ".join(lines), _text(lines[0], "\n".join(lines[1:]), "", run.preflight, run))
    reason = f"ended with status {returncode} before it was done"
    return Failure(reason, _text(reason, _tail(log), log, logs[-1] if logs else run.logs, run))


def preflight_report(run: RunDir) -> dict[str, Any]:
    """logs/preflight.json (RunDir.preflight); {} where there is none that can be read."""
    try:
        report = json.loads(run.preflight.read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _silent_rank(logs: Sequence[Path], recorded: Collection[int]) -> tuple[int, int, int | None] | None:
    """Rank, exit code (-N: signal N) and node number of the first rank that ended without a word, so that its error is
    not `recorded`, from torchrun's summaries on all nodes:

          time      : 2026-01-31_23:59:59
          host      : node1
          rank      : 1 (local_rank: 1)
          exitcode  : -9 (pid: 7)

    What they call the root cause may be a rank that lost this one within the same second. Ranks that torchrun ended do
    not count, nor those that SLURM ended with SIGTERM. SIGABRT comes last: with it NCCL ends a rank that lost its peer.
    """
    found = []
    for path in logs:
        node, log = re.fullmatch(r"torchrun-(\d+)", path.stem), path.read_text(errors="replace")
        ended = ENDED_BY_TORCHRUN.findall(log)
        for time, rank, code, pid in ENDED.findall(log):
            number = int(code)
            spoke = number > 0 and int(rank) in recorded
            if number != -signal.SIGTERM and pid not in ended and not spoke:
                # What waits for a lost rank aborts or exits later than that rank ended.
                late = number > 0 or number == -signal.SIGABRT
                found.append((late, time, number > 0, int(rank), number, node and int(node[1])))
    return min(found)[3:] if found else None


def _text(where: str, body: str, searched: str, log: object, run: RunDir) -> str:
    hint = hint_for(searched, run.trains_recipe)
    lines = [where, *(f"  {line}" for line in body.splitlines()), f"log: {log}"]
    return "\n".join([*lines, f"hint: {hint}"] if hint else lines)


def hint_for(error: str, trains_recipe: bool) -> str | None:
    """The usual fix of an error, if one is known."""
    hint = None if trains_recipe else _hint_for_script(error)
    return hint or next((fix for pattern, fix in HINTS if re.search(pattern, error)), None)


def _hint_for_script(searched: str) -> str | None:
    """For a package that is not distft's: only the script knows what it needs."""
    found = NO_MODULE.search(searched)
    name = found and found[1].partition(".")[0]
    if name is None or name in TRAIN_PART:
        return None
    return (
        f"the script needs {name}, which the ranks' Python does not have: install it there (pip install {name}, if "
        "that is its name); if it is a file of your own, put its folder on PYTHONPATH"
    )


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


def _tail(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-TAIL_LINES:])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
