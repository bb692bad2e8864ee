"""Options that several commands share."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from distft.jobs.target import Target

SETS = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value of the recipe, such as training.max_steps=50. Repeatable.",
)
RANKS = click.option(
    "--gpus-per-node",
    "--nproc-per-node",
    "gpus_per_node",
    type=int,
    help="Ranks per node. Default: one for each of its GPUs; without GPUs, one CPU process.",
)
JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output and nothing else."
)


def runs_dir(command: Callable[..., Any]) -> Callable[..., Any]:
    """--output-dir and --cluster: where a RUN is found by its name. The command gets `output_dir`."""

    @functools.wraps(command)
    def with_folder(*args: Any, output_dir: str | None, cluster: str | None, **kwargs: Any) -> Any:
        if output_dir is None and cluster:
            from distft.config.cluster import load_cluster

            output_dir = load_cluster(cluster).runs_dir
        return command(*args, output_dir=output_dir or "runs", **kwargs)

    with_folder = click.option(
        "--cluster",
        envvar="DISTFT_CLUSTER",
        show_envvar=True,
        metavar="PROFILE",
        help="Look in the runs_dir of this profile.",
    )(with_folder)
    return click.option(
        "--output-dir", metavar="DIR", help="Where to find RUN by its name. Default: the profile's runs_dir, or runs."
    )(with_folder)


# Options that replace slurm.* of the profile.
SLURM = ("time", "partition", "account", "qos", "constraint", "reservation")


def target(command: Callable[..., Any]) -> Callable[..., Any]:
    """--nodes, --gpus-per-node, --cluster, and what replaces values of the profile. The command gets one `target`."""

    @functools.wraps(command)
    def with_target(
        *args: Any,
        nodes: int | None,
        gpus_per_node: int | None,
        cluster: str | None,
        template: str | None,
        **kwargs: Any,
    ) -> Any:
        overrides = {f"slurm.{name}": kwargs.pop(name) for name in SLURM}
        given = {key: value for key, value in overrides.items() if value is not None}
        if template:
            given["template"] = str(Path(template).absolute())
        return command(*args, target=_target(nodes, gpus_per_node, cluster, given), **kwargs)

    for name in reversed(SLURM):
        with_target = click.option(f"--{name}", metavar=name.upper(), help=f"Replaces slurm.{name} of the profile.")(
            with_target
        )
    with_target = click.option("--template", metavar="FILE", help="Replaces the job template of the profile.")(
        with_target
    )
    with_target = click.option(
        "--cluster",
        envvar="DISTFT_CLUSTER",
        show_envvar=True,
        metavar="PROFILE",
        help="A site profile, by path or by name in ~/.config/distft/clusters: SLURM runs the job.",
    )(with_target)
    with_target = RANKS(with_target)
    return click.option("--nodes", type=int, help="Number of nodes. Default: 1, or all nodes of the allocation.")(
        with_target
    )


def _target(nodes: int | None, gpus_per_node: int | None, cluster: str | None, given: dict[str, str]) -> Target:
    from distft.jobs.target import Target

    allocated = "SLURM_JOB_ID" in os.environ and _in_allocation()
    if given and not cluster and not allocated:
        option = next(iter(given)).removeprefix("slurm.")
        raise click.UsageError(f"--{option} needs --cluster PROFILE")
    if not cluster and not allocated:
        return Target(nodes, gpus_per_node)
    from distft.config.cluster import load_cluster  # only here: its models take a moment to build
    from distft.jobs.target import allocated_cluster

    if allocated and nodes is None:
        nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    return Target(nodes, gpus_per_node, load_cluster(cluster, given) if cluster else allocated_cluster())


def _in_allocation() -> bool:
    from distft.schedulers import slurm

    return slurm.allocation() is not None


def print_warnings(warnings: Sequence[str]) -> None:
    """On standard error: standard output is for the command's answer."""
    for text in warnings:
        click.echo(f"warning: {text}", err=True)


def print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=1))
