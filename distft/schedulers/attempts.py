"""How an attempt at a run ended, and what follows: the one place where attempts are counted.

The job script asks after each of its steps, `python -m distft.schedulers.attempts RUN_DIR MAX_REQUEUES STEP EXIT_STATUS
NODES`, which writes the answer into status.json and prints it: `done`, `again` (on the same nodes), or `requeue
[NODE,...]` (back into the queue, without these nodes). It fails where the run ends for good. Two steps have no exit
status, 0 stands for it: `begin` (SLURM started the job once more) and `refused` (SLURM did not take the job back).
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from distft.errors import RunError
from distft.jobs import replan
from distft.jobs.replan import Change
from distft.runs import checkpoints, failure
from distft.runs.attempts import new_attempt, record_attempt, set_aside, write_files
from distft.runs.directory import RunDir
from distft.runs.failure import Failure, first_failure
from distft.runs.status import Attempt, Cause, State, Status, read_status, update_status
from distft.runs.stop_file import stop_asked
from distft.schedulers import slurm
from distft.shell import quote

# Hardware fails at any step; what fails at the same one again and again is a bug.
SAME_STEP = 3
SAME_NODE = 2  # faults on a node before it is left out


class Step(str, Enum):
    """The steps of the job script after which it asks what is next."""

    BEGIN = "begin"
    PREFLIGHT = "preflight"
    PREPARE = "prepare"
    TRAIN = "train"
    REFUSED = "refused"


class Next(str, Enum):
    """What the job script does next."""

    DONE = "done"
    AGAIN = "again"
    REQUEUE = "requeue"
    FAIL = "fail"


@dataclass(frozen=True)
class Decision:
    """What is next, and what status.json says about it."""

    next: Next
    state: State
    reason: str = ""
    excluded: tuple[str, ...] = ()  # nodes to do without
    less_memory: bool = False  # the next attempt needs less GPU memory


def decide(
    status: Status, ended: Attempt | None, step: Step, budget: int, nodes: Sequence[str], saved: int | None
) -> Decision:
    """What follows an attempt. Reads and writes nothing.

    Args:
        status: before this attempt ended, with the earlier ones.
        ended: the attempt; None where nothing went wrong.
        budget: attempts that may follow the first, whatever ended them.
        nodes: the nodes of the job.
        saved: the step of the newest complete checkpoint.
    """
    if ended is None:
        if step is Step.BEGIN and status.state is not State.COMPLETED:
            return Decision(Next.AGAIN, State.RUNNING)
        return Decision(Next.DONE, State.COMPLETED)
    attempts = [*status.attempts, ended]
    if step is not Step.BEGIN and _is_a_bug(attempts):  # not where nodes were lost
        why = f"failed {SAME_STEP} times at the same step: likely a bug, not hardware ({ended.reason})"
        return Decision(Next.FAIL, State.FAILED, why)
    if ended.cause is Cause.ERROR or len(attempts) > budget:
        used_up = budget > 0 and ended.cause is not Cause.ERROR
        why = ended.reason + (f"; max_requeues is used up ({budget})" if used_up else "")
        return Decision(Next.FAIL, _last_state(status, ended), why)
    excluded = bad_nodes(attempts)
    without = f", without {', '.join(excluded)}" if excluded else ""
    continues = f"continues after step {saved}" if saved is not None else "restarts from the beginning"
    reason = f"{ended.reason}; {continues}{without}"
    less_memory = ended.cause is Cause.OUT_OF_MEMORY
    gives_up_nodes = step is not Step.BEGIN and ended.cause in (Cause.STOPPED, Cause.BAD_NODES)
    if gives_up_nodes or set(excluded) & set(nodes):
        return Decision(Next.REQUEUE, State.QUEUED, reason, excluded, less_memory)
    return Decision(Next.AGAIN, State.RUNNING, reason, less_memory=less_memory)


def bad_nodes(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Nodes that failed the preflight, or on which the run failed more than once."""
    faults = Counter(attempt.node for attempt in attempts if attempt.cause is Cause.FAULT and attempt.node)
    often = {node for node, times in faults.items() if times >= SAME_NODE}
    return tuple(sorted(often.union(*(attempt.bad_nodes for attempt in attempts))))


def _is_a_bug(attempts: Sequence[Attempt]) -> bool:
    last = attempts[-SAME_STEP:]
    same = all(attempt.cause is Cause.FAULT and attempt.step == last[0].step for attempt in last)
    return len(last) == SAME_STEP and same


def _last_state(status: Status, ended: Attempt) -> State:
    """The state of a run that this attempt ends: SLURM took its nodes, someone stopped the launcher, or it failed."""
    if ended.cause is not Cause.STOPPED:
        return State.FAILED
    return State.STOPPED if status.is_local else State.PREEMPTED


# ---- gathering the facts


@dataclass(frozen=True)
class Ending:
    """An attempt that ended before the run was done."""

    attempt: Attempt
    text: str = ""  # for the terminal, where there is more to show than the attempt's reason
    change: Change | None = None  # with which the next one needs less memory


def _ending(
    run: RunDir, status: Status, step: Step, returncode: int, nodes: Sequence[str], less_memory: bool
) -> Ending | None:
    """How a step of the job script ended; None where the run is done. `less_memory`: look for a way to need less."""
    if status.state is State.COMPLETED:
        return None
    if returncode == 0 and not run.trains_recipe:  # a user's script does not write status.json
        return None
    if why := _stopped(run, status):
        return Ending(new_attempt(run, why, Cause.STOPPED))
    found = first_failure(run, returncode)
    bad = _bad_in_preflight(run, nodes) if step is Step.PREFLIGHT else ()
    node = None if bad else _blamed(found, nodes)
    if bad:
        cause = Cause.BAD_NODES
    elif found.user_error or step is not Step.TRAIN or not run.trains_recipe:
        cause = Cause.ERROR
    elif found.out_of_memory and less_memory and (change := replan.less_memory(run)):
        return _out_of_memory(run, found, change)
    else:
        cause = Cause.FAULT
    return Ending(new_attempt(run, found.reason, cause, node, bad), found.text)


def _out_of_memory(run: RunDir, found: Failure, change: Change) -> Ending:
    attempt = new_attempt(run, f"{found.reason}; {change.text}", Cause.OUT_OF_MEMORY)
    return Ending(attempt, found.text, change)


def _at_begin(run: RunDir, status: Status, nodes: Sequence[str]) -> Ending | None:
    """What a job that was started once more has to count: an attempt that could not say how it ended, or bad nodes."""
    if status.state is State.RUNNING:  # the last attempt was cut off: its nodes were taken away
        # SLURM ends what is left of a job that lost a node with SIGTERM, so the run looks stopped, too.
        down = slurm.down(status.nodes or "")
        if down:
            return Ending(new_attempt(run, f"node {down[0]} failed", Cause.FAULT, down[0]))
        return Ending(new_attempt(run, _stopped(run, status) or "SLURM took its nodes away", Cause.STOPPED))
    if again := sorted({*bad_nodes(status.attempts)} & {*nodes}):  # SLURM did not take the change of ExcNodeList
        given = ", ".join(again)
        return Ending(new_attempt(run, f"SLURM assigned {given} again", Cause.BAD_NODES, bad_nodes=tuple(again)))
    return None


def _stopped(run: RunDir, status: Status) -> str | None:
    """Why the run was stopped, and what is saved; None if it was not."""
    why = status.stop_reason or stop_asked(run)
    if not why:
        return None
    saved = _saved(run)
    return f"stopped: {why}" + (f"; step-{saved} is saved" if saved is not None else "")


def _saved(run: RunDir) -> int | None:
    found = checkpoints.complete(run)
    return found[0].step if found else None


def _blamed(found: Failure, nodes: Sequence[str]) -> str | None:
    """The node to blame."""
    if found.host is None and found.node is not None and found.node < len(nodes):
        return nodes[found.node]
    return found.host or None


def _bad_in_preflight(run: RunDir, nodes: Sequence[str]) -> tuple[str, ...]:
    """Bad nodes as SLURM calls them: inside a container the preflight knows them by number only."""
    report = failure.preflight_report(run)
    known = dict(zip(report.get("nodes", ()), nodes, strict=False))
    return tuple(known.get(name, name) for name in report.get("bad", ()))


# ---- carrying a decision out


def next_attempt(run: RunDir, step: Step, returncode: int, budget: int, nodes: Sequence[str]) -> Decision:
    """What the job script does after one of its steps; written to status.json.

    Args:
        budget: attempts that may follow the first.
        nodes: of the job, the head node first.

    Raises:
        RunError: nothing: the run has ended.
    """
    status = read_status(run)
    if step is Step.BEGIN:
        ending = None if status.state is State.COMPLETED else _at_begin(run, status, nodes)
    else:
        ending = _ending(run, status, step, returncode, nodes, less_memory=len(status.attempts) < budget)
        if ending and ending.attempt.cause is Cause.STOPPED and not run.trains_recipe:
            budget = 0  # a user's script saves nothing when it is stopped
    if ending is None:
        decision = decide(status, None, step, budget, nodes, None)
        if decision.next is Next.AGAIN:
            update_status(run, state=decision.state, nodes=os.environ.get("SLURM_JOB_NODELIST"))
        else:
            _done(run, status)
        return decision
    decision = decide(status, ending.attempt, step, budget, nodes, _saved(run))
    if decision.next is Next.FAIL:
        attempts = (*status.attempts, ending.attempt)
        _fail(run, ending, decision.state, decision.reason, None if step is Step.BEGIN else returncode, attempts)
    _continue(run, ending, decision)
    return decision


def less_memory(run: RunDir, found: Failure) -> bool:
    """Have a run on this machine that ran out of GPU memory start again with less. False if there is no way."""
    change = replan.less_memory(run)
    if change is None:
        return False
    status, ending = read_status(run), _out_of_memory(run, found, change)
    budget = len(status.attempts) + 1  # every change leaves fewer to make
    _continue(run, ending, decide(status, ending.attempt, Step.TRAIN, budget, (), _saved(run)))
    return True


def conclude(run: RunDir, returncode: int) -> Status:
    """Write the end of a run on this machine to status.json, unless the run did so.

    Raises:
        RunError: it failed or was stopped; the message says why.
    """
    status = read_status(run)
    ending = _ending(run, status, Step.TRAIN, returncode, (), less_memory=False)
    if ending is None:
        return _done(run, status)
    return _fail(run, ending, _last_state(status, ending.attempt), ending.attempt.reason, returncode)


def refused(run: RunDir) -> NoReturn:
    """End a job that SLURM does not take back (JobRequeue=0, or someone set the job so).

    Raises:
        RunError: always; it says how to resume.
    """
    status = read_status(run)
    last = status.attempts[-1]  # the one after which it was to be requeued
    _fail(run, Ending(last), _last_state(status, last), f"{last.reason}; SLURM does not requeue it")


def _done(run: RunDir, status: Status) -> Status:
    if status.state is State.COMPLETED:
        return status
    return update_status(run, state=State.COMPLETED, ended=time.time(), reason=None)


def _continue(run: RunDir, ending: Ending, decision: Decision) -> None:
    if decision.less_memory and ending.change:
        write_files(run, ending.change.files)
    record_attempt(run, ending.attempt, state=decision.state, reason=decision.reason, stop_reason=None)
    set_aside(run)


def _fail(
    run: RunDir,
    ending: Ending,
    state: State,
    reason: str,
    exit_status: int | None = None,
    attempts: Sequence[Attempt] | None = None,
) -> NoReturn:
    """Write that the run has ended, and raise RunError, also where this cannot be written."""
    fields: dict[str, Any] = {} if attempts is None else {"attempts": attempts}
    if ending.attempt.cause is not Cause.STOPPED:  # else errors of ranks, if any, do not explain the end
        fields["exit_status"] = exit_status
    resume = f"resume it with: distft resume {quote(str(run.path))}"
    try:
        update_status(run, state=state, reason=reason, ended=time.time(), **fields)
    except OSError as error:
        what = f"{reason}; nothing can be written to {run.path} ({error.strerror})"
        raise RunError(f"{what}: free some space, then {resume}") from None
    if not ending.text:
        raise RunError(f"{reason}; {resume}")
    raise RunError(ending.text if reason == ending.attempt.reason else f"{reason}\n{ending.text}")


def main(folder: str, max_requeues: str, step: str, returncode: str, names: str) -> None:
    run = RunDir(Path(folder))
    try:
        if step == Step.REFUSED:
            refused(run)
        decision = next_attempt(run, Step(step), int(returncode), int(max_requeues), names.split())
    except (RunError, OSError) as error:
        sys.exit(f"failed: {next(iter(str(error).splitlines()))}")
    without = f" {','.join(decision.excluded)}" if decision.next is Next.REQUEUE and decision.excluded else ""
    print(f"{decision.next.value}{without}")


if __name__ == "__main__":
    main(*sys.argv[1:])
