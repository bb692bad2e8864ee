"""launch, render."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
        raise click.UsageError("give a RECIPE, or a script after --" if not recipe else "give a RECIPE or a script, not both")
    if script:
        settings, plan = launching.plan_script(script, sets, nodes, gpus_per_node)
    else:
        settings, plan = launching.plan_recipe(recipe, sets, nodes, gpus_per_node)
    if dry_run:
        _show(_job(settings, plan, script, RunDir.next_free(settings.output_dir, settings.name)), plan, as_json)
        return
    _say_plan(plan, as_json)
    if script:
        launching.train_part.require()
    else:
        _say_data(launching.prepare_data(settings), as_json)
    run = RunDir.create(settings.output_dir, settings.name)
    options.note(f"run: {run.path}", as_json)
    from rich.console import Console

    try:
        launching.start(_job(settings, plan, script, run), detach=detach, console=Console(stderr=as_json))
    finally:
        if as_json:
            options.print_json(launching.describe_run(run))
    if detach:
        options.note(f"started; follow it with: distft logs -f {run.path}", as_json)
    elif not as_json:
        _say_result(run, script)


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
    local.submit(_job(loaded, plan, None, run))
    click.echo(f"wrote {run.path}; start it with: bash {quote(str(run.script))}")


def _job(settings: Any, plan: Plan, script: list[str] | None, run: Any) -> Job:
    from distft.job import recipe_job, script_job

    return script_job(settings, script, plan, run) if script else recipe_job(settings, plan, run)


def _show(job: Job, plan: Plan, as_json: bool) -> None:
    """The dry run: the very object that would be submitted."""
    from distft.run_dir import SCRIPT
    from distft.schedulers import local
    from distft.shell import quote

    files = {**job.files, SCRIPT: local.render(job)}
    if as_json:
        options.print_json({"run_dir": str(job.run.path), "argv": list(job.argv), "env": dict(job.env), "files": files})
        return
    _say_plan(plan, as_json)
    for name, text in files.items():
        click.secho(f"\n# {job.run.path / name}", bold=True)
        click.echo(text.rstrip("\n"))
    click.secho("\n# command", bold=True)
    click.echo(f"bash {quote(str(job.run.script))}")
    click.echo("\nnothing was written or started")


def _say_plan(plan: Plan, as_json: bool) -> None:
    width = f"{plan.topology.nnodes} x {plan.topology.nproc_per_node} {plan.device.name}"
    options.note(f"plan: {plan.strategy} on {width}, mixed precision {plan.mixed_precision}", as_json)
    if plan.batch:
        b = plan.batch
        options.note(
            f"  global batch {b.global_batch_size} = {b.micro_batch_size} micro x {b.gradient_accumulation_steps} "
            f"accumulation x {plan.topology.world_size} ranks",
            as_json,
        )
    for reason in plan.reasons:
        options.note(f"  {reason}", as_json)
    for warning in plan.warnings:
        click.echo(f"warning: {warning}", err=True)


def _say_data(counts: dict[str, dict[str, Any]], as_json: bool) -> None:
    for split, count in counts.items():
        packed = f" in {count['rows']:,} packed rows" if count["rows"] != count["documents"] else ""
        options.note(
            f"{split}: {count['documents']:,} documents{packed}, {count['tokens']:,} tokens "
            f"({count['trained_tokens']:,} trained on)",
            as_json,
        )
        if count["long_rows"]:
            text = f"{count['long_rows']:,} rows of {split} are longer than max_length (longest {count['longest']:,})"
            click.echo(f"warning: {text}; first: {count['examples'][0]}", err=True)


def _say_result(run: Any, script: list[str] | None) -> None:
    status = run.read_status()
    if script:
        click.echo(f"done; logs: {run.logs}")
        return
    if "heldout_loss_after" in status:
        click.echo(f"held-out loss: {status['heldout_loss_before']:.4f} -> {status['heldout_loss_after']:.4f}")
    click.echo(f"done: {run.final}")

