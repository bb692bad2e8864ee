"""From a plan to a run that has ended: what `launch`, `render`, `resume` and `quickstart` share."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft import extras
from distft.commands.follow import follow
from distft.config.loading import dump_recipe
from distft.config.recipe import Recipe, ScriptSettings
from distft.data import cache as data_cache
from distft.data import few_steps
from distft.errors import DataError, PlanError, RunError, SubmitError
from distft.hardware.devices import only_this_machine
from distft.jobs.job import (
    Job,
    SlurmJob,
    Workload,
    local_job,
    recipe_workload,
    script_workload,
    slurm_job,
)
from distft.jobs.target import HERE, Target
from distft.planner.plan import Plan, RecipePlan, ScriptPlan
from distft.runs import attempts
from distft.runs.directory import SBATCH, SCRIPT, RunDir
from distft.runs.status import State, job_ids
from distft.schedulers import dispatch, local, slurm
from distft.shell import quote
from distft.views import summary

if TYPE_CHECKING:
    from rich.console import Console

    from distft.config.cluster import Cluster


@contextlib.contextmanager
def _progress() -> Iterator[tuple[tuple[int, ...], dict[str, str]]]:
    """Where standard error is a terminal: a descriptor of it, and the variable by which train/progress.py finds it."""
    if not sys.stderr.isatty():
        yield (), {}
        return
    descriptor = os.dup(sys.stderr.fileno())
    try:
        yield (descriptor,), {data_cache.PROGRESS_FD: str(descriptor)}
    finally:
        os.close(descriptor)


def prepare_data(recipe: Recipe, cache: Path | None = None) -> dict[str, Any]:
    """Tokenize the data into the cache before anything starts, unless it is there already. Returns the counts.

    In a separate process: the command line never imports torch.

    Raises:
        MissingPartError: the train part is not installed.
        DataError: data or tokenizer cannot be used.
    """
    extras.require()
    folder = data_cache.cache_folder(recipe, str(cache) if cache else None)
    if not data_cache.is_prepared(folder):
        with tempfile.TemporaryDirectory() as temporary:
            file, problem = Path(temporary) / "recipe.yaml", Path(temporary) / "problem"
            file.write_text(dump_recipe(recipe))
            command = [sys.executable, "-m", "distft.train.data", str(file), str(problem)]
            env = {**os.environ, "TQDM_DISABLE": "1", **({"DISTFT_CACHE": str(cache)} if cache else {})}
            with _progress() as (descriptors, variables):
                done = subprocess.run(
                    command, capture_output=True, text=True, env=env | variables, pass_fds=descriptors
                )
            if done.returncode == DataError.exit_status and problem.exists():
                raise DataError(problem.read_text())
        if done.returncode:
            raise RunError(f"the data could not be prepared:\n{done.stderr.strip()}")
    return data_cache.read_counts(folder, recipe)


def must_fit(plan: RecipePlan) -> None:
    """Raises PlanError for a plan that will run out of memory, with what would fit."""
    if plan.fits is not False:
        return
    from distft.planner import limits
    from distft.planner.plan import misfit

    fixes = "".join(f"\n  would fit: {fix}" for fix in limits.would_fit(plan.search))
    raise PlanError(f"{misfit(plan.chosen)}{fixes}\n  --force starts it anyway")


def render(job: Job) -> dict[str, str]:
    """Every file of a job, by name."""
    if isinstance(job, SlurmJob):
        return {**job.files, SBATCH: slurm.render(job)}
    return {**job.files, SCRIPT: local.render(job)}


@dataclass(frozen=True)
class Launch(ABC):
    """A planned launch: what runs, where, and whether it is followed. `run` is one to resume."""

    settings: Recipe | ScriptSettings
    plan: Plan
    target: Target = HERE
    after: str | None = None
    detach: bool = False
    run: RunDir | None = None

    @abstractmethod
    def workload(self, run: RunDir) -> Workload:
        """What the ranks run, with its files in `run`."""

    @abstractmethod
    def prepare(self, console: Console) -> None:
        """Do here what must be done before the ranks start, where it can be done here."""

    def warnings(self, cluster: Cluster) -> list[str]:
        """What is unwise on a cluster."""
        return []

    def job(self, run: RunDir) -> Job:
        """The job with its files in `run`."""
        cluster = self.target.cluster
        return self.slurm_job(run, cluster) if cluster else local_job(self.workload(run), run)

    def slurm_job(self, run: RunDir, cluster: Cluster) -> SlurmJob:
        return slurm_job(self.workload(run), run, cluster, self.after)

    def next_run(self) -> RunDir:
        """The run directory that it would have if it started now."""
        return self.run or RunDir.next_free(self.target.runs_dir(self.settings), self.settings.name)

    def create(self) -> RunDir:
        return self.run or RunDir.create(self.target.runs_dir(self.settings), self.settings.name)

    def start(self, console: Console, started: Callable[[RunDir], None] = lambda run: None) -> RunDir:
        """Start it and follow it to its end unless `detach`; prints what it does on `console`.

        Raises:
            DistftError: nothing was started.
            RunError: the run failed.
        """
        from distft.views.progress import say

        cluster = self.target.cluster
        if self.run is None:
            RunDir.check_writable(self.target.runs_dir(self.settings))
        if cluster is None:
            only_this_machine(self.plan.topology)
        say(console, summary.plan_lines(self.plan))
        if cluster is None or slurm.allocation():
            return self._start_here(console, started)
        return self._start_on_slurm(cluster, console, started)

    def _start_here(self, console: Console, started: Callable[[RunDir], None]) -> RunDir:
        """On this machine, or with srun on the nodes of the allocation that this process is in."""
        from distft.views.progress import Follower, say

        self.prepare(console)
        run = self.create()
        started(run)
        job = self.job(run)
        if isinstance(job, SlurmJob):  # the allocation is the user's: distft must not requeue it
            job = replace(job, cluster=job.cluster.model_copy(update={"max_requeues": 0}))
        attempts.fill(run, render(job), job.name, resumed=self.run is not None)
        say(console, [self._named(run)])
        if self.detach:
            local.detach(run)
            say(console, [f"started; follow it with: distft logs -f {quote(str(run.path))}"])
            return run
        with Follower(run, console, resumed=self.run is not None, warned=self._warned()) as follower:
            local.supervise(run, watch=follower.poll)
        say(console, summary.result_lines(run))
        return run

    def _start_on_slurm(self, cluster: Cluster, console: Console, started: Callable[[RunDir], None]) -> RunDir:
        from distft.views.progress import say

        say(console, [f"warning: {text}" for text in self.warnings(cluster)])
        say(console, [f"  SLURM {slurm.test_only(slurm.render(self.slurm_job(self.next_run(), cluster)))}"])
        self.prepare(console)
        run = self.create()
        started(run)
        job_id = slurm.submit(self.slurm_job(run, cluster), resumed=self.run is not None)
        name = quote(str(run.path))
        say(console, [self._named(run), f"job {job_id} is queued"])
        if self.detach:
            say(console, [f"next: distft status {name} · distft logs -f {name} · distft cancel {name}"])
            return run
        follow(run, console, resumed=self.run is not None, warned=self._warned())
        return run

    def _warned(self) -> bool:
        """Whether all that status.json will warn of was said here."""
        return self.target.prepares_data()

    def _named(self, run: RunDir) -> str:
        name = self.settings.name
        return f"run: {run.path}" + ("" if self.run or run.path.name == name else f" ({name} is taken)")


@dataclass(frozen=True)
class RecipeLaunch(Launch):
    """Trains a recipe."""

    settings: Recipe
    plan: RecipePlan

    def workload(self, run: RunDir) -> Workload:
        return recipe_workload(self.settings, self.plan, run)

    def warnings(self, cluster: Cluster) -> list[str]:
        if cluster.max_requeues and self.settings.checkpoint.save_steps is None:
            return ["checkpoint.save_steps is not set: after a fault the run restarts from the beginning"]
        return []

    def prepare(self, console: Console) -> None:
        """Prepare the data, unless the job does so on its first node."""
        from distft.views.progress import say

        if not self.target.prepares_data():
            say(console, [f"warning: {text}" for text in few_steps.expected(self.settings)])
            return
        cluster = self.target.cluster
        counts = prepare_data(self.settings, cluster.cache_dir if cluster else None)
        warnings = [f"warning: {text}" for text in few_steps.warnings(self.settings, counts)]
        lines = [line for line in summary.data_lines(counts) if line not in self.plan.data]  # said with the plan
        say(console, [*lines, *warnings])


@dataclass(frozen=True)
class ScriptLaunch(Launch):
    """Runs a user's script, unmodified."""

    settings: ScriptSettings
    plan: ScriptPlan
    script: Sequence[str] = ()

    def workload(self, run: RunDir) -> Workload:
        return script_workload(self.settings, self.script, self.plan, run)

    def prepare(self, console: Console) -> None:
        if self.target.cluster is None:
            extras.require()

    def _warned(self) -> bool:
        return False  # they come from the ranks


def dependency(word: str, runs_dir: str) -> str | None:
    """SLURM's id of the job to wait for, given as such or by its run; None for a run that has completed.

    Raises:
        SubmitError: nothing could start after it: no such run or job, or it has failed.
    """
    if word.replace("_", "").isdigit():
        if word not in slurm.look([word]):  # SLURM itself would take an unknown job for one that completed
            raise SubmitError(f"--after: SLURM does not know job {word}")
        return word
    run = RunDir.find(word, runs_dir)
    status = dispatch.status_now(run)
    if status.state is State.COMPLETED:
        return None
    if status.finished:
        raise SubmitError(f"--after: {run.path.name} is {status.state}, so nothing would start after it")
    if not job_ids(run):
        raise SubmitError(f"--after: {run.path.name} is not a SLURM job")
    return job_ids(run)[-1]
