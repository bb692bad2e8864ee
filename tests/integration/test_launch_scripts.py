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
    names = [script.name for script in SCRIPTS]
    assert names == ["1gpu.sh", "1node.sh", "accelerate.sh", "multinode.sh", "slurm.sh"]
    for script in SCRIPTS:
        assert len(script.read_text().splitlines()) <= 30
        done = subprocess.run([Path(sys.executable).parent / "shellcheck", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert os.access(script, os.X_OK)
        words = ["ddp", "script.py"] if script.stem == "accelerate" else ["recipe.yaml"]
        lost = subprocess.run([script, *words], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
        missing = "error: no python" if script.stem == "accelerate" else "distft is not on PATH"
        assert (lost.returncode, lost.stdout) == (2, "") and missing in lost.stderr
        usage = subprocess.run([script], capture_output=True, text=True, env=environment())
        assert usage.returncode != 0
        assert "usage: " in usage.stderr


def refused(script: str, *words: str, **variables: str) -> str:
    """What a script says that starts nothing."""
    done = subprocess.run([LADDER / script, *words], capture_output=True, text=True, env=environment(**variables))
    assert done.returncode != 0 and done.stdout == ""
    return done.stderr


def test_they_look_for_what_they_need() -> None:
    assert "torch finds 0. For CPUs: distft launch -- train.py" in refused("accelerate.sh", "ddp", "train.py")
    assert "zero2 on 2 GPUs of this machine" in refused("accelerate.sh", "zero2", "train.py", GPUS="2")
    assert "zero9: there is no " in refused("accelerate.sh", "zero9", "train.py")
    assert "SLURM_JOB_ID" in refused("slurm.sh", "recipe.yaml")
    nodes = {"NNODES": "2", "HEAD": "here:1", "RUN_DIR": "nowhere"}
    assert "NODE_RANK: got 2, need 0 to 1" in refused("multinode.sh", "recipe.yaml", NODE_RANK="2", **nodes)


STUB = f"""#!/usr/bin/env bash
# A machine with four GPUs: what accelerate would do with the command.
if [ "$1" = -c ]; then echo 4; else shift 2; exec {sys.executable} - "$@"; fi <<'EOF'
import json, sys
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
found, *_ = _validate_launch_command(launch_command_parser().parse_args(sys.argv[1:]))
print(json.dumps({{key: value for key, value in vars(found).items() if isinstance(value, (str, int, list))}}))
EOF
"""


@pytest.mark.parametrize(
    ("words", "variables", "wanted"),
    [
        (["ddp"], {}, {"multi_gpu": True, "num_processes": 4, "num_machines": 1}),
        (["fsdp"], {"GPUS": "2"}, {"use_fsdp": True, "num_processes": 2}),
        (["zero3"], {}, {"use_deepspeed": True, "num_processes": 4, "deepspeed_config_file": "zero3.json"}),
        (
            ["hsdp"],
            {"NNODES": "3", "NODE_RANK": "1", "HEAD": "one:29"},
            {"use_fsdp": True, "num_processes": 12, "num_machines": 3, "machine_rank": 1, "main_process_ip": "one"}
            | {"parallelism_config_dp_replicate_size": 3, "parallelism_config_dp_shard_size": 4},
        ),
    ],
    ids=["ddp", "fsdp", "zero3", "hsdp"],
)
def test_what_accelerate_is_told(
    words: list[str], variables: dict[str, str], wanted: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    env = {**os.environ, **variables, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [LADDER / "accelerate.sh", *words, "train.py", "--lr", "1"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)
    assert (found["training_script"], found["training_script_args"]) == ("train.py", ["--lr", "1"])
    if "deepspeed_config_file" in wanted:
        found["deepspeed_config_file"] = Path(found["deepspeed_config_file"]).name
        assert Path(LADDER.parent, "ds_configs", found["deepspeed_config_file"]).is_file()
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.real_ranks(warm_torchrun=True)
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
