"""cluster init, cluster check, slurm template."""

from __future__ import annotations

from pathlib import Path

import click

from distft.cli import options


@click.group()
def cluster() -> None:
    """Site profiles: what a cluster is, once, for all recipes."""


@cluster.command()
@click.argument("file", required=False)
def init(file: str | None) -> None:
    """Ask the cluster's sinfo and scontrol and write a first profile, with comments.

    FILE defaults to ~/.config/distft/clusters/NAME.yaml, where `--cluster NAME` finds it.
    """
    from distft.config.cluster import profiles_dir
    from distft.errors import ClusterError
    from distft.schedulers import cluster_probe

    name, text = cluster_probe.draft()
    path = Path(file) if file else profiles_dir() / f"{name}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as target:
            target.write(text)
    except FileExistsError:
        raise ClusterError(f"{path}: exists already; name another FILE, or remove it") from None
    except OSError as error:
        raise ClusterError(f"{path}: cannot be written ({error.strerror})") from None
    click.echo(f"wrote {path}; look it over, then: distft cluster check {path if file else name}")


@cluster.command()
@click.argument("profile")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="For a job of so many nodes.")
@options.JSON
def check(profile: str, nodes: int, as_json: bool) -> None:
    """Say what the cluster says of PROFILE, before anything is queued. Exit status 2 if something is wrong."""
    from distft.config.cluster import load_cluster
    from distft.schedulers import cluster_probe

    said = cluster_probe.check(load_cluster(profile), nodes)
    right = all(verdict is not False for verdict, _ in said)
    if as_json:
        options.print_json({"right": right, "checks": [{"right": verdict, "said": text} for verdict, text in said]})
    else:
        for verdict, text in said:
            word, colour = {True: ("right", "green"), False: ("wrong", "red"), None: ("not checked", "yellow")}[verdict]
            click.echo(f"{click.style(word, fg=colour)}: {text}")
    if not right:
        raise SystemExit(2)


@click.group()
def slurm() -> None:
    """The job script's template."""


STARTER = """\
{#- A job template of one's own: the built-in one with blocks of it replaced. What {{ }} prints is quoted for bash.
    Blocks, in order: directives, environment, setup, rendezvous, steps, preflight, prepare, train.
    `distft slurm template --builtin` shows them; docs/slurm.md explains every line. -#}
{% extends "job.sbatch" %}

{% block directives -%}
{{ super() -}}
#SBATCH --mail-type=FAIL
{% endblock %}

{% block setup -%}
{{ super() -}}
echo "run" {{ name }} "starts on $SLURM_JOB_NODELIST"
{% endblock %}
"""


@slurm.command()
@click.option("-o", "--output", metavar="FILE", help="Write it there instead of printing it.")
@click.option("--builtin", is_flag=True, help="The built-in template itself, to read.")
def template(output: str | None, builtin: bool) -> None:
    """Print a starter for a job template of one's own; `--template FILE` or the profile's `template` uses it."""
    from distft.errors import ClusterError
    from distft.schedulers.slurm import packaged_template

    text = packaged_template() if builtin else STARTER
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        with Path(output).open("x") as target:
            target.write(text)
    except OSError as error:
        raise ClusterError(f"{output}: cannot be written ({error.strerror.lower()})") from None
    click.echo(f"wrote {output}; use it with: distft launch RECIPE --cluster PROFILE --template {output}")
