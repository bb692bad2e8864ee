"""distft installed without its train extra: what a login node has."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]


def requirements(name: str) -> set[str]:
    """A package and all that it needs without extras."""
    found, todo = set(), [name]
    while todo:
        package = todo.pop()
        try:
            lines = metadata.requires(package) or []
        except metadata.PackageNotFoundError:  # for another platform or Python
            continue
        found.add(package)
        names = {line.split(";")[0].split("[")[0] for line in lines if "extra ==" not in line}
        todo += {name.rstrip("0123456789.,<>=!~ ()") for name in names} - found
    return found


def fill(folder: Path) -> None:
    """Make `folder` what `pip install --target` of distft alone would make it, of links to what is installed here."""
    (folder / "distft").symlink_to(ROOT / "distft")
    for name in requirements("distft"):
        distribution = metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or [] if path.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists() and not top.startswith("__editable__"):
                (folder / top).symlink_to(distribution.locate_file(top))


def light(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    # -S: the packages of this environment are out of reach.
    command = [sys.executable, "-S", "-m", "distft", *arguments]
    return subprocess.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)
