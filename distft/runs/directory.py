"""The run directory. The only module that knows the names of the files in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.errors import RecipeError

RECIPE, PLAN, DS_CONFIG, ACCELERATE = "recipe.yaml", "plan.json", "ds_config.json", "accelerate.yaml"
SCRIPT, SBATCH, SWEEP, CLUSTER = "job.sh", "job.sbatch", "sweep.json", "cluster.yaml"
# In status.json: of how a run ended, which is no longer true of one that goes on.
OF_AN_END = (
    "ended",
    "reason",
    "job_id",
    "stopped",
    "attempts",
    "exit_status",
    "eval_loss_after",
    "checkpoint_problem",
)
FINISHED = ("completed", "failed", "cancelled", "preempted")
_WRITING = threading.Lock()  # status.json, by the training and by the thread that saves
BLOCK = 2**16  # bytes of a file that grows, at a time


@dataclass(frozen=True)
class RunDir:
    """A run directory: recipe.yaml, plan.json, configs, job script, logs/, checkpoints/, final/, metrics, status."""

    path: Path

    @classmethod
    def next_free(cls, output_dir: str, name: str) -> RunDir:
        """The first of NAME, NAME-2, NAME-3, ... that does not exist. Nothing is made."""
        base = Path(output_dir).absolute()
        return next(cls(path) for path in _candidates(base, name) if not path.exists())

    @classmethod
    def create(cls, output_dir: str, name: str, exact: bool = False) -> RunDir:
        """Make it. mkdir decides when two launches want the same name at once.

        Raises:
            RecipeError: output_dir cannot be written, or `exact` and the name is taken.
        """
        base = Path(output_dir).absolute()
        try:
            base.mkdir(parents=True, exist_ok=True)
            for path in _candidates(base, name):
                try:
                    path.mkdir()
                except FileExistsError:
                    if exact:
                        raise RecipeError(f"{path}: exists already; name a new folder") from None
                    continue
                (path / "logs").mkdir()
                return cls(path)
        except OSError as error:
            raise RecipeError(f"output_dir: {base} cannot be written ({error.strerror})") from None
        raise AssertionError("unreachable: the candidates do not end")

    @classmethod
    def find(cls, word: str, output_dir: str = "runs") -> RunDir:
        """The run called `word`: a run directory, or its name under `output_dir`.

        Raises:
            RecipeError: there is no such run.
        """
        for path in (Path(word), Path(output_dir) / word):
            if (path / "status.json").is_file():
                return cls(path.absolute())
        known = sorted(p.parent.name for p in Path(output_dir).glob("*/status.json"))
        import difflib  # only for a name that is wrong

        some = difflib.get_close_matches(word, known, 3, 0.5) or known[-8:]
        more = f" and {len(known) - len(some)} more" if len(known) > len(some) else ""
        hint = f"; {output_dir}/ has {', '.join(some)}{more}" if known else f"; {output_dir}/ has none"
        raise RecipeError(f"RUN: got {word!r}, no run directory of that name or path{hint}")

    @property
    def name(self) -> str:
        """What `distft status` and its like call it: its folder's name, `SWEEP/NUMBER` in a sweep."""
        parent = self.path.parent
        return f"{parent.name}/{self.path.name}" if (parent / SWEEP).is_file() else self.path.name

    @property
    def recipe(self) -> Path:
        return self.path / RECIPE

    @property
    def plan(self) -> Path:
        return self.path / PLAN

    @property
    def ds_config(self) -> Path:
        return self.path / DS_CONFIG

    @property
    def accelerate(self) -> Path:
        return self.path / ACCELERATE

    @property
    def script(self) -> Path:
        """The job script: job.sbatch of a SLURM job, job.sh of a local one."""
        sbatch = self.path / SBATCH
        return sbatch if sbatch.exists() else self.path / SCRIPT

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def last_metrics(self) -> dict[str, Any]:
        """The newest line of metrics.jsonl, {} before the first; reads its end only."""
        try:
            with self.metrics.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2**14))
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return {}
        return json.loads(lines[-1]) if lines else {}

    def metrics_file(self) -> int | None:
        """Which file metrics.jsonl is (its inode), None while there is none."""
        try:
            return self.metrics.stat().st_ino
        except FileNotFoundError:
            return None

    def cut_metrics(self, step: int) -> None:
        """Leave out the steps after `step`, which are trained again."""
        kept = [line for line in read_metrics(self.metrics)[0] if line["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def rank_error(self, rank: int) -> Path:
        """What the rank's first uncaught exception was, as JSON."""
        return self.logs / f"rank-{rank}.error.json"

    def rank_note(self, rank: int) -> Path:
        """Made by a rank that waits for others in vain."""
        return self.logs / f"rank-{rank}.waits"

    def rank_errors(self) -> list[dict[str, Any]]:
        """Every rank's error, earliest first."""
        found = []
        for path in self.logs.glob("rank-*.error.json"):
            with contextlib.suppress(ValueError, OSError):  # cut short by a kill: the other ranks' still count
                found.append(json.loads(path.read_text()))
        return sorted(found, key=lambda error: error["time"])

    @property
    def stop(self) -> Path:
        """Why the run is to stop: asked by the launcher or the job script, read by the ranks. Empty: it is not."""
        return self.logs / "stop"

    def ask_to_stop(self, why: str) -> None:
        self.stop.write_text(f"{why}\n")

    def stop_asked(self) -> str | None:
        try:
            return self.stop.read_text().strip() or None
        except OSError:
            return None

    @property
    def torchrun_log(self) -> Path:
        """What torchrun and the job script say; under SLURM each node's torchrun has torchrun-N.log of its own."""
        return self.logs / "torchrun.log"

    def job_logs(self) -> list[Path]:
        """What torchrun said, node by node; until it has said anything, those of SLURM's jobs, the last one last."""
        torchrun = [path for path in sorted(self.logs.glob("torchrun*.log")) if path.stat().st_size]
        return torchrun or sorted(self.logs.glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)

    @property
    def preflight(self) -> Path:
        """What the preflight found: nodes, bad ones with the reason, warnings, reports."""
        return self.logs / "preflight.json"

    def jobs(self) -> list[str]:
        """SLURM's ids of this run's jobs, the current one last: a job may submit itself again."""
        try:
            return (self.logs / "jobs").read_text().split()
        except FileNotFoundError:
            return []

    def add_job(self, job_id: str) -> None:
        with (self.logs / "jobs").open("a") as file:
            file.write(f"{job_id}\n")

    def fill(self, files: Mapping[str, str], name: str, resumed: bool = False) -> None:
        """Write the files of a run that is to start, by name, and its first status; or of one that `resumed`.

        Raises:
            RecipeError: they cannot be written; the run directory is removed, unless it has a past.
        """
        try:
            if resumed:
                self.set_aside()
                for file in {SCRIPT, SBATCH, DS_CONFIG} - files.keys():  # another place or strategy
                    (self.path / file).unlink(missing_ok=True)
            self.write(files)
            again = dict.fromkeys(OF_AN_END) if resumed else {}
            self.update_status(state="queued", name=name, **again)
        except OSError as error:
            if not resumed:
                shutil.rmtree(self.path, ignore_errors=True)
            raise RecipeError(f"output_dir: {self.path} cannot be written ({error.strerror})") from None

    def write(self, files: Mapping[str, str]) -> None:
        """Write files of the run by name."""
        for name, text in files.items():
            write_atomically(self.path / name, text)

    def add_attempt(self, reason: str, node: str | None = None, fault: bool = False) -> list[dict[str, Any]]:
        """Note in status.json how an attempt ended, and move its last words aside. Returns all attempts.

        A `fault` is a machine's, in so far as it is not the same step's again and again.
        """
        attempts = self.read_status().get("attempts") or []
        step = self.last_metrics().get("step", 0)
        ended = {"time": time.time(), "step": step, "reason": reason, "node": node, "fault": fault}
        attempts.append({**ended, "logs": self._aside().name})
        self.update_status(attempts=attempts)
        return attempts

    def set_aside(self) -> None:
        """Move what an attempt says of its end to logs/attempt-N: it must not explain the end of the next one."""
        ended = [*self.logs.glob("rank-*.error.json"), *self.logs.glob("torchrun*.log"), *self.logs.glob("stop")]
        ended += self.logs.glob("rank-*.waits")
        if ended:
            folder = self._aside()
            folder.mkdir()
            for path in ended:
                path.rename(folder / path.name)

    def _aside(self) -> Path:
        """Where the next attempt that ends has its logs."""
        return self.logs / f"attempt-{1 + sum(1 for _ in self.logs.glob('attempt-*'))}"

    def read_status(self) -> dict[str, Any]:
        """status.json; {} before the first write."""
        try:
            return json.loads(self.status.read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def update_status(self, **fields: Any) -> dict[str, Any]:
        """Lay `fields` over status.json. Readers see the old or the new file, never half of one."""
        empty = dict.fromkeys(("state", "job_id", "step", "started", "ended", "reason"))
        with _WRITING:
            status = empty | self.read_status() | fields
            if status["job_id"] is None and (jobs := self.jobs()):  # a rendered folder that was submitted by hand
                status["job_id"] = jobs[-1]
            write_atomically(self.status, json.dumps(status, indent=1) + "\n")
        return status


def _candidates(base: Path, name: str) -> Iterator[Path]:
    yield base / name
    number = 2
    while True:
        yield base / f"{name}-{number}"
        number += 1


def write_atomically(path: Path, text: str) -> None:
    """Write beside and rename: a reader never sees half a file."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_metrics(path: Path, start: int = 0, limit: int = -1) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a metrics.jsonl from byte `start` on, and the byte after the last of them.

    `limit` is in bytes, and more than a line has; without it, the lines of a long run take memory by the gigabyte.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(limit)
    except FileNotFoundError:
        return [], start
    end = data.rfind(b"\n") + 1
    return [json.loads(line) for line in data[:end].splitlines()], start + end


def read_blocks(path: Path, start: int = 0) -> Iterator[bytes]:
    """A file from byte `start` on, a block at a time: a log may be larger than memory."""
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            yield block
