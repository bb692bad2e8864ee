"""The command line: click commands that parse, call and print. Nothing here ever imports torch."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import re
import sys
import types
from collections.abc import Iterator
from keyword import iskeyword
from typing import Any

import click

from distft import __version__
from distft.errors import DistftError, RecipeError

# Importing modules makes no garbage; looking for it takes a tenth of a command's time.
gc.set_threshold(100_000, 20, 20)

# When pydantic builds a model it looks for plugins in the metadata of every installed package: a fifth of a command's
# time.
_no_plugins = types.ModuleType("_loader")
_no_plugins.__dict__["get_plugins"] = lambda: ()
sys.modules["pydantic.plugin._loader"] = _no_plugins

# Command → the module of this package that defines it, under the same name.
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
    "data": "data",
    "import": "import_recipe",
    "cluster": "clusters",
    "slurm": "clusters",
    "doctor": "doctor",
}


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Print a DistftError, or what is wrong with the command line, on standard error, and exit with its status. A full
    disk is no bug either."""
    try:
        yield
    except DistftError as error:
        _print_error(_other_file(error) or str(error))
        raise SystemExit(error.exit_status) from None
    except click.exceptions.NoArgsIsHelpError:  # prints the help
        raise
    except click.UsageError as error:
        _print_error(_usage(error))
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        click.echo(f"error: no space left on the device of {error.filename or 'standard output'}", err=True)
        raise SystemExit(1) from None


def _print_error(text: str) -> None:
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(text, err=True)


def _usage(error: click.UsageError) -> str:
    """What is wrong with a command line, and what is right, in one line."""
    text = re.sub(r"\. \(?Did you mean (.*?)\)?$", r"; did you mean \1", error.format_message()).removesuffix(".")
    text, fix = text[:1].lower() + text[1:], ""
    if error.ctx is None:
        return text
    path, command = error.ctx.command_path, error.ctx.command
    if isinstance(error, click.BadParameter) and not isinstance(error, click.MissingParameter):
        if error.param is not None:
            name = error.param.get_error_hint(error.ctx).replace("'", "")
            value = re.sub(r"^'?(.*?)'? is not in the range x?([<>]=?)", r"got \1, need \2 ", error.message)
            value = re.sub(r"^'?(.*?)'? is not a valid (?=[aeiou])", r"got \1, need an ", value).removesuffix(".")
            text = f"{name}: {value}"
    elif "did you mean" in text:
        pass
    elif isinstance(error, click.NoSuchOption):
        fix = f"; {path} -h lists them"
    elif isinstance(command, click.Group):
        from distft.config.schema_text import closest, did_you_mean

        names = command.list_commands(error.ctx)
        given = re.findall("'(.*)'", text)
        fix = did_you_mean(closest(given[0], names, 0.5) if given else None) or f"; those are {', '.join(names)}"
    elif isinstance(error, click.MissingParameter) or "unexpected" in text:
        fix = f"; write {' '.join([path, *command.collect_usage_pieces(error.ctx)])}"
    return f"{path}: {text}{fix}"


def _other_file(error: DistftError) -> str | None:
    """What a file is that was read as a recipe, where it is none."""
    if not isinstance(error, RecipeError) or error.read is None:
        return None
    from distft.importers.kinds import other_file

    return other_file(*error.read)


class _Group(click.Group):
    """Imports the module of the command that is asked for: importing all takes longer than most commands run."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(
            importlib.import_module(f"distft.cli.{COMMANDS[name]}"), f"{name}_" * iskeyword(name) or name
        )
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with reporting_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, context: click.Context) -> object:
        with reporting_errors():
            return super().invoke(context)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="distft")
def main() -> None:
    """One fine-tuning recipe, any number of GPUs, the same training at every world size."""
