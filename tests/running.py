"""The command line as a user runs it, real launches, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distft.runs import attempts
from distft.runs.directory import RunDir


@dataclass(frozen=True)
class Result:
    """A launch that has ended."""

    returncode: int
    stdout: str
    stderr: str
    run_dir: Path | None

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "status.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def column(self, name: str) -> list[float]:
        return [line[name] for line in self.metrics]

    def log(self) -> str:
        """All that was logged, for a failed assertion."""
        logs = sorted((self.run_dir / "logs").glob("*.log")) if self.run_dir else []
        return "\n".join([self.stdout, self.stderr, *(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in logs)])


def distft(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run the command line as a user would."""
    command = [sys.executable, "-m", "distft", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def launch(
    recipe: dict[str, Any],
    folder: Path,
    *arguments: str,
    ranks: int = 1,
    expect: int = 0,
    env: dict[str, str] | None = None,
) -> Result:
    """`distft launch` of a recipe in `folder`, to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--gpus-per-node", str(ranks), "--json", *arguments]
    done = distft("launch", "recipe.yaml", *options, cwd=folder, env=env)
    run_dir = Path(json.loads(done.stdout)["run_dir"]) if done.stdout.startswith("{") else None
    result = Result(done.returncode, done.stdout, done.stderr, run_dir)
    assert done.returncode == expect, result.log()
    return result


def create(recipe: dict[str, Any], folder: Path, ranks: int) -> RunDir:
    """What `distft launch --gpus-per-node RANKS` in `folder` would write; nothing is started."""
    from distft.commands import launch
    from distft.jobs.target import Target, plan_recipe

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    target = Target(1, ranks)
    loaded, plan = plan_recipe(str(folder / "recipe.yaml"), (), target)
    run = RunDir.create(str(folder / "runs"), loaded.name)
    job = launch.RecipeLaunch(loaded, plan, target).job(run)
    attempts.fill(run, launch.render(job), job.name)
    return run


BEFORE = """
import os, sys, threading, time
def before(*args, **kwargs):
    {code}
def patched():
    for module in ({module!r}, "__main__"):
        owner = sys.modules.get(module)
        for part in {owners!r}:
            owner = getattr(owner, part, None)
        original = getattr(owner, {name!r}, None)
        if original is not None:
            def changed(*args, **kwargs):
                before(*args, **kwargs)
                return original(*args, **kwargs)
            setattr(owner, {name!r}, changed)
            return True
def patch():
    while not patched():
        time.sleep(0.005)
if not patched():
    threading.Thread(target=patch, daemon=True).start()
"""


def inject(folder: Path, where: str, code: str) -> dict[str, str]:
    """Have every Python run `code` before each call of MODULE:NAME, with its `args`. Returns the variables for that."""
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    text = BEFORE.format(module=module, owners=owners, name=name, code=code.replace("\n", "\n    "))
    (folder / "sitecustomize.py").write_text(text)
    return first_on_path(folder)


def first_on_path(folder: Path) -> dict[str, str]:
    """The variable with which every Python finds `folder` before anything but the stand-in for torchrun."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    stand_in = path[:1] if path[0].endswith("warm_path") else []
    return {"PYTHONPATH": os.pathsep.join(filter(None, [*stand_in, str(folder), *path[len(stand_in) :]]))}
