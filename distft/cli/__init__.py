"""The command line: click commands that parse, call and print. Nothing here imports torch, at any time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import click

from distft import __version__
from distft.errors import DistftError


class _Problem(click.ClickException):
    """A DistftError as click shows it: one `error:` line a problem, on standard error."""

    def __init__(self, error: DistftError):
        super().__init__(str(error))
        self.exit_code = error.exit_status

    def show(self, file: object = None) -> None:
        first, *rest = self.message.splitlines() or [""]
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo("\n".join([first, *rest]), err=True)


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn a DistftError into what click prints and exits with."""
    try:
        yield
    except DistftError as error:
        raise _Problem(error) from None


class _Group(click.Group):
    def invoke(self, context: click.Context) -> object:
        with reporting_errors():
            return super().invoke(context)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="distft")
def main() -> None:
    """One fine-tuning recipe, any number of GPUs, the same training at every width."""


def _add_commands() -> None:
    from distft.cli import clusters, doctor, launch, quickstart, recipes, runs

    for command in (
        quickstart.quickstart,
        recipes.validate,
        recipes.schema,
        launch.render,
        launch.launch,
        runs.status,
        runs.logs,
        runs.cancel,
        clusters.cluster,
        clusters.slurm,
        doctor.doctor,
    ):
        main.add_command(command)


_add_commands()
