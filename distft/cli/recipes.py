"""validate, schema."""

from __future__ import annotations

import json

import click

from distft.cli import options


@click.command()
@click.argument("recipe")
@options.SETS
@options.width
@options.JSON
def validate(recipe: str, sets: tuple[str, ...], nodes: int | None, gpus_per_node: int | None, as_json: bool) -> None:
    """Check RECIPE, its model, its data and the width, without torch; all problems at once."""
    from distft import launching

    loaded, plan = launching.plan_recipe(recipe, sets, nodes, gpus_per_node)
    if as_json:
        options.print_json({"recipe": recipe, "name": loaded.name, "valid": True, "warnings": list(plan.warnings)})
        return
    for warning in plan.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"{recipe}: valid")


@click.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for editors."""
    from distft.recipe import Recipe

    click.echo(json.dumps(Recipe.model_json_schema(), indent=2))
