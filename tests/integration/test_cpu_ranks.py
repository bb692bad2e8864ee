"""Are the fixes in distft/train/cpu_ranks.py still needed? These tests fail once upstream works without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = """
import os, sys
if sys.argv[1] == "fixed":
    from distft.train import cpu_ranks
    cpu_ranks.apply()
elif "ACCELERATE_USE_DEEPSPEED" in os.environ:  # else it is compiled first, for minutes on a busy machine
    import deepspeed
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
from accelerate import Accelerator
state = Accelerator().state
if state.process_index == 0:
    print("found", state.distributed_type.name, state.num_processes, flush=True)
import torch.distributed as dist
if dist.is_initialized():  # an exit without this aborts a rank now and then, and torchrun ends the other
    dist.barrier()
    dist.destroy_process_group()
"""
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def found(tmp_path: Path, environment: dict[str, str], fixes: str) -> str:
    """What accelerate makes of the environment on two gloo ranks."""
    script = tmp_path / "report.py"
    script.write_text(REPORT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), fixes], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    return next((line for line in done.stdout.splitlines() if line.startswith("found")), done.stderr)


@pytest.mark.parametrize(
    ("environment", "wanted", "without"),
    [(FSDP, "found FSDP 2", "found MULTI_CPU 2"), (DEEPSPEED, "found DEEPSPEED 2", "found DEEPSPEED 1")],
    ids=["fsdp", "deepspeed"],
)
def test_strategies(tmp_path: Path, environment: dict[str, str], wanted: str, without: str) -> None:
    assert found(tmp_path, environment, "fixed") == wanted
    assert found(tmp_path, environment, "none") == without, "upstream has changed: is the fix still needed?"


MUON = "deepspeed.runtime.zero.muon.original_muon"


@pytest.mark.parametrize(
    ("fixes", "packages", "imported"),
    [("None", "bitsandbytes", True), ("None", MUON, True), ("cpu_ranks.apply()", f"bitsandbytes, {MUON}", False)],
    ids=["without: bitsandbytes", "without: muon", "fixed"],
)
def test_the_compiler_is_not_imported(fixes: str, packages: str, imported: bool) -> None:
    """Every engine of DeepSpeed imports its Muon optimizer."""
    code = f"import sys; from distft.train import cpu_ranks; {fixes}; import torch, {packages}; " + (
        "print('found', 'torch._inductor.compile_fx' in sys.modules, torch.compile.__module__)"
    )
    env = {**os.environ, "ACCELERATE_USE_DEEPSPEED": "true"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.stdout.splitlines()[-1] == f"found {imported} torch", done.stderr
