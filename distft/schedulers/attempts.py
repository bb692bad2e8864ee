"""How an attempt at a run ended, and whether it goes on by itself.

A step of the job script: `python -m distft.schedulers.attempts RUN_DIR EXIT_STATUS BUDGET NODES` writes it into
status.json and prints what is next: `done`, `again` (on the same nodes), or `requeue [NODE,...]` (in the queue, without
these nodes). It fails where the run ends for good. With `begin` for the exit status: SLURM started the job once more;
with `refused`: it did not take the job back.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from distft.errors import RunError
from distft.jobs import replan
from distft.runs import checkpoints
from distft.runs.directory import RunDir
from distft.runs.failure import Failure, first_failure
from distft.schedulers import slurm
from distft.shell import quote

# A fault comes at any step; what fails at the same one again and again is a bug.
SAME_STEP = 3
SAME_NODE = 2


def conclude(run: RunDir, returncode: int) -> dict[str, Any]:
    """Write the end of a run into status.json, unless it did so itself.

    Raises:
        RunError: it failed or was stopped; the message says why.
    """
    status = run.read_status()
    if status.get("state") == "completed":
        return status
    if returncode == 0 and not run.recipe.exists():  # a script of one's own says nothing of itself
        return run.update_status(state="completed", ended=time.time(), reason=None)
    if stopped := _stopped(run):
        _end(run, state="preempted", reason=stopped)
        raise RunError(f"{stopped}; go on with: distft resume {quote(str(run.path))}")
    failure = first_failure(run, returncode)
    _end(run, state="failed", reason=failure.reason, exit_status=returncode)
    raise RunError(failure.text)


def _end(run: RunDir, **fields: Any) -> None:
    """Raises RunError where even this cannot be written."""
    try:
        run.update_status(ended=time.time(), **fields)
    except OSError as error:
        said = f"{fields['reason']}; nothing can be written to {run.path} ({error.strerror})"
        raise RunError(f"{said}: make room, then go on with: distft resume {quote(str(run.path))}") from None


def next_attempt(run: RunDir, returncode: int, budget: int, nodes: Sequence[str]) -> str:
    """What the job script does after an attempt; written down in status.json with the reason.

    Args:
        budget: attempts that may follow the first.
        nodes: of the job, the head node first.

    Raises:
        RunError: nothing: the run has ended.
    """
    status = run.read_status()
    if status.get("state") == "completed" or not run.recipe.exists():
        conclude(run, returncode)
        return "done"
    stopped = _stopped(run)
    failure = None if stopped else first_failure(run, returncode)
    if failure and failure.out_of_memory and budget and (change := less_memory(run, failure)):
        return change
    node = _node(failure, nodes) if failure else None
    attempts = run.add_attempt(stopped or failure.reason, node, fault=not stopped)
    if failure and _is_a_bug(attempts):
        why = f"failed {SAME_STEP} times at the same step, which is no fault of a machine's: {failure.reason}"
        _end(run, state="failed", reason=why, exit_status=returncode)
        raise RunError(why)
    if len(attempts) > budget or (failure and failure.user_error):
        conclude(run, returncode)
    run.set_aside()
    bad = _bad(attempts)
    requeued = bool(stopped or set(bad) & set(nodes))
    reason = f"{stopped or failure.reason}; {_goes_on(run)}" + (f", without {', '.join(bad)}" if bad else "")
    run.update_status(state="queued" if requeued else "running", reason=reason, stopped=None)
    return "requeue " + ",".join(bad) if requeued else "again"


def less_memory(run: RunDir, failure: Failure) -> str | None:
    """`again` with less GPU memory, where that is possible; see jobs/replan.py."""
    change = replan.less_memory(run)
    if change is None:
        return None
    run.add_attempt(f"{failure.reason}; {change}")
    run.set_aside()
    run.update_status(state="running", reason=f"out of GPU memory; {change}; {_goes_on(run)}")
    return "again"


def begin(run: RunDir, budget: int, nodes: Sequence[str]) -> str:
    """What a job does that SLURM started once more: `again`, or `requeue` where it got a node that failed twice.

    Raises:
        RunError: the budget is used up.
    """
    status = run.read_status()
    if status.get("state") == "completed":  # and its nodes were taken away before the job had ended
        return "done"
    attempts = status.get("attempts") or []
    if status.get("state") == "running":  # the last attempt could not conclude: its nodes were taken away
        # SLURM ends what is left of a job that lost a node with SIGTERM, so that it looks stopped too.
        down = slurm.down(status.get("nodes") or "")
        reason = f"node {down[0]} failed" if down else _stopped(run) or "SLURM took its nodes away"
        attempts = run.add_attempt(reason, down[0] if down else None, fault=bool(down))
        run.set_aside()
        run.update_status(reason=f"{reason}; {_goes_on(run)}", stopped=None)
        if len(attempts) > budget:
            _end(run, state="failed", reason=f"{reason}; it went on {budget} times before")
            raise RunError(reason)
    if set(_bad(attempts)) & set(nodes):
        run.update_status(state="queued")
        return "requeue " + ",".join(_bad(attempts))
    return "again"


def refused(run: RunDir) -> NoReturn:
    """What a job does that SLURM does not take back (JobRequeue=0, or somebody set the job so): it ends.

    Raises:
        RunError: always; it says how to go on.
    """
    last = next(reversed(run.read_status().get("attempts") or []), None)
    why = f"{last['reason'] if last else first_failure(run, 1).reason}; SLURM does not requeue it"
    _end(run, state="preempted" if last and not last["fault"] else "failed", reason=why)
    raise RunError(f"{why}; go on with: distft resume {quote(str(run.path))}")


def _goes_on(run: RunDir) -> str:
    saved = checkpoints.complete(run)
    return f"goes on from step-{saved[0].step}" if saved else "begins anew"


def _stopped(run: RunDir) -> str | None:
    """Why the run was stopped, and what is saved; None where it was not."""
    why = run.read_status().get("stopped") or run.stop_asked()
    if not why:
        return None
    saved = checkpoints.complete(run)
    return f"stopped: {why}" + (f"; step-{saved[0].step} is saved" if saved else "")


def _is_a_bug(attempts: Sequence[dict[str, Any]]) -> bool:
    last = attempts[-SAME_STEP:]
    return len(last) == SAME_STEP and all(a["fault"] and a["step"] == last[0]["step"] for a in last)


def _bad(attempts: Sequence[dict[str, Any]]) -> list[str]:
    """Nodes on which it failed more than once."""
    faults = Counter(a["node"] for a in attempts if a["fault"] and a["node"])
    return sorted(node for node, times in faults.items() if times >= SAME_NODE)


def _node(failure: Failure, nodes: Sequence[str]) -> str | None:
    """The node to blame."""
    if failure.host is None and failure.node is not None:
        return nodes[failure.node]
    return failure.host or None


def main(folder: str, returncode: str, budget: str, names: str) -> None:
    run, nodes = RunDir(Path(folder)), names.split()
    try:
        if returncode == "begin":
            word = begin(run, int(budget), nodes)
        elif returncode == "refused":
            refused(run)
        else:
            word = next_attempt(run, int(returncode), int(budget), nodes)
        print(word)
    except (RunError, OSError) as error:
        sys.exit(f"failed: {next(iter(str(error).splitlines()))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
