"""launch, render."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from distft.cli import options

if TYPE_CHECKING:
    from distft.job import Job
    from distft.planner.plan import Plan


class _LaunchCommand(click.Command):
    """Everything after `--` belongs to a script of one's own; click alone would mix it with the arguments."""

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
@options.width
@options.SETS
@click.option("--dry-run", is_flag=True, help="Print every file and the command; write and start nothing.")
@click.option("--detach", is_flag=True, help="Start in the background; see `distft status` and `distft logs`.")
@options.JSON
@click.pass_context
def launch(
    context: click.Context,
    recipe: str | None,
    nodes: int | None,
    gpus_per_node: int | None,
    sets: tuple[str, ...],
    dry_run: bool,
    detach: bool,
    as_json: bool,
) -> None:
    """Train RECIPE here, or run an unmodified accelerate or transformers SCRIPT under a strategy.

    Ctrl-C ends every process of the run. Exit status: 0 done, 1 the run failed, 2 what was asked is wrong.
    """
    from distft import launching
    from distft.run_dir import RunDir

    script = context.meta.get("script")
    if bool(recipe) == bool(script):
        raise click.UsageError(
            "give a RECIPE, or a script after --" if not recipe else "give a RECIPE or a script, not both"
        )
    if script:
        settings, plan = launching.plan_script(script, sets, nodes, gpus_per_node)
    else:
        settings, plan = launching.plan_recipe(recipe, sets, nodes, gpus_per_node)
    if dry_run:
        run = RunDir.next_free(settings.output_dir, settings.name)
        _show(launching.job_of(settings, plan, script, run), plan, as_json)
        return
    from rich.console import Console

    runs: list[RunDir] = []
    try:
        launching.run_job(settings, plan, script, detach=detach, console=Console(stderr=as_json), started=runs.append)
    finally:
        if as_json and runs:
            options.print_json(launching.describe_run(runs[0]))


@click.command()
@click.argument("recipe")
@options.width
@options.SETS
@click.option("-o", "--output", required=True, metavar="DIR", help="A new folder for the files.")
def render(recipe: str, nodes: int | None, gpus_per_node: int | None, sets: tuple[str, ...], output: str) -> None:
    """Write all that launch would write into DIR; `bash DIR/job.sh` starts it."""
    from pathlib import Path

    from distft import launching
    from distft.run_dir import RunDir
    from distft.schedulers import local
    from distft.shell import quote

    loaded, plan = launching.plan_recipe(recipe, sets, nodes, gpus_per_node)
    target = Path(output).absolute()
    run = RunDir.create(str(target.parent), target.name, exact=True)
    local.submit(launching.job_of(loaded, plan, None, run))
    click.echo(f"wrote {run.path}; start it with: bash {quote(str(run.script))}")


def _show(job: Job, plan: Plan, as_json: bool) -> None:
    """The dry run: the very object that would be submitted."""
    from distft import report
    from distft.run_dir import SCRIPT
    from distft.schedulers import local
    from distft.shell import quote

    files = {**job.files, SCRIPT: local.render(job)}
    if as_json:
        options.print_json({"run_dir": str(job.run.path), "argv": list(job.argv), "env": dict(job.env), "files": files})
        return
    click.echo("\n".join(report.plan_lines(plan)))
    for name, text in files.items():
        click.secho(f"\n# {job.run.path / name}", bold=True)
        click.echo(text.rstrip("\n"))
    click.secho("\n# command", bold=True)
    click.echo(f"bash {quote(str(job.run.script))}")
    click.echo("\nnothing was written or started")
