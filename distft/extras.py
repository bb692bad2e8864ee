"""Is the train part installed, in versions that are known to work? Packages' metadata tell; nothing is imported."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from functools import cache

from distft.errors import MissingPartError

INSTALL = 'pip install "distft[train]"'


def require() -> None:
    """Check every requirement of distft[train].

    Raises:
        MissingPartError: packages that are missing, or outside the range that was tested.
    """
    from importlib import metadata  # only here: what merely plans does not need its tenth of a command's time

    missing, wrong = [], []
    for name, bounds in requirements():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if not within(version, bounds):
            wrong.append(
                f"{name} {version} (works: {', '.join(op + bound for op, bound in sorted(bounds, reverse=True))})"
            )
    if missing:
        raise MissingPartError(f"training needs {', '.join(missing)}: {INSTALL}")
    if wrong:
        raise MissingPartError(f"these versions are not known to work: {'; '.join(wrong)}: {INSTALL}")


@cache
def installed() -> dict[str, str]:
    """Name → version of every distribution, by the names of their folders: importlib.metadata takes as long to load as
    a whole plan."""
    found: dict[str, str] = {}
    for folder in sys.path:
        with contextlib.suppress(OSError):
            for name in os.listdir(folder or "."):  # noqa: PTH208 (in half the time)
                if match := re.fullmatch(r"(.+)-([0-9][^-]*)\.dist-info", name):
                    found.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), match[2])
    return found


def requirements() -> list[tuple[str, list[tuple[str, str]]]]:
    """Name and bounds of what distft's own metadata asks for under the extra `train`."""
    from importlib import metadata

    found = []
    for line in metadata.requires("distft") or []:
        requirement, _, marker = line.partition(";")
        if re.search(r"""extra\s*==\s*["']train["']""", marker):
            name = re.match(r"[A-Za-z0-9._-]+", requirement)[0]
            found.append((name, re.findall(r"(>=|<=|==|<|>)\s*([0-9][0-9.]*)", requirement)))
    return found


def within(version: str, bounds: list[tuple[str, str]]) -> bool:
    """Whether a version lies in all the bounds, as `requirements` gives them."""
    have = _release(version)
    return all(
        {">=": have >= bound, "<=": have <= bound, "<": have < bound, ">": have > bound, "==": have == bound}[op]
        for op, bound in ((op, _release(text)) for op, text in bounds)
    )


def _release(version: str) -> tuple[int, ...]:
    """2.13.0+cpu → (2, 13): trailing zeros say nothing."""
    numbers = [int(part) for part in re.match(r"[0-9]+(?:\.[0-9]+)*", version)[0].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
