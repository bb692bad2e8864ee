"""resume."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from distft.cli import options

if TYPE_CHECKING:
    from distft.jobs.target import Target


@click.command()
@click.argument("run")
@options.target
@options.SETS
@click.option(
    "--output-dir", metavar="DIR", help="Where RUN is looked up by name. Default: the profile's runs_dir, or runs."
)
@click.option(
    "--force", is_flag=True, help="Continue although the recipe or the data changed, and start what may not fit."
)
@click.option("--detach", is_flag=True, help="Do not follow it; see `distft status` and `distft logs`.")
@options.JSON
def resume(
    run: str,
    target: Target,
    sets: tuple[str, ...],
    output_dir: str | None,
    force: bool,
    detach: bool,
    as_json: bool,
) -> None:
    """Continue RUN from its newest checkpoint.

    It may continue here or on a cluster, under another strategy and on another number of GPUs: the training stays the
    same. By default all of these are as they were.
    """
    from rich.console import Console

    from distft.commands.follow import describe_run
    from distft.commands.resume import plan, start
    from distft.runs.directory import RunDir

    folder = output_dir or (target.cluster.runs_dir if target.cluster else "runs")
    found = RunDir.find(run, folder)
    planned = plan(found, sets, target, force, detach)
    try:
        start(planned, Console(stderr=as_json))
    finally:
        if as_json:
            options.print_json(describe_run(found))
