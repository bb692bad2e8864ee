"""The files of a run, started where what they need is not there: one clear error, and nothing is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import Tiny

from distft.config.loading import load_recipe
from distft.hardware.devices import named_device
from distft.hardware.topology import Topology
from distft.jobs.job import local_job, recipe_workload
from distft.planner.plan import make_plan
from distft.planner.search import Where
from distft.runs.attempts import fill
from distft.runs.directory import RunDir
from distft.schedulers import local


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Rendered on a machine with two H100."""
    folder = tmp_path_factory.mktemp("ready")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe()))
    recipe = load_recipe(folder / "recipe.yaml")
    run = RunDir.create(str(folder), "run")
    plan = make_plan(recipe, Where(Topology(1, 2), named_device("H100", 2)))
    job = local_job(recipe_workload(recipe, plan, run), run)
    fill(run, {**job.files, "job.sh": local.render(job)}, recipe.name)
    return run


def started(command: list[str], **variables: str) -> tuple[int, str]:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
    return done.returncode, done.stderr


def test_without_gpus(run: RunDir) -> None:
    status, said = started(["bash", str(run.script)])
    assert status == 2
    assert said.startswith("error: this job was planned for 2 GPUs of a node, and 0 can be used here")
    assert not list(run.logs.glob("rank-*"))


def test_without_the_training_part(run: RunDir, light_site: Path, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    python = f"{sys.executable} -S"  # with nothing but what is on PYTHONPATH
    (tmp_path / "python").write_text(f'#!/bin/bash\nexec {python} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    script.write_text(run.script.read_text().replace(sys.executable, str(tmp_path / "python")))
    status, said = started(["bash", str(script)], PYTHONPATH=str(light_site))
    assert status == 2
    assert said.startswith("error: training needs torch, ")


@pytest.mark.parametrize(
    ("ranks", "said"),
    [("1", "planned for 2 ranks, and 1 were started: start its job script"), ("2", "finds no GPU here")],
)
def test_a_rank_by_itself(run: RunDir, ranks: str, said: str) -> None:
    status, _ = started([sys.executable, "-m", "distft.train", str(run.path)], WORLD_SIZE=ranks, RANK="0")
    assert status == 1
    assert said in json.loads(run.rank_error(0).read_text())["message"]
