"""launch, render."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from distft.cli import options

if TYPE_CHECKING:
    from distft.config.cluster import Cluster
    from distft.jobs.job import Job
    from distft.jobs.target import Target
    from distft.planner.plan import Plan


class _LaunchCommand(click.Command):
    """Everything after `--` is the command of a user's script; click would mix it with its own arguments."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            context.meta["script"] = args[at + 1 :]
            args = args[:at]
        return super().parse_args(context, args)

    def format_usage(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(context.command_path, "[OPTIONS] RECIPE")
        formatter.write_usage(context.command_path, "[OPTIONS] -- SCRIPT.py [ARGS]...", prefix="       ")


@click.command(cls=_LaunchCommand)
@click.argument("recipe", required=False)
@options.target
@options.SETS
@click.option("--after", metavar="JOB", help="Start once this SLURM job, or this run, has completed.")
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="KEY=V,V...",
    help="A run for each value (and each combination, when repeated), as one array job.",
)
@click.option("--force", is_flag=True, help="Start even if the plan says that memory will run out.")
@click.option("--dry-run", is_flag=True, help="Print every file and the command; write and start nothing.")
@click.option("--detach", is_flag=True, help="Do not follow it; see `distft status` and `distft logs`.")
@options.JSON
@click.pass_context
def launch(
    context: click.Context,
    recipe: str | None,
    target: Target,
    sets: tuple[str, ...],
    after: str | None,
    sweeps: tuple[str, ...],
    force: bool,
    dry_run: bool,
    detach: bool,
    as_json: bool,
) -> None:
    """Train RECIPE, or run your own script, here or on a cluster.

    SCRIPT is an unmodified accelerate or transformers.Trainer script, which runs under the strategy; -m MODULE and
    installed programs (trl sft) work too. For a run on this
    machine, Ctrl-C saves at the next step and ends the run; a second Ctrl-C ends it at once. A job on a cluster keeps
    running. Exit status: 0 done, 1 the run failed, 2 the request is wrong.
    """
    from distft.commands.follow import describe_run
    from distft.commands.launch import Launch, RecipeLaunch, ScriptLaunch, dependency, must_fit
    from distft.jobs.target import plan_recipe, plan_script
    from distft.runs.directory import RunDir

    script: list[str] = context.meta.get("script", [])
    if not recipe and not script:
        raise click.UsageError("give a RECIPE, or a script after --")
    if recipe and script:
        raise click.UsageError("give a RECIPE or a script, not both")
    if recipe and recipe.endswith(".py"):
        raise click.UsageError(f"{recipe} is a script: put -- before it")
    for option, given in (("--after", after), ("--sweep", sweeps)):
        if given and not target.cluster:
            raise click.UsageError(f"{option} needs --cluster PROFILE")
    if sweeps and target.cluster:
        if not recipe:
            raise click.UsageError("--sweep is for a RECIPE, not for a script")
        _sweep(recipe, target, target.cluster, sets, sweeps, after, force, dry_run, detach, as_json)
        return
    planned: Launch
    if recipe:
        loaded, plan = plan_recipe(recipe, sets, target, need_weights=not dry_run, for_launch=True)
        if not (dry_run or force):
            must_fit(plan)
        after = after and dependency(after, target.runs_dir(loaded))
        planned = RecipeLaunch(loaded, plan, target, after, detach)
    else:
        settings, script_plan, words = plan_script(script, sets, target)
        after = after and dependency(after, target.runs_dir(settings))
        planned = ScriptLaunch(settings, script_plan, target, after, detach, script=words)
    if dry_run:
        _show(planned.job(planned.next_run()), planned.plan, as_json)
        return
    from rich.console import Console

    runs: list[RunDir] = []
    try:
        planned.start(Console(stderr=as_json), runs.append)
    finally:
        if as_json and runs and runs[0].path.exists():
            options.print_json(describe_run(runs[0]))


def _sweep(
    recipe: str,
    target: Target,
    cluster: Cluster,
    sets: tuple[str, ...],
    sweeps: tuple[str, ...],
    after: str | None,
    force: bool,
    dry_run: bool,
    detach: bool,
    as_json: bool,
) -> None:
    from rich.console import Console

    from distft.commands import sweep
    from distft.commands.follow import describe_runs
    from distft.commands.launch import dependency, must_fit

    after = after and dependency(after, cluster.runs_dir)
    planned = sweep.plan(recipe, sets, sweeps, target, cluster, after, need_weights=not dry_run)
    if not (dry_run or force):
        for launch in planned.launches:
            must_fit(launch.plan)
    if dry_run:
        folder = planned.next_folder
        if as_json:
            options.print_json({"sweep": str(folder), "sets": planned.sets, "script": planned.script(folder)})
        else:
            click.echo(planned.script(folder) + "\n" + "\n".join("  ".join(texts) for texts in planned.sets))
            click.echo("\nnothing was written or started")
        return
    folder = planned.start(Console(stderr=as_json), detach)
    if as_json:
        options.print_json({"sweep": str(folder), "runs": describe_runs(sweep.runs_of(folder))})


@click.command()
@click.argument("recipe")
@options.target
@options.SETS
@click.option("-o", "--output", required=True, metavar="DIR", help="A new folder for the files.")
def render(recipe: str, target: Target, sets: tuple[str, ...], output: str) -> None:
    """Write all files of a launch into DIR, and start nothing.

    `bash DIR/job.sh` or `sbatch DIR/job.sbatch` starts it.
    """
    from pathlib import Path

    from distft.commands.launch import RecipeLaunch
    from distft.commands.launch import render as rendered
    from distft.data import few_steps
    from distft.jobs.target import plan_recipe
    from distft.runs import attempts
    from distft.runs.directory import RunDir
    from distft.shell import quote

    loaded, plan = plan_recipe(recipe, sets, target)
    folder = Path(output).absolute()
    planned = RecipeLaunch(loaded, plan, target)
    rendered(planned.job(RunDir(folder)))  # before anything is written: the template may be wrong
    run = RunDir.create(str(folder.parent), folder.name, exact=True)
    attempts.fill(run, rendered(planned.job(run)), loaded.name)
    options.print_warnings([*plan.warnings, *few_steps.expected(loaded)])
    how = "sbatch" if target.cluster else "bash"
    click.echo(f"wrote {run.path}; start it with: {how} {quote(str(run.script))}")


def _show(job: Job, plan: Plan, as_json: bool) -> None:
    """The dry run: the very object that would be submitted."""
    from distft.commands.launch import render as rendered
    from distft.runs.directory import SBATCH, SCRIPT
    from distft.shell import quote
    from distft.views import summary

    files = rendered(job)
    if as_json:
        options.print_json({"run_dir": str(job.run.path), "argv": list(job.argv), "env": dict(job.env), "files": files})
        return
    click.echo("\n".join(summary.plan_lines(plan)))
    for name, text in files.items():
        click.secho(f"\n# {job.run.path / name}", bold=True)
        click.echo(text.rstrip("\n"))
    click.secho("\n# command", bold=True)
    command, script = ("sbatch", SBATCH) if SBATCH in files else ("bash", SCRIPT)
    click.echo(f"{command} {quote(str(job.run.path / script))}")
    click.echo("\nnothing was written or started")
