"""The run directory. The only module that knows the names of the files in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distft.errors import RecipeError

RECIPE, PLAN, DS_CONFIG, ACCELERATE = "recipe.yaml", "plan.json", "ds_config.json", "accelerate.yaml"
SCRIPT, SBATCH, SWEEP, CLUSTER = "job.sh", "job.sbatch", "sweep.json", "cluster.yaml"
STATUS = "status.json"


@dataclass(frozen=True)
class RunDir:
    """Where the files of a run are. What is in them: status.py, metrics.py, attempts.py, checkpoints.py, failure.py."""

    path: Path

    @classmethod
    def next_free(cls, output_dir: str, name: str) -> RunDir:
        """The first of NAME, NAME-2, NAME-3, ... that does not exist. Creates nothing."""
        base = Path(output_dir).absolute()
        return next(cls(path) for path in _candidates(base, name) if not path.exists())

    @classmethod
    def create(cls, output_dir: str, name: str, exact: bool = False) -> RunDir:
        """Create the first free one. mkdir decides when two launches want the same name at once.

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

    @staticmethod
    def check_writable(output_dir: str) -> None:
        """Raises RecipeError where create() would fail, before hours of preparation."""
        base = Path(output_dir).absolute()
        above = next(folder for folder in (base, *base.parents) if os.access(folder, os.F_OK))
        if not os.access(above, os.W_OK | os.X_OK):
            raise RecipeError(f"output_dir: {base} cannot be written (permission denied: {above})")

    @classmethod
    def find(cls, word: str, output_dir: str = "runs") -> RunDir:
        """The run called `word`: a run directory, or its name under `output_dir`.

        Raises:
            RecipeError: there is no such run.
        """
        for path in (Path(word), Path(output_dir) / word):
            if (path / STATUS).is_file():
                return cls(path.absolute())
        known = sorted(p.parent.name for p in Path(output_dir).glob(f"*/{STATUS}"))
        import difflib  # only for a name that is wrong

        some = difflib.get_close_matches(word, known, 3, 0.5) or known[-8:]
        more = f" and {len(known) - len(some)} more" if len(known) > len(some) else ""
        hint = f"; {output_dir}/ has {', '.join(some)}{more}" if known else f"; {output_dir}/ has none"
        raise RecipeError(f"RUN: got {word!r}, no run directory of that name or path{hint}")

    @classmethod
    def all_in(cls, output_dir: str) -> list[RunDir]:
        """Every run directly under `output_dir`, by name; the runs of a sweep lie one folder deeper."""
        return [cls(path.parent.absolute()) for path in sorted(Path(output_dir).glob(f"*/{STATUS}"))]

    @property
    def name(self) -> str:
        """What `distft status` and the like call it: its folder's name, `SWEEP/NUMBER` in a sweep."""
        parent = self.path.parent
        return f"{parent.name}/{self.path.name}" if (parent / SWEEP).is_file() else self.path.name

    @property
    def trains_recipe(self) -> bool:
        """Whether it trains a recipe, which saves, stops when asked, and resumes. If not, it runs a user's script."""
        return self.recipe.is_file()

    @property
    def recipe(self) -> Path:
        return self.path / RECIPE

    @property
    def plan(self) -> Path:
        return self.path / PLAN

    @property
    def cluster(self) -> Path:
        """The profile of a run that was submitted with one."""
        return self.path / CLUSTER

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

    @property
    def status(self) -> Path:
        return self.path / STATUS

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    @property
    def initial_adapter(self) -> Path:
        """The adapter's first weights, of PiSSA and OLoRA: without them, the base of its checkpoints is not known."""
        return self.path / "initial_adapter.safetensors"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def job_ids(self) -> Path:
        """The ids of its SLURM jobs, one per line."""
        return self.logs / "jobs"

    @property
    def stop(self) -> Path:
        """The stop file (stop_file.py)."""
        return self.logs / "stop"

    @property
    def launcher_alive(self) -> Path:
        """Touched every few seconds by the launcher of a run that SLURM did not start (schedulers/launcher.py)."""
        return self.logs / "launcher.alive"

    @property
    def preflight(self) -> Path:
        """What the preflight found: nodes, bad ones with the reason, warnings, reports."""
        return self.logs / "preflight.json"

    @property
    def torchrun_log(self) -> Path:
        """Output of torchrun and the job script; under SLURM, each node's torchrun has a torchrun-N.log."""
        return self.logs / "torchrun.log"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def rank_error(self, rank: int) -> Path:
        """The rank's first uncaught exception, as JSON."""
        return self.logs / f"rank-{rank}.error.json"

    def rank_note(self, rank: int) -> Path:
        """Created by a rank that waits for others in vain."""
        return self.logs / f"rank-{rank}.waits"


def _candidates(base: Path, name: str) -> Iterator[Path]:
    yield base / name
    number = 2
    while True:
        yield base / f"{name}-{number}"
        number += 1
