"""plan."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from distft.cli import options

if TYPE_CHECKING:
    from distft.jobs.target import Target


@click.command()
@click.argument("recipe")
@options.SETS
@options.target
@click.option(
    "--gpu",
    metavar="NAME",
    help="A GPU (h100-80gb, rtx4090, ...), a memory size (48GiB), or `local`. Default: the profile's, or H100.",
)
@click.option("--simulate", is_flag=True, help="Count the memory on fake tensors, also where a formula is known.")
@click.option("--calibrate", metavar="RUN", help="Use the speed that RUN reached instead of a typical one.")
@options.JSON
@click.pass_context
def plan(
    context: click.Context,
    recipe: str,
    sets: tuple[str, ...],
    target: Target,
    gpu: str | None,
    simulate: bool,
    calibrate: str | None,
    as_json: bool,
) -> None:
    """Show whether RECIPE fits, under which strategy, and how fast.

    The model's config.json is read, and as much of the data as shows how many steps there are: at least 10. No GPU and
    no weights are needed, and with --cluster or --gpu no data. Exit status: 0 it fits, 1 it does not fit or that is not
    known, 2 the request is wrong.
    """
    from distft.commands.plan import plan as planned
    from distft.planner.plan import plan_json
    from distft.views import plan_page

    found = planned(recipe, sets, target, gpu, simulate, calibrate)
    if as_json:
        around = asdict(found.limits) | {"would_fit": found.would_fit}
        options.print_json(plan_json(found.plan, found.plan.recipe.name) | {"limits": around})
    else:
        width = max(60, min(shutil.get_terminal_size().columns, 200))
        click.echo("\n".join(plan_page.lines(found.plan, found.limits, found.would_fit, width)))
    if not found.plan.fits:
        context.exit(1)
