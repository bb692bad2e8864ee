"""data."""

from __future__ import annotations

import os
import shutil
import sys

import click

from distft.cli import options


@click.command()
@click.argument("recipe")
@click.option("--row", type=click.IntRange(min=1), metavar="N", help="Show row N of data.train, whole. Counted from 1.")
@click.option(
    "--eval",
    "only_eval",
    is_flag=True,
    help="Show the rows of data.eval, or those that it holds out.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    metavar="N",
    help="How many rows of each split to read for the summary.",
)
@options.SETS
@options.JSON
def data(recipe: str, row: int | None, only_eval: bool, sample: int, sets: tuple[str, ...], as_json: bool) -> None:
    """Show the rows of RECIPE as they are trained.

    Trained tokens are coloured, or in ⟦brackets⟧ where there is no colour. Without --row: how many rows, tokens and
    trained tokens there are, how long the rows are, what is left out, and which rows would not be trained as they are
    meant (exit status 2).
    """
    from distft.commands import data
    from distft.errors import DataError
    from distft.views import data_page

    found = data.show_rows(recipe, sets, row, sample, only_eval)
    if as_json:
        options.print_json({"recipe": recipe, **found})
    else:
        coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        click.echo("\n".join(data_page.lines(found, shutil.get_terminal_size().columns, coloured, row is not None)))
    if problems := data.problems(found):
        raise DataError("\n".join(problems))
