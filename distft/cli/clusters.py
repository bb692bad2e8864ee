"""cluster init, cluster check, slurm template."""

from __future__ import annotations

from pathlib import Path

import click

from distft.cli import options


@click.group()
def cluster() -> None:
    """Write and check site profiles."""


@cluster.command()
@click.argument("file", required=False)
def init(file: str | None) -> None:
    """Write a first profile from what sinfo and scontrol report.

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
        raise ClusterError(f"{path}: already exists; name another FILE, or remove it") from None
    except OSError as error:
        raise ClusterError(f"{path}: cannot be written ({error.strerror})") from None
    click.echo(f"wrote {path}; review it, then run: distft cluster check {path if file else name}")


@cluster.command()
@click.argument("profile")
@click.option(
    "--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Check for a job on N nodes.", metavar="N"
)
@options.JSON
def check(profile: str, nodes: int, as_json: bool) -> None:
    """Compare PROFILE with the cluster, before anything is queued.

    Exit status 2 if a check fails.
    """
    from distft.config.cluster import load_cluster
    from distft.schedulers import cluster_probe

    checks = cluster_probe.check(load_cluster(profile), nodes)
    ok = all(verdict is not False for verdict, _ in checks)
    if as_json:
        options.print_json({"ok": ok, "checks": [{"ok": verdict, "text": text} for verdict, text in checks]})
    else:
        for verdict, text in checks:
            word, colour = {True: ("ok", "green"), False: ("failed", "red"), None: ("not checked", "yellow")}[verdict]
            click.echo(f"{click.style(word, fg=colour)}: {text}")
    if not ok:
        raise SystemExit(2)


@click.group()
def slurm() -> None:
    """Print templates of the job script."""


STARTER = """\
{#- Your own job template: the built-in one with some of its blocks replaced. What {{ }} prints is quoted for bash.
    The blocks, in order: directives, environment, setup, rendezvous, steps, preflight, prepare, train.
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
@click.option("-o", "--output", metavar="FILE", help="Write it to FILE instead of printing it.")
@click.option("--builtin", is_flag=True, help="Print the built-in template itself.")
def template(output: str | None, builtin: bool) -> None:
    """Print a starting point for your own job template.

    Use it with `--template FILE`, or with `template` in the profile.
    """
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
        raise ClusterError(f"{output}: cannot be written ({str(error.strerror).lower()})") from None
    click.echo(f"wrote {output}; use it with: distft launch RECIPE --cluster PROFILE --template {output}")
