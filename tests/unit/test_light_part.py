"""The light part alone (no torch, no transformers, ...): what a login node does with it, and what it is told."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from light_install import light
from tiny import Tiny

from distft import extras
from distft.errors import MissingPartError


def test_a_login_node(light_site: Path, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe()))
    assert not list(light_site.glob("torch*"))
    assert not list(light_site.glob("transformers*"))
    done = light(light_site, "validate", "recipe.yaml", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["valid"] is True, done.stderr
    assert light(light_site, "render", "recipe.yaml", "--nodes", "4", "-o", "out", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "plan.json").is_file()
    done = light(light_site, "launch", "recipe.yaml", cwd=tmp_path)
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


@pytest.mark.parametrize("command", [("validate", "--sample", "0"), ("launch", "--dry-run"), ("plan",)])
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
    with pytest.raises(MissingPartError, match=f"not known to work: {name} .*need >=") as error:
        extras.require()
    assert version in str(error.value)
