"""quickstart."""

from __future__ import annotations

import click


@click.command()
@click.argument("folder", default="quickstart", metavar="[DIR]")
@click.option("--nodes", type=int, hidden=True)
@click.option("--gpus-per-node", "--nproc-per-node", "gpus_per_node", type=int, help="Ranks that train the base model.")
def quickstart(folder: str, nodes: int | None, gpus_per_node: int | None) -> None:
    """Write a small base model, data and recipes into DIR, with no network.

    The base model is really trained, on the standard library's sources (a minute or two); DIR/recipe.yaml then
    fine-tunes it with LoRA.
    """
    from pathlib import Path

    from rich.console import Console

    from distft.quickstart.build import build

    build(Path(folder), nodes, gpus_per_node, Console())
