"""A sweep: one recipe with several values, as an array job. Each element is a run like any other.

NAME-sweep/  sweep.json  job.sbatch  0/ 1/ ...   (run directories)
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distft.commands.follow import FOLLOW_SECONDS, Pace
from distft.commands.launch import RecipeLaunch, render
from distft.errors import RecipeError, RunError
from distft.jobs.job import SlurmJob
from distft.jobs.target import Target, plan_recipe
from distft.runs import attempts
from distft.runs.directory import SBATCH, SWEEP, RunDir
from distft.runs.metrics import last_metrics
from distft.runs.status import State, add_job_id, update_status
from distft.schedulers import dispatch, slurm
from distft.shell import quote
from distft.views import summary

if TYPE_CHECKING:
    from rich.console import Console

    from distft.config.cluster import Cluster

Sets = tuple[str, ...]  # ("training.learning_rate=1e-4", "lora.r=8")


def combinations(sweeps: Sequence[str]) -> list[Sets]:
    """Every combination of the values of `dotted.key=VALUE,VALUE...` texts; a value may be a list in brackets.

    Raises:
        RecipeError: a text without values.
    """
    each = []
    for text in sweeps:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise RecipeError(f"--sweep {text}: need dotted.key=VALUE,VALUE")
        each.append([f"{key}={value}" for value in _split(values)])
    return list(itertools.product(*each))


def _split(text: str) -> list[str]:
    """At commas outside brackets and quotes."""
    parts, depth, quoted = [""], 0, ""
    for character in text:
        if character in "\"'" and quoted in ("", character):
            quoted = "" if quoted else character
        depth += 0 if quoted else (character in "[{") - (character in "]}")
        if character == "," and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts


@dataclass(frozen=True)
class Sweep:
    """A planned sweep: a launch for each combination."""

    name: str
    cluster: Cluster
    sets: list[Sets]
    launches: list[RecipeLaunch]

    @property
    def next_folder(self) -> Path:
        """The folder that it would have if it started now."""
        return RunDir.next_free(self.cluster.runs_dir, f"{self.name}-sweep").path

    def jobs(self, folder: Path) -> list[SlurmJob]:
        return [one.slurm_job(RunDir(folder / str(k)), self.cluster) for k, one in enumerate(self.launches)]

    def script(self, folder: Path) -> str:
        return slurm.array_script(self.jobs(folder)[0], folder, len(self.sets))

    def start(self, console: Console, detach: bool) -> Path:
        """Submit it and follow it to its end unless `detach`. Returns its folder.

        Raises:
            DistftError: nothing was queued.
            RunError: a run of it failed.
        """
        from distft.views.progress import say

        first = self.launches[0]
        say(console, summary.plan_lines(first.plan))
        free = self.next_folder
        say(console, [f"  SLURM {slurm.test_only(self.script(free))}"])
        for job in self.jobs(free):
            render(job)  # raises before anything is written
        first.prepare(console)
        folder = RunDir.create(self.cluster.runs_dir, f"{self.name}-sweep").path
        (folder / "logs").rmdir()
        jobs = self.jobs(folder)
        for k, job in enumerate(jobs):
            RunDir.create(str(folder), str(k), exact=True)
            attempts.fill(job.run, render(job), job.name)
        (folder / SWEEP).write_text(json.dumps({"sets": self.sets}, indent=1) + "\n")
        (folder / SBATCH).write_text(self.script(folder))
        job_id = slurm.sbatch(folder / SBATCH)
        for k, job in enumerate(jobs):
            add_job_id(job.run, f"{job_id}_{k}")
            update_status(job.run, job_id=f"{job_id}_{k}")
        say(console, [f"sweep: {folder}", f"job {job_id} of {len(self.sets)} runs is queued"])
        if detach:
            say(console, [f"next: distft status {quote(str(folder))}"])
            return folder
        follow(folder, console)
        return folder


def plan(
    recipe: str,
    sets: Sequence[str],
    sweeps: Sequence[str],
    target: Target,
    cluster: Cluster,
    after: str | None,
    need_weights: bool = False,
) -> Sweep:
    """Plan every combination; reports all problems of the first one that has any. `cluster`: the target's.

    Raises:
        DistftError: the request is wrong.
    """
    chosen = combinations(sweeps)
    launches = []
    for combination in chosen:
        loaded = plan_recipe(recipe, [*sets, *combination], target, need_weights, for_launch=True)
        launches.append(RecipeLaunch(*loaded, target, after))
    return Sweep(launches[0].settings.name, cluster, chosen, launches)


def is_sweep(folder: Path) -> bool:
    """Whether it is the folder of a sweep."""
    return (folder / SWEEP).is_file()


def all_in(folder: Path) -> list[Path]:
    """The sweeps in a folder of runs, by name."""
    return [path.parent for path in sorted(folder.glob(f"*/{SWEEP}"))]


def sets_of(folder: Path) -> list[list[str]]:
    """What was set for each run of a sweep, in order."""
    sets: list[list[str]] = json.loads((folder / SWEEP).read_text())["sets"]
    return sets


def runs_of(folder: Path) -> list[RunDir]:
    """The runs of a sweep, in order."""
    return [RunDir((folder / str(k)).absolute()) for k in range(len(sets_of(folder)))]


def follow(folder: Path, console: Console) -> None:
    """Show how many runs have ended until all have, then the table. Ctrl-C leaves the job alone.

    Raises:
        RunError: some did not complete.
    """
    from distft.views.progress import say

    runs, shown, pace = runs_of(folder), None, Pace()
    try:
        while True:
            statuses = dispatch.statuses_now(runs)
            pace.just_asked()
            states = [str(status.state) for status in statuses]
            counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
            if counts != shown:
                say(console, [counts])
            if all(status.finished for status in statuses):
                break
            shown = counts
            while not pace.is_due():
                time.sleep(FOLLOW_SECONDS)
    except KeyboardInterrupt:
        say(console, [f"the job keeps running; look at it with: distft status {quote(str(folder))}"])
        raise SystemExit(130) from None
    say(console, table(folder))
    failed = sum(status.state is not State.COMPLETED for status in statuses)
    if failed:
        raise RunError(f"{folder.name}: {failed} of {len(statuses)} runs did not complete")


def table(folder: Path) -> list[str]:
    """A line for each run: number, state, last loss, eval loss before and after, and what was set."""
    rows = [("run", "state", "step", "loss", "eval loss", "set")]
    runs = runs_of(folder)
    for run, status, texts in zip(runs, dispatch.statuses_now(runs), sets_of(folder), strict=True):
        last = last_metrics(run)
        loss = f"{last['loss']:.4f}" if last else ""
        step, losses = str(last.get("step", "")), summary.eval_losses(status)
        rows.append((run.path.name, str(status.state), step, loss, losses, "  ".join(texts)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
