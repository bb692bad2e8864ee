"""The one place where values become shell text."""

from __future__ import annotations

import shlex
from collections.abc import Iterable


def quote(value: str) -> str:
    """One word for bash, whatever it holds: quotes, `$()`, newlines, spaces."""
    return shlex.quote(value)


def command_line(argv: Iterable[str]) -> str:
    """A command of literal words."""
    return " ".join(quote(word) for word in argv)
