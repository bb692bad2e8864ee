"""The options of a tool that need no code, from NAME.txt: what becomes of them and why, then their names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distft.importers.options import Options


@dataclass(frozen=True)
class Table:
    """Option → what dropping it means, or why it is refused."""

    dropped: dict[str, str]
    refused: dict[str, str]

    def apply(self, options: Options) -> None:
        """Drop or refuse those options that nothing has looked at."""
        options.drop_all(self.dropped)
        options.refuse_all(self.refused)


@cache
def table(name: str) -> Table:
    found = Table({}, {})
    target: dict[str, str] = {}
    why = ""
    for line in (resources.files(__package__) / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("    "):
            target |= dict.fromkeys(line.split(), why)
        elif line and not line.startswith("#"):
            kind, _, why = line.partition(": ")
            target = {"dropped": found.dropped, "refused": found.refused}[kind]
    return found
