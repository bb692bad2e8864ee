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
    """One value of an #SBATCH line, which sbatch reads with rules of its own: no `$`, and a backslash escapes.

    Raises:
        ClusterError: control characters, which no such line can hold.
    """
    if re.fullmatch(r"[\w.,:@+=/&|*()\[\]%~^-]+", value, re.ASCII):
        return value
    if not value.isprintable():
        raise ClusterError(f"{value!r}: a line of a job script cannot hold control characters")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def command_line(argv: Iterable[str]) -> str:
    """A command of literal words."""
    return " ".join(quote(word) for word in argv)
