"""status.json: how a run is doing. The only module that reads or writes it.

Several programs read the file while a run changes it, so it is replaced in one piece. It may come from another version
of distft: keys that are not known here survive an update.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from distft.runs.directory import RunDir
from distft.runs.files import write_atomically

_WRITING = threading.Lock()  # the training and the thread that saves checkpoints both write
# In the file even where they are not known yet: outside programs rely on them.
ALWAYS = ("state", "job_id", "step", "started", "ended", "reason", "eval_loss_before", "eval_loss_after")
LOCAL = "local:"  # how the job id of a run begins that SLURM did not start


class State(str, Enum):
    """The state of a run."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PREEMPTED = "preempted"  # SLURM took its nodes: preemption, a time limit
    STOPPED = "stopped"  # a signal to the local launcher (Ctrl-C): it saved and ended

    def __str__(self) -> str:
        return self.value

    @property
    def finished(self) -> bool:
        """Whether a run in this state has ended. Only `distft resume` lets it continue."""
        return self not in (State.QUEUED, State.RUNNING)


class Cause(str, Enum):
    """Why an attempt ended."""

    STOPPED = "stopped"  # it was asked to, or SLURM took its nodes away
    FAULT = "fault"  # a rank or a node failed, maybe because of the machine
    BAD_NODES = "bad_nodes"  # found by the preflight, before anything was trained
    OUT_OF_MEMORY = "out_of_memory"  # on the GPU, and there is a way to need less
    ERROR = "error"  # another attempt would end the same way

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Attempt:
    """An attempt at a run that ended before the run was done."""

    time: float  # seconds since the epoch
    step: int  # the last one in metrics.jsonl
    reason: str
    cause: Cause = Cause.STOPPED
    node: str | None = None  # to blame for it
    bad_nodes: tuple[str, ...] = ()  # found by the preflight
    logs: str = ""  # the folder in logs/ with its errors and torchrun's output

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Attempt:
        known: dict[str, Any] = {"time": 0.0, "step": 0, "reason": ""}
        known |= {f.name: raw[f.name] for f in dataclasses.fields(cls) if raw.get(f.name) is not None}
        known["cause"] = _member(Cause, raw.get("cause")) or Cause.STOPPED
        known["bad_nodes"] = tuple(raw.get("bad_nodes") or ())
        return cls(**known)


@dataclass(frozen=True)
class Status:
    """status.json. What is not known (yet) is None, or empty."""

    state: State | None = None  # None before the first write
    job_id: str | None = None  # SLURM's, or the launcher's (schedulers/launcher.py)
    name: str | None = None
    nodes: str | None = None  # as SLURM writes them: node[1-4]
    started: float | None = None  # seconds since the epoch, as `ended`
    ended: float | None = None

    step: int | None = None
    max_steps: int | None = None
    loss_type: str | None = None  # of the training, where it is not the plain cross-entropy
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None

    reason: str | None = None  # why it is in this state
    exit_status: int | None = None
    stop_reason: str | None = None  # why the ranks saved and stopped, in their words
    attempts: Sequence[Attempt] = ()  # those that ended
    checkpoint_problem: str | None = None
    warnings: Sequence[str] = ()  # of this attempt, known once its data is prepared
    saves: Sequence[Mapping[str, Any]] = ()  # the newest: step, seconds, seconds without training, problem

    data: Mapping[str, Any] = field(default_factory=dict)  # documents, rows and tokens of each split
    identity: Mapping[str, Any] = field(default_factory=dict)  # what a checkpoint must have in common to continue it
    versions: Mapping[str, str | None] = field(default_factory=dict)  # of the training stack
    base: Mapping[str, str] = field(default_factory=dict)  # the base's id on the hub, licence and class
    ran: Mapping[str, Any] = field(default_factory=dict)  # what was really wrapped: engine, mesh, backend
    accepted: Sequence[str] = ()  # differences from the checkpoint's identity that `resume --force` accepted
    owner: str | None = None  # first rank of the newest attempt: an older one that still runs ends when it reads this
    restore_seconds: float | None = None

    # What SLURM says at the moment; shown, never written.
    slurm_state: str | None = None
    expected_start: str | None = None  # or the actual one

    other: Mapping[str, Any] = field(default_factory=dict)  # keys of another version
    damaged: str | None = None  # why status.json cannot be read; never written

    @property
    def finished(self) -> bool:
        return self.state is not None and self.state.finished

    @property
    def is_local(self) -> bool:
        """Whether a launcher on some machine runs it, and not a batch job of SLURM's."""
        return (self.job_id or "").startswith(LOCAL)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Status:
        """Raises ValueError where a known key has a value of another kind."""
        names = {f.name for f in dataclasses.fields(cls)} - {"other", "damaged"}
        check_kinds(raw)
        known: dict[str, Any] = {name: raw[name] for name in names if raw.get(name) is not None}
        known["state"] = _member(State, raw.get("state"))
        known["attempts"] = tuple(Attempt.from_json(attempt) for attempt in raw.get("attempts") or ())
        return cls(**known, other={name: value for name, value in raw.items() if name not in names})

    def to_json(self) -> dict[str, Any]:
        """As it is in the file and in the output of `--json`: null where a key of ALWAYS is not known."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "other"}
        found["attempts"] = [dataclasses.asdict(attempt) for attempt in self.attempts]
        empty: tuple[Any, ...] = (None, {}, [], ())
        return {n: value for n, value in found.items() if n in ALWAYS or value not in empty} | dict(self.other)


def _member(kind: Any, value: Any) -> Any:
    """The member of an enum with this value, None if there is none."""
    try:
        return kind(value)
    except ValueError:
        return None


# What the keys hold that are there and not null.
KINDS: Mapping[str, tuple[tuple[type, ...], Sequence[str]]] = {
    "a text": (
        (str,),
        (
            *("state", "job_id", "name", "nodes", "loss_type", "reason", "stop_reason", "checkpoint_problem", "owner"),
            *("slurm_state", "expected_start"),
        ),
    ),
    "a number": (
        (int, float),
        ("started", "ended", "eval_loss_before", "eval_loss_after", "restore_seconds"),
    ),
    "a whole number": ((int,), ("step", "max_steps", "exit_status")),
    "a list": ((list,), ("attempts", "warnings", "saves", "accepted")),
    "an object": ((dict,), ("data", "identity", "versions", "base", "ran")),
}
ATTEMPT = {"time": (int, float), "step": (int,), "reason": (str,), "node": (str,), "bad_nodes": (list,), "logs": (str,)}


def check_kinds(raw: Any) -> None:
    """Raises ValueError where status.json has a value of another kind than its readers expect."""
    if not isinstance(raw, dict):
        raise ValueError("it is no object")
    for what, (kinds, names) in KINDS.items():
        for name in names:
            if raw.get(name) is not None and (type(raw[name]) not in kinds):
                raise ValueError(f"{name}: got {json.dumps(raw[name])[:40]}, not {what}")
    for name, kind in (("attempts", dict), ("saves", dict), ("warnings", str), ("accepted", str)):
        if not all(isinstance(item, kind) for item in raw.get(name) or ()):
            raise ValueError(f"{name}: has something else than {'objects' if kind is dict else 'texts'}")
    for attempt in raw.get("attempts") or ():
        for name, kinds in ATTEMPT.items():
            if attempt.get(name) is not None and type(attempt[name]) not in kinds:
                raise ValueError(f"attempts: {name} is {json.dumps(attempt[name])[:40]}")


def read_status(run: RunDir) -> Status:
    """The status of a run; an empty one before the first write. One that cannot be read says why (`damaged`)."""
    try:
        return Status.from_json(json.loads(run.status.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Status()
    except OSError as error:
        return Status(damaged=f"{run.status.name}: {error.strerror or error}")
    except (ValueError, RecursionError) as error:
        return Status(damaged=f"{run.status.name} is damaged: {str(error).splitlines()[0]}")


def update_status(run: RunDir, **fields: Any) -> Status:
    """Change fields of status.json. Readers see the old or the new file, never half of one.

    Raises:
        OSError: it cannot be written.
    """
    with _WRITING:
        status = dataclasses.replace(read_status(run), damaged=None, **fields)
        if status.job_id is None and (jobs := job_ids(run)):  # a rendered folder that was submitted by hand
            status = dataclasses.replace(status, job_id=jobs[-1])
        write_atomically(run.status, json.dumps(status.to_json(), indent=1) + "\n")
    return status


def job_ids(run: RunDir) -> list[str]:
    """SLURM's ids of this run's jobs, the current one last: the job script adds its own each time it starts."""
    try:
        return run.job_ids.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []


def add_job_id(run: RunDir, job_id: str) -> None:
    with run.job_ids.open("a") as file:
        file.write(f"{job_id}\n")
