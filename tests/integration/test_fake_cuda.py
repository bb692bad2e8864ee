"""What happens only on GPUs, walked with two that are emulated (tests/fake_cuda): decisions, not kernels."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_gpus
import pytest
import yaml
from running import Result, distft, inject, launch
from tiny import Tiny

from distft.runs.directory import RunDir

GIB = 2**30


@pytest.fixture
def gpus(shared: Path) -> dict[str, str]:
    return fake_gpus.environment(shared / fake_gpus.RECORDS)


@pytest.mark.parametrize(
    ("strategy", "backend", "changes"),
    [
        ("ddp", "nccl", {}),
        ("fsdp", "cuda:nccl,cpu:gloo", {"lora": None}),
        ("fsdp", "cuda:nccl,cpu:gloo", {"lora": None, "training__master_weights": "none"}),
        ("zero3", "nccl", {}),
        ("zero2", "nccl", {"model__quantization": "nf4"}),
    ],
    ids=["ddp", "fsdp", "fsdp-no-masters", "zero3", "nf4-zero2"],
)
def test_trains(
    tiny: Tiny,
    tmp_path: Path,
    trained: Callable[..., Result],
    gpus: dict[str, str],
    strategy: str,
    backend: str,
    changes: dict[str, Any],
) -> None:
    """The losses of CPU ranks; under ddp, also from a checkpoint on, and with `auto` attention: varlen."""
    recipe = tiny.recipe(training__mixed_precision="bf16", checkpoint__save_steps=2, **changes)
    recipe["parallelism"] = {"strategy": strategy}
    attention = "varlen" if strategy == "ddp" else "sdpa"
    recipe["model"]["attn_implementation"] = attention
    expected = trained(recipe, 2).column("loss")
    if strategy == "ddp":
        recipe["model"]["attn_implementation"] = "auto"
    elif strategy in ("fsdp", "zero3"):
        recipe["training"]["activation_offloading"] = True
    records = tmp_path / "records"
    own = {**gpus, "FAKE_CUDA_BACKENDS": str(records)}  # asked for, by this test's ranks alone
    done = launch(recipe, tmp_path, ranks=2, env=own)
    plan = json.loads((done.run_dir / "plan.json").read_text())
    assert plan["topology"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert set(records.read_text().splitlines()) == {f"{backend} expandable_segments:True"}
    assert all(0 < mfu < 0.1 for mfu in done.column("mfu"))
    assert done.column("peak_memory_bytes") == [GIB] * 4  # what the emulated allocator says
    losses = done.column("loss")
    assert losses == pytest.approx(expected, rel=1e-6)
    assert done.status["ran"]["attention"] == attention
    assert done.status["ran"].get("activation_offloading") is (True if strategy in ("fsdp", "zero3") else None)
    if strategy != "ddp":
        return
    run = RunDir(done.run_dir)
    assert "attention: varlen (flash-attn is not installed)" in run.rank_log(0).read_text()
    shutil.rmtree(run.final)
    shutil.rmtree(run.checkpoints / "step-4")
    run.status.write_text(json.dumps(done.status | {"state": "failed"}))
    again = distft("resume", done.run_dir.name, cwd=tmp_path, env=own)
    assert again.returncode == 0, again.stderr
    assert done.column("loss") == pytest.approx(losses, rel=1e-6)


def test_doctor(tmp_path: Path, gpus: dict[str, str]) -> None:
    done = distft("doctor", cwd=tmp_path, env=gpus)
    said = done.stdout.splitlines()
    assert "ok: GPU 1: NVIDIA H100 80GB HBM3, 79.6 GiB" in said
    assert any(line.startswith("ok: matrix products on 2 GPUs: ") for line in said), done.stdout
    assert {"ok: all-reduce over nccl", "everything works"} <= {*said}


def test_preflight(tmp_path: Path, gpus: dict[str, str]) -> None:
    """Two nodes of two GPUs each; NCCL between them, emulated."""
    (tmp_path / "logs").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "distft.diagnostics.preflight", str(tmp_path), "2", "127.0.0.1", port]
    nodes = [
        subprocess.Popen(command, env={**os.environ, **gpus, "SLURM_NODEID": str(node), "SLURM_NNODES": "2"})
        for node in range(2)
    ]
    assert [node.wait(60) for node in nodes] == [0, 0]
    found = json.loads((tmp_path / "logs" / "preflight.json").read_text())
    assert found["bad"] == {}
    assert [report["facts"]["device"] for report in found["reports"]] == ["cuda", "cuda"]
    assert all(report["facts"]["gpus"] == 2 and report["pairs"][0]["gb_per_s"] > 0 for report in found["reports"])


def test_plan(tiny: Tiny, tmp_path: Path, gpus: dict[str, str]) -> None:
    """This machine's GPUs, those of an allocation, and those of a cluster."""
    recipe = tiny.recipe(training__mixed_precision="fp16", model__quantization="int8")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    node = {"gpus_per_node": 8, "gpu": "H100", "memory": 1000}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"runs_dir": str(tmp_path), "node": node}))
    offload = ["--set", "parallelism.offload=optimizer", "--set", "parallelism.strategy=zero2"]

    def plan(*options: str, **env: str) -> str:
        done = distft("plan", "recipe.yaml", *options, cwd=tmp_path, env=gpus | env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    here = plan("--gpu", "local", "--gpus-per-node", "2")
    assert "2 NVIDIA H100 80GB HBM3" in here
    assert "got fp16, and NVIDIA H100 80GB HBM3 has bf16" in here
    assert "host: a node has" in plan("--gpu", "H100", *offload, "--set", "model.quantization=null")
    assert "1 x 8 H100" in plan("--cluster", "site.yaml")


@pytest.mark.real_ranks(warm_torchrun=True)
def test_out_of_memory_while_another_rank_is_blocked(tiny: Tiny, tmp_path: Path) -> None:
    """The other rank hangs in C, as in CUDA or a collective: it leaves before torchrun would kill it."""
    code = (
        "import ctypes, json, os, torch\n"
        "plan = json.load(open(args[0].args.output_dir + '/../plan.json'))\n"
        "if args[0].state.global_step == 1 and plan['batch']['micro_batch_size'] == 4:\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise torch.AcceleratorError('CUDA error: out of memory\\nCUDA kernel errors')\n"
        "    lock = ctypes.create_string_buffer(64)\n"
        "    for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(lock)"
    )
    env = inject(tmp_path, "transformers.trainer:Trainer.training_step", code)
    recipe = tiny.recipe(training__micro_batch_size=4, parallelism__strategy="zero2")
    result = launch(recipe, tmp_path, ranks=2, env=env)
    (attempt,) = result.status["attempts"]
    assert attempt["reason"].endswith("; training.micro_batch_size: 4 -> 2")
    assert not [path for path in result.run_dir.rglob("torchrun*.log") if "SIGKILL" in path.read_text()]
