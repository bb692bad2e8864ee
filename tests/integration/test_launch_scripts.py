"""launch/*.sh: the scale ladder, each step run with the same recipe."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import Tiny

LADDER = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LADDER.glob("*.sh"))


def environment(**more: str) -> dict[str, str]:
    """One in which `distft` and `python` are this interpreter's."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **more}


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ladder")
    (path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe()))
    return path


def test_they_are_short_and_clean() -> None:
    assert [script.name for script in SCRIPTS] == ["1gpu.sh", "1node.sh", "multinode.sh", "slurm.sh"]
    for script in SCRIPTS:
        assert len(script.read_text().splitlines()) <= 30
        done = subprocess.run([Path(sys.executable).parent / "shellcheck", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert os.access(script, os.X_OK)
        lost = subprocess.run([script, "recipe.yaml"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
        assert (lost.returncode, lost.stdout) == (2, "") and "distft is not on PATH" in lost.stderr
        usage = subprocess.run([script], capture_output=True, text=True, env=environment())
        assert usage.returncode != 0
        assert "usage: " in usage.stderr


@pytest.mark.real_ranks
def test_the_same_losses_on_every_step(folder: Path) -> None:
    subprocess.run([LADDER / "1gpu.sh", "recipe.yaml"], cwd=folder, env=environment(), check=True, timeout=300)
    one_node = [LADDER / "1node.sh", "recipe.yaml", "--set", "parallelism.strategy=zero2"]
    subprocess.run(one_node, cwd=folder, env=environment(GPUS="2"), check=True, timeout=300)
    run_dir = folder / "runs" / "two-nodes"
    with socket.create_server(("localhost", 0)) as probe:
        head = f"localhost:{probe.getsockname()[1]}"
    nodes = [
        subprocess.Popen(
            [LADDER / "multinode.sh", "recipe.yaml", "--set", "parallelism.strategy=hsdp"],
            cwd=folder,
            env=environment(NNODES="2", NODE_RANK=str(rank), HEAD=head, GPUS="2", RUN_DIR=str(run_dir)),
        )
        for rank in range(2)
    ]
    assert [node.wait(180) for node in nodes] == [0, 0]
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["ran"]["kind"], status["ran"]["mesh"]) == ("hsdp", [2, 2])
    first = losses(folder / "runs/tiny")
    assert len(first) == 4
    for other in ("tiny-2", "two-nodes"):
        assert losses(folder / "runs" / other) == pytest.approx(first, abs=1e-5)
