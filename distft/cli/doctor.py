"""doctor."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from distft.cli import options

if TYPE_CHECKING:
    from distft.commands.doctor import Check
    from distft.jobs.target import Target

COLOURS = {"ok": "green", "failed": "red", "missing": "red", "warning": "yellow", "absent": None}
BAD = ("failed", "missing")


@click.command()
@options.target
@options.JSON
@click.pass_context
def doctor(context: click.Context, target: Target, as_json: bool) -> None:
    """Check that this machine, or the nodes of a cluster, can train.

    Without options: the packages and GPUs of this machine, and whether they compute. With --cluster PROFILE --nodes N:
    the preflight of N nodes, in a job that does nothing else. Exit status 1 if something failed or is missing.
    """
    # DISTFT_CLUSTER or an allocation alone does not turn a check of this machine into a job.
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    asked = [name for name in given if name != "as_json"]
    if asked and not target.cluster:
        raise click.UsageError(f"--{asked[0].replace('_', '-')} needs --cluster PROFILE")
    from rich.console import Console

    from distft.commands.doctor import nodes, this_machine

    checks: Iterable[Check] = nodes(target, Console(stderr=as_json)) if asked else this_machine()
    if not as_json:
        checks = _shown(checks)
    checks = list(checks)
    bad = [check["name"] for check in checks if check["state"] in BAD]
    if as_json:
        options.print_json({"ok": not bad, "checks": checks})
    else:
        click.echo(f"to fix: {', '.join(bad)}" if bad else "everything works")
    if bad:
        raise SystemExit(1)


def _shown(checks: Iterable[Check]) -> Iterator[Check]:
    """Print each as it comes, wrapped to the terminal."""
    import textwrap

    width = shutil.get_terminal_size().columns
    fill = textwrap.TextWrapper(width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False).fill
    for check in checks:
        state = check["state"]
        text = "\n".join(fill(line) for line in f"{state}: {check['text']}".splitlines())
        click.echo(click.style(state, fg=COLOURS[state]) + text.removeprefix(state))
        yield check
