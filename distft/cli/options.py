"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

SETS = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value of the recipe, e.g. --set training.max_steps=50. May be repeated.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output, nothing else.")
OUTPUT_DIR = click.option(
    "--output-dir", default="runs", show_default=True, help="Where a RUN is looked for by its name."
)


def width(command: Callable) -> Callable:
    """--nodes and --gpus-per-node."""
    command = click.option(
        "--gpus-per-node",
        "--nproc-per-node",
        "gpus_per_node",
        type=int,
        help="Ranks on each node. Default: all its GPUs; without GPUs, one CPU process.",
    )(command)
    return click.option("--nodes", type=int, help="Nodes. Default: this machine alone.")(command)


def print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=1))
