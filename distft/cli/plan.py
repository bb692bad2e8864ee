"""plan."""

from __future__ import annotations

import logging
import shutil
import warnings
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from distft.cli import options

if TYPE_CHECKING:
    from distft.place import Place

# What is planned for where neither --gpu nor --cluster says: nothing is looked for on this machine unless asked.
USUAL_GPU = "H100"


@click.command()
@click.argument("recipe")
@options.SETS
@options.place
@click.option(
    "--gpu",
    metavar="NAME",
    help=f"A GPU (h100-80gb, rtx4090, ...), a size (48GiB), or `local`. Default: the profile's, or {USUAL_GPU}.",
)
@click.option("--simulate", is_flag=True, help="Count the memory of the chosen way on fake tensors: exact, in seconds.")
@click.option("--calibrate", metavar="RUN", help="Take the speed that this run had, instead of a usual one.")
@options.JSON
@click.pass_context
def plan(
    context: click.Context,
    recipe: str,
    sets: tuple[str, ...],
    place: Place,
    gpu: str | None,
    simulate: bool,
    calibrate: str | None,
    as_json: bool,
) -> None:
    """Will RECIPE fit, under which strategy, how fast, and why; from config.json alone, without a GPU.

    Exit status: 0 it fits, 1 it does not, 2 what was asked is wrong.
    """
    from distft import calibration, plan_page, train_part
    from distft.loading import load_recipe
    from distft.planner import limits
    from distft.planner.plan import make_plan, plan_json

    loaded = load_recipe(recipe, sets)
    assumed = gpu is None and not place.cluster
    where = replace(place, gpu=USUAL_GPU if assumed else gpu).where()
    if simulate:
        train_part.require()
        # transformers and bitsandbytes tell of what does not matter here.
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    measured = None
    if calibrate:
        gpu = where.device.name if where.device.type == "cuda" else None
        measured = calibration.flops_per_second(calibrate, place.runs_dir(loaded), gpu)
    made = make_plan(loaded, where, compare=True, simulated=simulate, measured=measured)
    if assumed:
        text = f"{USUAL_GPU}: neither --gpu nor --cluster names another; --gpu local is this machine"
        made = replace(made, assumptions=(text, *made.assumptions))
    around = limits.limits(made.search, made.chosen)
    mends = [] if made.fits else limits.would_fit(made.search)
    if as_json:
        found = asdict(around) | {"would_fit": mends}
        options.print_json(plan_json(made, loaded.name) | {"limits": found})
    else:
        width = max(60, min(shutil.get_terminal_size().columns, 200))
        click.echo("\n".join(plan_page.lines(made, loaded, around, mends, width)))
    if not made.fits:
        context.exit(1)
