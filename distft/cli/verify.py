"""verify."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import click

from distft.cli import options


@click.command()
@click.argument("recipe")
@click.option(
    "--world-sizes",
    default="1,2,4",
    show_default=True,
    metavar="N,N...",
    help="Ranks of each run, on this machine. All runs are compared with the first.",
)
@click.option("--strategies", metavar="NAME,...", help="Default: ddp, zero2, zero3, fsdp, and the recipe's.")
@click.option(
    "--steps",
    type=click.IntRange(min=3),
    default=4,
    show_default=True,
    help="Steps of each run. The third is the first whose loss shows an update in full.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Largest difference that counts as equal. Default: 1e-5 in float32, 1e-3 with 8-bit optimizers, 2e-2 in 16 "
    "bit.",
)
@options.SETS
@click.option("--keep", metavar="DIR", help="Keep the run directories in DIR, a new or empty folder.")
@options.JSON
@click.pass_context
def verify(
    context: click.Context,
    recipe: str,
    world_sizes: str,
    strategies: str | None,
    steps: int,
    tolerance: float | None,
    sets: tuple[str, ...],
    keep: str | None,
    as_json: bool,
) -> None:
    """Check that RECIPE trains the same at every world size.

    Trains a few steps at each world size and under each strategy, on this machine, one run after the other. Exit
    status: 0 the same training, 1 not the same or a run failed, 2 the request is wrong.
    """
    from rich.console import Console

    from distft.commands import verify
    from distft.views import comparison

    asked = verify.parse_strategies(strategies) if strategies is not None else None
    planned = verify.plan(recipe, sets, verify.parse_world_sizes(world_sizes), asked, steps, tolerance)
    kept = _new_folder(keep) if keep else None
    with tempfile.TemporaryDirectory(prefix="distft-") as temporary:
        os.environ["TMPDIR"] = temporary  # for the runs: torchrun leaves a folder behind
        result = verify.run(planned, kept or Path(temporary), Console(stderr=True), keep=kept is not None)
    if as_json:
        options.print_json({"recipe": recipe} | comparison.as_json(result))
    else:
        width = max(60, min(shutil.get_terminal_size().columns, 120))
        click.echo("\n".join(comparison.lines(result, width)))
    if not result.same:
        context.exit(1)


def _new_folder(path: str) -> Path:
    """Raises RecipeError for a folder that is not empty, or cannot be created."""
    from distft.errors import RecipeError

    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise RecipeError(f"--keep: {folder} is not empty; name a new folder")
    except OSError as error:
        raise RecipeError(f"--keep: {folder} cannot be written ({str(error.strerror).lower()})") from None
    return folder
