"""From a plan to a run that has ended: what `launch`, `render`, `resume` and `quickstart` share."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft import extras
from distft.commands.follow import follow
from distft.config.loading import dump_recipe
from distft.config.recipe import Recipe, ScriptSettings
from distft.data import rows
from distft.errors import DataError, PlanError, RunError, SubmitError
from distft.hardware.devices import only_this_machine
from distft.jobs.job import Job, recipe_job, script_job
from distft.jobs.target import HERE, Target
from distft.planner.plan import Plan, RecipePlan
from distft.runs import attempts
from distft.runs.directory import SBATCH, SCRIPT, RunDir
from distft.runs.status import State, job_ids
from distft.schedulers import dispatch, local, slurm
from distft.shell import quote
from distft.views import summary

if TYPE_CHECKING:
    from rich.console import Console


def prepare_data(recipe: Recipe, cache: str | None = None) -> dict[str, Any]:
    """Tokenize the data into the cache before anything starts, where it is not there yet. Returns the counts.

    In a process of its own: the command line never imports torch.

    Raises:
        MissingPartError: the train part is not installed.
        DataError: data or tokenizer cannot be used.
    """
    extras.require()
    folder = rows.cache_folder(recipe, cache)
    if not rows.is_prepared(folder):
        with tempfile.TemporaryDirectory() as temporary:
            file, problem = Path(temporary) / "recipe.yaml", Path(temporary) / "problem"
            file.write_text(dump_recipe(recipe))
            command = [sys.executable, "-m", "distft.train.data", str(file), str(problem)]
            env = {**os.environ, "TQDM_DISABLE": "1", **({"DISTFT_CACHE": cache} if cache else {})}
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            if done.returncode == DataError.exit_status and problem.exists():
                raise DataError(problem.read_text())
        if done.returncode:
            raise RunError(f"the data could not be prepared:\n{done.stderr.strip()}")
    return rows.read_counts(folder)


def must_fit(plan: Plan) -> None:
    """Raises PlanError for a plan that will run out of memory, with what would fit."""
    if not isinstance(plan, RecipePlan) or plan.fits:
        return
    from distft.planner import limits
    from distft.planner.plan import misfit

    mends = "".join(f"\n  would fit: {mend}" for mend in limits.would_fit(plan.search))
    raise PlanError(f"{misfit(plan.chosen)}{mends}\n  --force starts it all the same")


def render(job: Job) -> dict[str, str]:
    """Every file of a job that is to run: by name, its text."""
    if job.cluster:
        return {**job.files, SBATCH: slurm.render(job)}
    return {**job.files, SCRIPT: local.render(job)}


@dataclass(frozen=True)
class Launch:
    """A launch that was planned: what runs, where, and how it is followed. `run` is one that is to go on."""

    settings: Recipe | ScriptSettings
    plan: Plan
    target: Target = HERE
    script: Sequence[str] | None = None
    after: str | None = None
    detach: bool = False
    run: RunDir | None = None

    def job(self, run: RunDir) -> Job:
        """The job with its files in `run`."""
        where = (self.target.cluster, self.after)
        if self.script is None:
            return recipe_job(self.settings, self.plan, run, *where)
        return script_job(self.settings, self.script, self.plan, run, *where)

    def next_job(self) -> Job:
        """The job under the name that it would have if it started now."""
        return self.job(self.run or RunDir.next_free(self.target.runs_dir(self.settings), self.settings.name))

    def create(self) -> RunDir:
        return self.run or RunDir.create(self.target.runs_dir(self.settings), self.settings.name)

    def start(self, console: Console, started: Callable[[RunDir], None] = lambda run: None) -> RunDir:
        """Start it and follow it to its end unless `detach`; says on `console` what it does.

        Raises:
            DistftError: nothing was started.
            RunError: the run failed.
        """
        from distft.views.progress import say

        if self.target.cluster is None:
            only_this_machine(self.plan.topology)
        say(console, summary.plan_lines(self.plan))
        if self.target.cluster is None or slurm.allocation():
            return self._start_here(console, started)
        return self._start_on_slurm(console, started)

    def _start_here(self, console: Console, started: Callable[[RunDir], None]) -> RunDir:
        """On this machine, or with srun on the nodes of the allocation that this process is in."""
        from distft.views.progress import Follower, say

        self.prepare(console)
        run = self.create()
        started(run)
        job = self.job(run)
        if job.cluster:  # the allocation is the user's: not ours to put into the queue again
            job = replace(job, cluster=job.cluster.model_copy(update={"max_requeues": 0}))
        attempts.fill(run, render(job), job.name, resumed=self.run is not None)
        say(console, [self._named(run)])
        if self.detach:
            local.detach(run)
            say(console, [f"started; follow it with: distft logs -f {quote(str(run.path))}"])
            return run
        with Follower(run, console, resumed=self.run is not None) as follower:
            local.supervise(run, watch=follower.poll)
        say(console, summary.result_lines(run))
        return run

    def _start_on_slurm(self, console: Console, started: Callable[[RunDir], None]) -> RunDir:
        from distft.views.progress import say

        if self.target.cluster.max_requeues and self.script is None and self.settings.checkpoint.save_steps is None:
            say(console, ["warning: checkpoint.save_steps is not set: after a fault the run begins anew"])
        say(console, [f"  SLURM {slurm.test_only(slurm.render(self.next_job()))}"])
        self.prepare(console)
        run = self.create()
        started(run)
        job_id = slurm.submit(self.job(run), resumed=self.run is not None)
        name = quote(str(run.path))
        say(console, [self._named(run), f"job {job_id} is queued"])
        if self.detach:
            say(console, [f"look after it with: distft status {name} · distft logs -f {name} · distft cancel {name}"])
            return run
        follow(run, console, resumed=self.run is not None)
        return run

    def _named(self, run: RunDir) -> str:
        name = self.settings.name
        return f"run: {run.path}" + ("" if self.run or run.path.name == name else f" ({name} is taken)")

    def prepare(self, console: Console) -> None:
        """Prepare the data where that is done here; else the job does it, on its first node."""
        from distft.views.progress import say

        cluster = self.target.cluster
        if self.script is not None:
            if cluster is None:
                extras.require()
        elif self.target.prepares_data():
            cache = str(Path(cluster.runs_dir) / ".cache") if cluster else None
            say(console, summary.data_lines(prepare_data(self.settings, cache)))


def dependency(word: str, runs_dir: str) -> str | None:
    """SLURM's id of the job to wait for, given as such or by its run; None for a run that has ended well.

    Raises:
        SubmitError: nothing could start after it: no such run or job, or it has failed.
    """
    if word.replace("_", "").isdigit():
        if word not in slurm.look([word]):  # SLURM itself would take an unknown job for one that ended well
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
