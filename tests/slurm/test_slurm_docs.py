"""Every command of docs/slurm.md, in its order, on a real cluster without GPUs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_cluster
import yaml
from tiny import Tiny

pytestmark = pytest.mark.slurm
PAGE = (Path(__file__).parents[2] / "docs" / "slurm.md").read_text()


def test_every_command(tiny: Tiny, tmp_path: Path) -> None:
    commands = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(commands) > 15
    if why := slurm_cluster.missing():
        pytest.skip(why)
    folder = tmp_path / "home"
    (folder / "demo").mkdir(parents=True)
    recipe = tiny.recipe(name="quickstart", training__max_steps=8)
    (folder / "demo" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    commands_here = tmp_path / "bin"
    commands_here.mkdir()
    (commands_here / "distft").write_text(f'#!/bin/sh\nexec {sys.executable} -m distft "$@"\n')
    (commands_here / "distft").chmod(0o755)
    with slurm_cluster.Cluster(tmp_path / "slurm", gpus=0, cpus=2) as cluster:
        env = {**cluster.env(), "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
        env["PATH"] = f"{commands_here}:{env['PATH']}"
        for command in commands:
            done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            assert "Traceback" not in done.stderr
        assert (folder / "distft-runs" / "quickstart" / "final").is_dir()
