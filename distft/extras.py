"""Is distft[train] installed, in versions known to work? Read from the packages' metadata; nothing is imported."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from functools import cache
from pathlib import Path

from distft.errors import MissingPartError

INSTALL = 'pip install "distft[train]"'

Bounds = list[tuple[str, str]]  # [(">=", "2.11"), ("<", "2.14")]


def require() -> None:
    """Check every requirement of distft[train].

    Raises:
        MissingPartError: packages that are missing, or outside the range that was tested.
    """
    from importlib import metadata  # only here: loading it takes a tenth of a command's time

    missing, outside = [], []
    for name, bounds in requirements():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if not within(version, bounds):
            outside.append(f"{name} {version} (need {describe(bounds)})")
    if missing:
        raise MissingPartError(f"training needs {', '.join(missing)}: {INSTALL}")
    if outside:
        raise MissingPartError(f"not known to work: {'; '.join(outside)}: {INSTALL}")


@cache
def installed() -> dict[str, str]:
    """Name → version of every distribution, from the names of their folders.

    Loading importlib.metadata takes as long as a whole plan.
    """
    found: dict[str, str] = {}
    for folder in sys.path:
        with contextlib.suppress(OSError):
            for name in os.listdir(folder or "."):  # noqa: PTH208 (takes half the time)
                if match := re.fullmatch(r"(.+)-([0-9][^-]*)\.dist-info", name):
                    found.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), match[2])
    return found


@cache
def source(package: str, path: str) -> str | None:
    """The text of a module of a package, None where it is not installed. Finding a package does not import it."""
    import importlib.util  # only here: most commands need none of this

    found = importlib.util.find_spec(package)
    file = Path(found.origin).parent / path if found and found.origin else None
    return file.read_text(encoding="utf-8") if file and file.is_file() else None


def requirements() -> list[tuple[str, Bounds]]:
    """Name and bounds of each package that distft's own metadata lists under the extra `train`, without conditions:
    those that not every machine can have are not needed."""
    from importlib import metadata

    found = []
    for line in metadata.requires("distft") or []:
        requirement, _, marker = line.partition(";")
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name and re.fullmatch(r"""\s*extra\s*==\s*["']train["']\s*""", marker):
            found.append((name[0], re.findall(r"(>=|<=|==|<|>)\s*([0-9][0-9.]*)", requirement)))
    return found


def describe(bounds: Bounds) -> str:
    """`>=2.11, <2.14`"""
    return ", ".join(operator + version for operator, version in sorted(bounds, reverse=True))


def within(version: str, bounds: Bounds) -> bool:
    """Whether a version satisfies all bounds."""
    have = _release(version)
    return all(
        {">=": have >= bound, "<=": have <= bound, "<": have < bound, ">": have > bound, "==": have == bound}[operator]
        for operator, bound in ((operator, _release(text)) for operator, text in bounds)
    )


def _release(version: str) -> tuple[int, ...]:
    """2.13.0+cpu → (2, 13): trailing zeros make no difference."""
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
