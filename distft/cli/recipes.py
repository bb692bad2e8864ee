"""validate, schema."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from distft.cli import options

if TYPE_CHECKING:
    from distft.jobs.target import Target


@click.command()
@click.argument("recipe")
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    metavar="N",
    help="How many rows of each split to render and tokenize, where the tokenizer is here; 0: none.",
)
@options.SETS
@options.target
@options.JSON
def validate(recipe: str, sample: int, sets: tuple[str, ...], target: Target, as_json: bool) -> None:
    """Check RECIPE, its model and its data, without torch.

    All problems of the recipe are listed at once, then all kinds of problems of the rows: the first rows of each file
    are rendered and tokenized as they are trained. `launch` does this to all rows.
    """
    from distft.commands.data import check_sample
    from distft.data import few_steps
    from distft.data.reading import are_here
    from distft.jobs.target import plan_recipe

    loaded, plan = plan_recipe(recipe, sets, target)
    checked = check_sample(recipe, sets, loaded, sample, plan.data)
    warnings = (*plan.warnings, *checked.warnings, *few_steps.expected(loaded, checked.row_tokens))
    plan = replace(plan, warnings=warnings, data=(*plan.data, *checked.lines))
    if as_json:
        options.print_json(
            {
                "recipe": recipe,
                "name": loaded.name,
                "valid": True,
                "warnings": list(plan.warnings),
                "data": list(plan.data),
                "data_is_here": are_here(loaded),
            }
        )
        return
    options.print_warnings(plan.warnings)
    devices = f"{plan.topology.nnodes} x {plan.topology.nproc_per_node} {plan.device.name}"
    unchecked = "" if are_here(loaded) else "; the data that is not here was not checked"
    click.echo("\n".join([*plan.data, f"{recipe}: valid on {devices}{unchecked}"]))


@click.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for editors."""
    from distft.config.recipe import Recipe
    from distft.config.schema_text import documented_schema

    click.echo(json.dumps(documented_schema(Recipe), indent=2))
