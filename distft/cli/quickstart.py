"""quickstart."""

from __future__ import annotations

import click

from distft.cli.options import RANKS


@click.command()
@click.argument("folder", default="quickstart", metavar="[DIR]")
@RANKS
def quickstart(folder: str, gpus_per_node: int | None) -> None:
    """Write a small base model, data and recipes into DIR, offline.

    The base model is trained on the spot, on the sources of Python's standard library (a few minutes on two cores).
    DIR/recipe.yaml then fine-tunes it with LoRA.
    """
    from pathlib import Path

    from rich.console import Console

    from distft.quickstart.build import build

    build(Path(folder), gpus_per_node, Console())
