"""The light part alone (no torch, no transformers, ...): what a login node does with it, and what it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from conftest import Tiny

from distft import extras
from distft.errors import MissingPartError

ROOT = Path(__file__).parent.parent


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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages as `pip install distft` would make it, of links to those installed here."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "distft").symlink_to(ROOT / "distft")
    for name in requirements("distft"):
        distribution = metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or [] if path.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists() and not top.startswith("__editable__"):
                (folder / top).symlink_to(distribution.locate_file(top))
    return folder


def light(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    # -S: the packages of this environment are out of reach.
    command = [sys.executable, "-S", "-m", "distft", *arguments]
    return subprocess.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)


def test_a_login_node(site: Path, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe()))
    assert not list(site.glob("torch*"))
    assert not list(site.glob("transformers*"))
    done = light(site, "validate", "recipe.yaml", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["valid"] is True, done.stderr
    assert light(site, "render", "recipe.yaml", "--nodes", "4", "-o", "out", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "plan.json").is_file()
    done = light(site, "launch", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 2
    error = done.stderr.splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: training needs torch, transformers, ")
    assert error[0].endswith('pip install "distft[train]"')
    assert not (tmp_path / "runs").exists()


def test_installed_versions() -> None:
    found = extras.installed()
    for name, _ in extras.requirements():
        assert found[name] == metadata.version(name)


@pytest.mark.parametrize("command", [("validate",), ("launch", "--dry-run"), ("plan",)])
def test_start_up_is_light(tiny: Tiny, tmp_path: Path, command: tuple[str, ...]) -> None:
    """importlib.metadata alone is a tenth of the time; pydantic would load it, and look for plugins everywhere."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe()))
    arguments = [sys.executable, "-X", "importtime", "-m", "distft", *command, "recipe.yaml"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"pydantic", "distft.planner.plan"} <= loaded
    assert not loaded & {"importlib.metadata", "rich", "jinja2", "torch", "transformers", "asyncio"}


@pytest.mark.parametrize(
    ("name", "version", "accepted"),
    [
        ("torch", "2.10.1", False),
        ("torch", "2.11.0+cu128", True),
        ("torch", "2.14.0", False),
        ("transformers", "5.16.9", False),
        ("transformers", "5.17.0", True),
        ("transformers", "5.24.0.dev0", False),
        ("deepspeed", "0.20.0", False),
        ("trl", "1.10.0", False),  # its collator has no return_position_ids
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, name: str, version: str, accepted: bool) -> None:
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda package: version if package == name else installed(package))
    if accepted:
        extras.require()
        return
    with pytest.raises(MissingPartError, match=f"not known to work: {name} .*works: >=") as error:
        extras.require()
    assert version in str(error.value)
