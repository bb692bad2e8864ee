"""From a plan to a run that has ended: what `launch`, `render` and `quickstart` share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft import data_files, report, schedulers, train_part
from distft.devices import only_this_machine
from distft.errors import DataError, MissingPartError, PlanError, RunError, SubmitError
from distft.job import Job, cluster_python, recipe_job, script_job
from distft.loading import dump_recipe
from distft.place import HERE, Place
from distft.planner.plan import Plan
from distft.recipe import Recipe, ScriptSettings
from distft.run_dir import FINISHED, SBATCH, SCRIPT, RunDir
from distft.shell import quote

FOLLOW_SECONDS = 0.3
SLURM_SECONDS = 15.0  # the longest between two questions to SLURM: controllers suffer from those who ask often

if TYPE_CHECKING:
    from rich.console import Console


def prepare_data(recipe: Recipe, cache: str | None = None) -> dict[str, Any]:
    """Tokenize the data into the cache before anything starts, where it is not there yet. Returns the counts.

    In a process of its own: the command line never imports torch.

    Raises:
        MissingPartError: the train part is not installed.
        DataError: data or tokenizer cannot be used.
    """
    train_part.require()
    folder = data_files.cache_folder(recipe, cache)
    if not data_files.is_prepared(folder):
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
    return data_files.read_counts(folder)


def must_fit(plan: Plan) -> None:
    """Raises PlanError for a plan that will run out of memory, with what would fit."""
    if plan.fits or plan.search is None:
        return
    from distft.planner import limits
    from distft.planner.plan import misfit

    mends = "".join(f"\n  would fit: {mend}" for mend in limits.would_fit(plan.search))
    raise PlanError(f"{misfit(plan.chosen)}{mends}\n  --force starts it all the same")


def render(job: Job) -> dict[str, str]:
    """Every file of a job that is to run: by name, its text."""
    if job.cluster:
        return {**job.files, SBATCH: schedulers.slurm.render(job)}
    return {**job.files, SCRIPT: schedulers.local.render(job)}


@dataclass(frozen=True)
class Launch:
    """A launch that was planned: what runs, where, and how it is followed. `run` is one that is to go on."""

    settings: Recipe | ScriptSettings
    plan: Plan
    place: Place = HERE
    script: Sequence[str] | None = None
    after: str | None = None
    detach: bool = False
    run: RunDir | None = None

    def job(self, run: RunDir) -> Job:
        """The job with its files in `run`."""
        where = (self.place.cluster, self.after)
        if self.script is None:
            return recipe_job(self.settings, self.plan, run, *where)
        return script_job(self.settings, self.script, self.plan, run, *where)

    def next_job(self) -> Job:
        """The job under the name that it would have if it started now."""
        return self.job(self.run or RunDir.next_free(self.place.runs_dir(self.settings), self.settings.name))

    def create(self) -> RunDir:
        return self.run or RunDir.create(self.place.runs_dir(self.settings), self.settings.name)

    def start(self, console: Console, started: Callable[[RunDir], None] = lambda run: None) -> RunDir:
        """Start it and follow it to its end unless `detach`; says on `console` what it does.

        Raises:
            DistftError: nothing was started.
            RunError: the run failed.
        """
        from distft.progress import say

        if self.place.cluster is None:
            only_this_machine(self.plan.topology)
        say(console, report.plan_lines(self.plan))
        if self.place.cluster is None or schedulers.slurm.allocation():
            return self._start_here(console, started)
        return self._start_on_slurm(console, started)

    def _start_here(self, console: Console, started: Callable[[RunDir], None]) -> RunDir:
        """On this machine, or with srun on the nodes of the allocation that this process is in."""
        from distft.progress import Follower, say

        self.prepare(console)
        run = self.create()
        started(run)
        job = self.job(run)
        if job.cluster:  # the allocation is the user's: not ours to put into the queue again
            job = replace(job, cluster=job.cluster.model_copy(update={"requeue": 0}))
        run.fill(render(job), job.name, goes_on=self.run is not None)
        say(console, [self._named(run)])
        if self.detach:
            schedulers.local.detach(run)
            say(console, [f"started; follow it with: distft logs -f {quote(str(run.path))}"])
            return run
        with Follower(run, console, goes_on=self.run is not None) as follower:
            schedulers.local.supervise(run, watch=follower.poll)
        say(console, report.result_lines(run))
        return run

    def _start_on_slurm(self, console: Console, started: Callable[[RunDir], None]) -> RunDir:
        from distft.progress import say

        if self.place.cluster.requeue and self.script is None and self.settings.checkpoint.save_steps is None:
            say(console, ["warning: checkpoint.save_steps is not set: after a fault the run begins anew"])
        say(console, [f"  SLURM {schedulers.slurm.test_only(schedulers.slurm.render(self.next_job()))}"])
        self.prepare(console)
        run = self.create()
        started(run)
        job_id = schedulers.slurm.submit(self.job(run), goes_on=self.run is not None)
        name = quote(str(run.path))
        say(console, [self._named(run), f"job {job_id} is queued"])
        if self.detach:
            say(console, [f"look after it with: distft status {name} · distft logs -f {name} · distft cancel {name}"])
            return run
        follow(run, console, goes_on=self.run is not None)
        return run

    def _named(self, run: RunDir) -> str:
        name = self.settings.name
        return f"run: {run.path}" + ("" if self.run or run.path.name == name else f" ({name} is taken)")

    def prepare(self, console: Console) -> None:
        """Prepare the data where that can be done here; else the job does it, on its first node."""
        from distft.progress import say

        cluster = self.place.cluster
        if cluster is None:
            if self.script is None:
                say(console, report.data_lines(prepare_data(self.settings)))
            else:
                train_part.require()
        elif self.script is None and cluster_python(cluster) == sys.executable:
            try:
                train_part.require()
            except MissingPartError:  # a login node with the light part
                return
            cache = Path(cluster.runs_dir) / ".cache"
            say(console, report.data_lines(prepare_data(self.settings, str(cache))))


def dependency(word: str, runs_dir: str) -> str | None:
    """SLURM's id of the job to wait for, given as such or by its run; None for a run that has ended well.

    Raises:
        SubmitError: nothing could start after it: no such run or job, or it has failed.
    """
    if word.replace("_", "").isdigit():
        if word not in schedulers.slurm.look([word]):  # SLURM itself would take an unknown job for one that ended well
            raise SubmitError(f"--after: SLURM does not know job {word}")
        return word
    run = RunDir.find(word, runs_dir)
    state = schedulers.state_now(run).get("state")
    if state in ("failed", "cancelled"):
        raise SubmitError(f"--after: {run.path.name} is {state}, so nothing would start after it")
    if state != "completed" and not run.jobs():
        raise SubmitError(f"--after: {run.path.name} is no job of SLURM's")
    return None if state == "completed" else run.jobs()[-1]


def follow(run: RunDir, console: Console, goes_on: bool = False) -> None:
    """Show a run of SLURM's to its end. Ctrl-C leaves the job alone.

    Raises:
        RunError: the run failed or was cancelled.
    """
    from distft.failure import first_failure
    from distft.progress import Follower, say

    try:
        with Follower(run, console, goes_on) as follower:
            asked, wait = 0.0, 1.0
            while True:
                if time.monotonic() - asked >= wait or run.read_status().get("state") in FINISHED:
                    status = schedulers.slurm.state_now(run)
                    asked, wait = time.monotonic(), min(wait * 1.3, SLURM_SECONDS)
                    follower.waiting(status)
                    if status.get("state") in FINISHED:
                        break
                follower.poll()
                time.sleep(FOLLOW_SECONDS)
    except KeyboardInterrupt:
        name = quote(str(run.path))
        say(
            console,
            [f"job {run.jobs()[-1]} goes on; come back with: distft logs -f {name}; end it with: distft cancel {name}"],
        )
        raise SystemExit(130) from None
    if status["state"] == "completed":
        say(console, report.result_lines(run))
    elif status.get("exit_status"):  # it said itself how it ended
        raise RunError(first_failure(run, status["exit_status"]).text)
    else:
        raise RunError(f"{status['state']}: {status.get('reason') or 'no reason is known'}")


def describe_runs(runs: Sequence[RunDir]) -> list[dict[str, Any]]:
    """Runs as `--json` prints them: folder and status."""
    states = schedulers.states_now(runs)
    return [{"run": run.name, "run_dir": str(run.path), **state} for run, state in zip(runs, states, strict=True)]


def describe_run(run: RunDir) -> dict[str, Any]:
    """The same for one run."""
    return describe_runs([run])[0]


def preflight(place: Place, console: Console) -> dict[str, Any]:
    """Check the nodes of a cluster in a job that does nothing else, and follow it. Returns logs/preflight.json of the
    job: nodes, bad (name: why), warnings, reports.

    Raises:
        DistftError: nothing was started.
        RunError: the job ended without saying which nodes are bad.
    """
    from distft.progress import say

    cluster = place.cluster.model_copy(update={"preflight": True, "requeue": 0})
    run = RunDir.create(cluster.runs_dir, "doctor")
    job = Job("doctor", run, place.topology(), argv=(), env={}, files={}, cluster=cluster)
    ended = None
    try:
        if schedulers.slurm.allocation():
            run.fill({SBATCH: schedulers.slurm.render(job)}, job.name)
            schedulers.local.supervise(run)
        else:
            say(console, [f"job {schedulers.slurm.submit(job)} is queued: {run.path}"])
            follow(run, console)
    except RunError as error:
        ended = error
    found = json.loads(run.preflight.read_text()) if run.preflight.exists() else {}
    if not found or (ended and not found["bad"]):
        raise ended or RunError(f"{run.script}: no preflight was in it")
    return found
