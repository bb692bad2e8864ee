"""A sweep: one recipe with several values, as an array job of SLURM's. Each element is a run like any other.

NAME-sweep/  sweep.json  job.sbatch  0/ 1/ ...   (run directories)
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.commands import launch
from distft.commands.follow import SLURM_SECONDS
from distft.errors import RecipeError, RunError
from distft.jobs.target import Target, plan_recipe
from distft.runs.directory import FINISHED, SBATCH, SWEEP, RunDir
from distft.schedulers import dispatch, slurm
from distft.shell import quote
from distft.views import summary

if TYPE_CHECKING:
    from rich.console import Console

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
    """A sweep that was planned: a launch for each combination."""

    name: str
    sets: list[Sets]
    launches: list[launch.Launch]

    @property
    def target(self) -> Target:
        return self.launches[0].target

    def jobs(self, folder: Path) -> list[Any]:
        return [planned.job(RunDir(folder / str(k))) for k, planned in enumerate(self.launches)]

    def script(self, folder: Path) -> str:
        return slurm.array_script(self.jobs(folder)[0], folder, len(self.sets))

    def start(self, console: Console, detach: bool) -> Path:
        """Submit it and follow it to its end unless `detach`. Returns its folder.

        Raises:
            DistftError: nothing was queued.
            RunError: a run of it failed.
        """
        from distft.views.progress import say

        say(console, summary.plan_lines(self.launches[0].plan))
        runs_dir, name = self.target.runs_dir(self.launches[0].settings), f"{self.name}-sweep"
        free = RunDir.next_free(runs_dir, name)
        say(console, [f"  SLURM {slurm.test_only(self.script(free.path))}"])
        files = [launch.render(job) for job in self.jobs(free.path)]  # all of them are right before one is written
        self.launches[0].prepare(console)
        folder = RunDir.create(runs_dir, name).path
        (folder / "logs").rmdir()
        for k, (job, _) in enumerate(zip(self.jobs(folder), files, strict=True)):
            RunDir.create(str(folder), str(k), exact=True)
            job.run.fill(launch.render(job), job.name)
        (folder / SWEEP).write_text(json.dumps({"sets": self.sets}, indent=1) + "\n")
        (folder / SBATCH).write_text(self.script(folder))
        job_id = slurm.client("sbatch", "--parsable", str(folder / SBATCH)).stdout.strip().split(";")[0]
        for k in range(len(self.sets)):
            run = RunDir(folder / str(k))
            run.add_job(f"{job_id}_{k}")
            run.update_status(job_id=f"{job_id}_{k}")
        say(console, [f"sweep: {folder}", f"job {job_id} of {len(self.sets)} runs is queued"])
        if detach:
            say(console, [f"look after it with: distft status {quote(str(folder))}"])
            return folder
        follow(folder, console)
        return folder


def plan(
    recipe: str,
    sets: Sequence[str],
    sweeps: Sequence[str],
    target: Target,
    after: str | None,
    need_weights: bool = False,
) -> Sweep:
    """Plan every combination; all problems of the first that has any.

    Raises:
        DistftError: what was asked is wrong.
    """
    chosen = combinations(sweeps)
    launches = [
        launch.Launch(*plan_recipe(recipe, [*sets, *combination], target, need_weights, True), target, None, after)
        for combination in chosen
    ]
    return Sweep(launches[0].settings.name, chosen, launches)


def runs_of(folder: Path) -> list[RunDir] | None:
    """The runs of a sweep's folder, in order; None if it is none."""
    if not (folder / SWEEP).is_file():
        return None
    return [RunDir((folder / str(k)).absolute()) for k in range(len(json.loads((folder / SWEEP).read_text())["sets"]))]


def follow(folder: Path, console: Console) -> None:
    """Show how many runs have ended until all have, then the table. Ctrl-C leaves the job alone.

    Raises:
        RunError: some did not complete.
    """
    from distft.views.progress import say

    runs, shown, wait = runs_of(folder), None, 1.0
    try:
        while True:
            states = [str(state.get("state")) for state in dispatch.states_now(runs)]
            counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
            if counts != shown:
                say(console, [counts])
            if all(state in FINISHED for state in states):
                break
            shown, wait = counts, min(wait * 1.3, SLURM_SECONDS)
            time.sleep(wait)
    except KeyboardInterrupt:
        say(console, [f"the job goes on; see it with: distft status {quote(str(folder))}"])
        raise SystemExit(130) from None
    say(console, table(folder))
    if set(states) != {"completed"}:
        raise RunError(
            f"{folder.name}: {len(states) - states.count('completed')} of {len(states)} runs did not complete"
        )


def table(folder: Path) -> list[str]:
    """A line a run: number, state, last loss, eval loss before and after, and what was set."""
    sets = json.loads((folder / SWEEP).read_text())["sets"]
    rows = [("run", "state", "step", "loss", "eval loss", "set")]
    for run, state, texts in zip(runs_of(folder), dispatch.states_now(runs_of(folder)), sets, strict=True):
        last = run.last_metrics()
        eval_loss = f"{state['eval_loss_before']:.4f}" if "eval_loss_before" in state else ""
        if state.get("eval_loss_after") is not None:
            eval_loss += f" -> {state['eval_loss_after']:.4f}"
        loss = f"{last['loss']:.4f}" if last else ""
        rows.append((run.path.name, str(state["state"]), str(last.get("step", "")), loss, eval_loss, "  ".join(texts)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
