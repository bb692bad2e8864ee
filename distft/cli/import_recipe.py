"""import."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click

from distft.cli import options


@click.command("import")
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="FILE | -- COMMAND...")
@click.option(
    "-o",
    "--output",
    default="recipe.yaml",
    show_default=True,
    metavar="FILE",
    help="Where to write the recipe; - is standard output.",
)
@click.option("--cluster-out", metavar="FILE", help="Write a cluster profile, too, from accelerate's config.")
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    metavar="N",
    help="On how many GPUs the file was used: batch sizes in it are per GPU.",
)
@click.option("--partial", is_flag=True, help="Write a recipe even if it lacks what changes the training.")
@options.JSON
def import_(
    words: tuple[str, ...], output: str, cluster_out: str | None, gpus: int | None, partial: bool, as_json: bool
) -> None:
    """Write a recipe that trains what another tool's FILE trains.

    FILE is axolotl's YAML, LLaMA-Factory's YAML, torchtune's YAML, TRL's YAML or a script with its command line, or
    accelerate's config. Every option of it is mapped, dropped with what that means, or refused with why; if one is
    refused, nothing is written (exit status 2). docs/import.md has the tables.
    """
    from distft.commands import import_recipe
    from distft.errors import RecipeError
    from distft.views import import_page

    draft = import_recipe.import_recipe(words, output, cluster_out, gpus, partial)
    found: dict[str, Any] = draft.to_json()
    problem = RecipeError(import_recipe.refusal(draft)) if draft.refused and not partial else None
    to_standard_output = output == import_recipe.STANDARD_OUTPUT
    written: list[Path] = []
    if problem is None and not to_standard_output:
        try:
            written = import_recipe.write(draft, output, cluster_out)
        except RecipeError as error:  # shown below what was found
            problem = error
    if as_json:
        options.print_json(found | {"written": [str(path) for path in written]})
    else:
        width = shutil.get_terminal_size((import_page.UNLIMITED, 1)).columns  # lines are whole where they are piped
        click.echo("\n".join(import_page.lines(found, width)), err=to_standard_output)
        for text in draft.warnings:
            click.echo("\n".join(import_page.wrap(f"warning: {text}", width)), err=True)
        if to_standard_output and problem is None:
            click.echo(import_recipe.recipe_text(draft), nl=False)
        for path in written:
            click.echo(f"wrote {path}")
    if problem is not None:
        raise problem
