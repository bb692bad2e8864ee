"""The one place where values become shell text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

from distft.errors import ClusterError


def quote(value: str) -> str:
    """One word for bash, whatever it holds: quotes, `$()`, newlines, spaces."""
    return shlex.quote(value)


def sbatch_quote(value: str) -> str:
    """One value of an #SBATCH line, which sbatch reads with rules of its own: nothing is expanded, `\\"` is a quote.

    Raises:
        ClusterError: control characters, which no such line can hold, or a backslash, which SLURM's file names cannot.
    """
    if re.fullmatch(r"[\w.,:@+=/&|*()\[\]%~^-]+", value, re.ASCII):
        return value
    if not value.isprintable() or "\\" in value:
        raise ClusterError(f"{value!r}: an #SBATCH line cannot hold control characters or a backslash")
    escaped = value.replace('"', '\\"')
    return f'"{escaped}"'


def command_line(argv: Iterable[str]) -> str:
    """A command of literal words."""
    return " ".join(quote(word) for word in argv)
