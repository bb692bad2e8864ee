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
    "--output-dir", metavar="DIR", help="Where a RUN is looked for by its name. Default: the profile's, or runs."
)
@click.option(
    "--force", is_flag=True, help="Go on although the recipe or the data changed, and start what may not fit."
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
    """Go on with RUN from its newest checkpoint, here or on a cluster, on as many GPUs as you say.

    Strategy and width may change, the training does not. Without a width it is the one that RUN had.
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
