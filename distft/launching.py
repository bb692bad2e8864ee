"""From a recipe file to a run that has ended: what `launch`, `render` and `quickstart` share."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft import data_files, report, train_part
from distft.devices import local_device, only_this_machine, topology_here
from distft.errors import DataError, RecipeError, RunError
from distft.job import Job, recipe_job, script_job
from distft.loading import Document, dump_recipe, load_recipe, validate
from distft.planner.plan import Plan, make_plan, script_plan
from distft.recipe import Recipe, ScriptSettings
from distft.run_dir import RunDir
from distft.schedulers import local
from distft.shell import quote

if TYPE_CHECKING:
    from rich.console import Console


def plan_recipe(
    path: str, sets: Sequence[str] = (), nodes: int | None = None, gpus_per_node: int | None = None
) -> tuple[Recipe, Plan]:
    """Load, plan, and check every row of the data that lies here. Starts and writes nothing."""
    recipe = load_recipe(path, sets)
    topology = topology_here(nodes, gpus_per_node)
    plan = make_plan(recipe, topology, local_device(topology.nproc_per_node))
    data_files.check_files(recipe)
    return recipe, plan


def plan_script(
    script: Sequence[str], sets: Sequence[str] = (), nodes: int | None = None, gpus_per_node: int | None = None
) -> tuple[ScriptSettings, Plan]:
    """The same for a script of one's own."""
    if not Path(script[0]).is_file():
        raise RecipeError(f"script: no such file: {script[0]}")
    document = Document("--set", ScriptSettings)
    for text in (f"name={Path(script[0]).stem}", *sets):
        document.override(text)
    settings = validate(document)
    topology = topology_here(nodes, gpus_per_node)
    device = local_device(topology.nproc_per_node)
    return settings, script_plan(settings.parallelism, settings.training.mixed_precision, topology, device)


def prepare_data(recipe: Recipe) -> dict[str, Any]:
    """Tokenize the data into the cache before anything starts, where it is not there yet. Returns the counts.

    In a process of its own: the command line never imports torch.

    Raises:
        MissingPartError: the train part is not installed.
        DataError: data or tokenizer cannot be used.
    """
    train_part.require()
    folder = data_files.cache_folder(recipe)
    if not data_files.is_prepared(folder):
        with tempfile.TemporaryDirectory() as temporary:
            file, problem = Path(temporary) / "recipe.yaml", Path(temporary) / "problem"
            file.write_text(dump_recipe(recipe))
            command = [sys.executable, "-m", "distft.train.data", str(file), str(problem)]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
            if done.returncode == DataError.exit_status and problem.exists():
                raise DataError(problem.read_text())
        if done.returncode:
            raise RunError(f"the data could not be prepared:\n{done.stderr.strip()}")
    return data_files.read_counts(folder)


def job_of(settings: Recipe | ScriptSettings, plan: Plan, script: Sequence[str] | None, run: RunDir) -> Job:
    """The job of a recipe, or of a script."""
    return recipe_job(settings, plan, run) if script is None else script_job(settings, script, plan, run)


def run_job(
    settings: Recipe | ScriptSettings,
    plan: Plan,
    script: Sequence[str] | None = None,
    *,
    detach: bool = False,
    console: Console,
    started: Callable[[RunDir], None] = lambda run: None,
) -> RunDir:
    """Start what was planned and follow it to its end unless `detach`; says on `console` what it does.

    Raises:
        DistftError: nothing was started.
        RunError: the run failed.
    """
    only_this_machine(plan.topology)
    from distft.progress import Follower, say

    say(console, report.plan_lines(plan))
    if script is None:
        say(console, report.data_lines(prepare_data(settings)))
    else:
        train_part.require()
    run = RunDir.create(settings.output_dir, settings.name)
    started(run)
    local.submit(job_of(settings, plan, script, run))
    say(console, [f"run: {run.path}"])
    if detach:
        local.detach(run)
        say(console, [f"started; follow it with: distft logs -f {quote(str(run.path))}"])
        return run
    with Follower(run, console) as follower:
        local.supervise(run, watch=follower.poll)
    say(console, report.result_lines(run))
    return run


def describe_run(run: RunDir) -> dict[str, Any]:
    """A run as `--json` prints it: its folder and its status."""
    return {"run": run.path.name, "run_dir": str(run.path), **local.state_now(run)}
