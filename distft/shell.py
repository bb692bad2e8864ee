"""The only place where values become shell text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

from distft.errors import ClusterError


def quote(value: str) -> str:
    """One word for bash, whatever is in it: quotes, `$()`, newlines, spaces."""
    return shlex.quote(value)


def sbatch_quote(value: str) -> str:
    """One value of an #SBATCH line. sbatch has its own rules: nothing is expanded, `\\"` is a quote.

    Raises: ClusterError: control characters, which such a line cannot hold, or a backslash, which file names of SLURM
    cannot.
    """
    if re.fullmatch(r"[\w.,:@+=/&|*()\[\]%~^-]+", value, re.ASCII):
        return value
    if not value.isprintable() or "\\" in value:
        raise ClusterError(f"{value!r}: an #SBATCH line cannot hold control characters or a backslash")
    escaped = value.replace('"', '\\"')
    return f'"{escaped}"'


def command_line(argv: Iterable[str]) -> str:
    """A command line of literal words."""
    return " ".join(quote(word) for word in argv)
