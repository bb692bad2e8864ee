"""The command line: click commands that parse, call and print. Nothing here imports torch, at any time."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import types
from collections.abc import Iterator

import click

from distft import __version__
from distft.errors import DistftError

# While modules are imported there is no garbage; looking for it takes a tenth of a command's time.
gc.set_threshold(100_000, 20, 20)

# Building a model, pydantic looks for plugins in the metadata of every installed package: a fifth of a command's time.
sys.modules["pydantic.plugin._loader"] = types.ModuleType("_loader")
sys.modules["pydantic.plugin._loader"].get_plugins = lambda: ()

# Command → module of this package that has it, under the same name.
COMMANDS = {
    "quickstart": "quickstart",
    "validate": "recipes",
    "schema": "recipes",
    "rules": "rules",
    "plan": "plan",
    "verify": "verify",
    "launch": "launch",
    "render": "launch",
    "status": "runs",
    "logs": "runs",
    "cancel": "runs",
    "resume": "resume",
    "merge": "merge",
    "cluster": "clusters",
    "slurm": "clusters",
    "doctor": "doctor",
}


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
    """Imports a command's module when the command is asked for: all of them take longer than most take to run."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"distft.cli.{COMMANDS[name]}"), name)

    def invoke(self, context: click.Context) -> object:
        with reporting_errors():
            return super().invoke(context)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="distft")
def main() -> None:
    """One fine-tuning recipe, any number of GPUs, the same training at every width."""
