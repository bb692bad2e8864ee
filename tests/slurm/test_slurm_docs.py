"""Every command of docs/slurm.md, in its order, on a real cluster without GPUs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
import yaml
from slurm_site import PATIENCE, STUB, on_path
from tiny import Tiny

pytestmark = pytest.mark.slurm
PAGE = (Path(__file__).parents[2] / "docs" / "slurm.md").read_text()
# Real training in the ways that no other test has it; the stub of the training loop in the others.
REAL = ("--sweep", "salloc")


@dataclass
class Followed:
    """What the commands printed, and status.json of each run when no job was left, by its name in distft-runs."""

    done: dict[str, subprocess.CompletedProcess]
    runs: dict[str, dict[str, Any]]


def follow_the_page(folder: Path, tiny: Tiny) -> Followed:
    """Run the page's commands in an empty home folder that has a recipe."""
    commands = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    home, bin_folder = folder / "home", folder / "bin"
    (home / "demo").mkdir(parents=True)
    recipe = tiny.recipe(name="quickstart", training__max_steps=8)
    (home / "demo" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    bin_folder.mkdir()
    (bin_folder / "distft").write_text(f'#!/bin/sh\nexec {sys.executable} -m distft "$@"\n')
    (bin_folder / "distft").chmod(0o755)
    with slurm_cluster.Cluster(folder / "slurm", gpus=0, cpus=2) as cluster:
        env = {**cluster.env(), "HOME": str(home), "HF_HUB_OFFLINE": "1"}
        env["PATH"] = f"{bin_folder}:{env['PATH']}"
        options = {"shell": True, "cwd": home, "capture_output": True, "text": True, "timeout": PATIENCE}
        done = {}
        for command in commands:
            stub = {} if any(word in command for word in REAL) else on_path(STUB)
            done[command] = subprocess.run(command, env=env | stub, **options)
            if done[command].returncode:
                break
        deadline = time.monotonic() + PATIENCE
        while cluster.run("squeue", "-h").stdout and time.monotonic() < deadline:
            time.sleep(0.5)
    runs = home / "distft-runs"
    return Followed(
        done, {str(f.parent.relative_to(runs)): json.loads(f.read_text()) for f in runs.rglob("status.json")}
    )


@pytest.mark.beside.with_args(follow_the_page)
def test_every_command(outcome: Followed) -> None:
    for command, done in outcome.done.items():
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
    assert len(outcome.done) > 15


@pytest.mark.beside.with_args(follow_the_page)
def test_what_became_of_the_runs(outcome: Followed) -> None:
    states = {name: status["state"] for name, status in outcome.runs.items()}
    assert states.pop("quickstart-2") in ("cancelled", "completed")  # followed to its end before it is cancelled
    assert set(states.values()) == {"completed"}, outcome.runs
    real = {name for name, status in outcome.runs.items() if status.get("ran", {}).get("backend") != "stub"}
    assert {"quickstart-sweep/0", "quickstart-sweep/1"} < real
    [allocated] = [outcome.runs[name] for name in real if outcome.runs[name].get("ran", {}).get("world_size") == 2]
    assert (allocated["ran"]["kind"], allocated["ran"]["backend"]) == ("ddp", "gloo")
