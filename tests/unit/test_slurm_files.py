"""slurm/: profiles that load, reference scripts that the generator makes, all through bash and shellcheck."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import reference_files
import yaml
from running import distft
from tiny import Tiny

from distft.commands.sweep import combinations
from distft.config.cluster import load_cluster
from distft.errors import ClusterError
from distft.runs.status import State, Status
from distft.schedulers import cluster_probe, slurm
from distft.shell import sbatch_quote

ROOT = Path(__file__).parents[2]
PROFILES = sorted((ROOT / "slurm" / "clusters").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "slurm" / "reference").glob("*.sbatch"))


def test_every_profile_has_its_script() -> None:
    assert [path.stem for path in PROFILES] == ["apptainer", "bare_metal", "cpu", "pyxis", "requeue"]
    assert {path.stem for path in SCRIPTS} == {path.stem for path in PROFILES} | {"array"}
    made = reference_files.files(ROOT)
    for path in SCRIPTS:
        assert path.read_text() == made[str(path.relative_to(ROOT))], "run make reference"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_shellcheck(script: Path) -> None:
    # SC1091: the site's own activate script is not here to be read.
    command = [Path(sys.executable).parent / "shellcheck", "-e", "SC1091", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def script(name: str) -> str:
    return (ROOT / "slurm" / "reference" / f"{name}.sbatch").read_text()


def test_what_the_scripts_ask_for() -> None:
    assert "#SBATCH --gpus-per-node=8\n" in script("bare_metal")
    assert "#SBATCH --gres=gpu:a100:4\n" in script("apptainer")
    assert "gpu" not in "".join(line for line in script("cpu").splitlines() if line.startswith("#SBATCH"))
    assert "export NCCL_SOCKET_IFNAME=ib0\n" in script("bare_metal")
    assert "SOCKET_IFNAME" not in script("pyxis")
    assert "#SBATCH --requeue\n" in script("requeue") and 'scontrol requeue "$SLURM_JOB_ID"' in script("requeue")
    assert "#SBATCH --no-requeue\n" in script("bare_metal") and "scontrol requeue" not in script("bare_metal")
    assert "#SBATCH --signal=B:USR1@120\n" in script("bare_metal")
    for name in ("bare_metal", "pyxis", "apptainer", "requeue", "cpu"):
        assert script(name).count(" -m torch.distributed.run ") == 1
        assert "$SLURM_PROCID" not in script(name)
        assert not re.search(r"master.addr", script(name), re.IGNORECASE)


RECORDER = """#!/bin/bash
printf '%s\\n' "${0##*/}" "$@" END >> "$RECORD"
"""


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_what_a_container_is_started_with(tmp_path: Path, runtime: str) -> None:
    """srun and apptainer cannot run here: stand-ins record their arguments."""
    runs = tmp_path / "shared runs" / "example"
    (runs / "logs").mkdir(parents=True)
    text = (ROOT / "slurm" / "clusters" / f"{runtime}.yaml").read_text()
    (tmp_path / "site.yaml").write_text(text.replace("/shared/projects/mine/runs", str(runs.parent)))
    cluster = load_cluster(str(tmp_path / "site.yaml"))
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in {
        "srun": RECORDER,
        "scontrol": "#!/bin/bash\necho node1\n",
        "module": "#!/bin/bash\n",
    }.items():
        (commands / name).write_text(body)
        (commands / name).chmod(0o755)
    run = runs / "job.sbatch"
    from distft.runs.directory import RunDir

    run.write_text(slurm.render(reference_files._example_job(cluster, RunDir(runs))))
    env = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record")}
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_CPUS_ON_NODE": "8"}
    subprocess.run(["bash", str(run)], check=True, env=env)
    calls = [call.split("\n")[:-1] for call in (tmp_path / "record").read_text().split("END\n") if call]
    preflight, prepare, train, conclude = (call for call in calls if call[0] == "srun")
    mounts = f"/shared/data:/data,{runs.parent}:{runs.parent}"
    for call in (preflight, prepare, train, conclude):
        if runtime == "pyxis":
            assert "--container-image=/shared/projects/mine/images/distft.sqsh" in call
            assert f"--container-mounts={mounts}" in call
        else:
            at = call.index("apptainer")
            inside = ["exec", "--nv", "--bind", "/shared/data:/data", "--bind", f"{runs.parent}:{runs.parent}"]
            assert call[at + 1 : at + 8] == [*inside, "/shared/projects/mine/images/distft.sif"]
            assert call[at + 8] == "python"
    assert train[-4:] == ["--rdzv-backend=c10d", "-m", "distft.train", str(runs)]
    assert "--nodelist=node1" in prepare


def test_render_is_pure() -> None:
    cluster = load_cluster(str(PROFILES[0]))
    from distft.runs.directory import RunDir

    job = reference_files._example_job(cluster, RunDir(Path("/nowhere/x")))
    assert slurm.render(job) == slurm.render(job)


@pytest.mark.parametrize("value", ["a\nb", "tab\there", "back\\slash"])
def test_what_no_sbatch_line_can_hold(value: str) -> None:
    with pytest.raises(ClusterError, match="cannot hold"):
        sbatch_quote(value)


def test_sweep_combinations() -> None:
    assert combinations(["lora.r=8,16", "training.learning_rate=1e-4"]) == [
        ("lora.r=8", "training.learning_rate=1e-4"),
        ("lora.r=16", "training.learning_rate=1e-4"),
    ]
    assert combinations(["lora.target_modules=[q_proj,v_proj],all-linear"]) == [
        ("lora.target_modules=[q_proj,v_proj]",),
        ("lora.target_modules=all-linear",),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30", 30), ("5:00", 5), ("12:00:00", 720), ("2-00:00:00", 2880), ("1-6", 1800), ("infinite", float("inf"))],
)
def test_time_limits(text: str, expected: float) -> None:
    assert cluster_probe.minutes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(null)", (0, None)),
        ("gpu:4", (4, None)),
        ("gpu:h100:8(S:0-1)", (8, "h100")),
        ("gpu:a100:4(S:0,2),nvme:1", (4, "a100")),
    ],
)
def test_gres(text: str, expected: tuple[int, str | None]) -> None:
    assert cluster_probe.parse_gres(text) == expected


SACCT = """\
12|12|CANCELLED by 1000|None|2026-11-01T10:00:00|node[1-2]
13_1|14|TIMEOUT|None|Unknown|node3
15|15|NEW_STATE|x|y|z
"""


def test_what_sacct_says_is_read() -> None:
    seen = slurm._parse(SACCT, {"12", "13_1", "14", "15"})
    assert (seen["12"].state, seen["12"].reason, seen["12"].nodes) == ("CANCELLED", "", "node[1-2]")
    assert seen["13_1"].state == seen["14"].state == "TIMEOUT"
    running = Status(State.RUNNING, "15")
    # In a state that is not known here, the run stays as it was.
    unknown = slurm._as_seen(running, "15", seen["15"])
    assert (unknown.state, unknown.slurm_state, unknown.reason) == (State.RUNNING, "NEW_STATE", "SLURM: NEW_STATE")
    over = slurm._as_seen(running, "14", seen["14"])
    assert (over.state, over.slurm_state, over.nodes) == (State.PREEMPTED, "TIMEOUT", "node3")
    assert over.reason == "the time limit was reached"


def test_a_gpu_profile_is_planned_without_a_gpu(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(tiny.recipe(training__mixed_precision="bf16", training__global_batch_size=32))
    )
    profile = str(ROOT / "slurm" / "clusters" / "bare_metal.yaml")
    done = distft("launch", "recipe.yaml", "--cluster", profile, "--nodes", "4", "--dry-run", "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    plan = json.loads(answer["files"]["plan.json"])
    assert plan["topology"] == {"nnodes": 4, "nproc_per_node": 8, "world_size": 32, "gpu": "H100"}
    assert answer["files"]["job.sbatch"].count("#SBATCH --nodes=4\n") == 1
    assert answer["run_dir"] == "/shared/projects/mine/runs/tiny"
    more = distft("validate", "recipe.yaml", "--cluster", profile, "--gpus-per-node", "9", cwd=tmp_path)
    assert (more.returncode, "got 9, the profile's node.gpus_per_node is 8" in more.stderr) == (2, True)
