"""Are the fixes in distft/train/cpu_ranks.py still needed? These tests fail once upstream works without them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Forks the processes of each question, so that all share what takes seconds to import.
ASK = """
import os, socket, sys, traceback
from pathlib import Path
import torch, accelerate, deepspeed
import torch.distributed as dist
from distft.train import cpu_ranks
COMPILER = "torch._inductor.compile_fx"
MUON = "deepspeed.runtime.zero.muon.original_muon"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}

def strategy():
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:  # else it is compiled first, for minutes on a busy machine
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    state = accelerate.Accelerator().state
    yield state.distributed_type.name, state.num_processes
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()

def importing(*names):
    for name in names:
        __import__(name)
    yield COMPILER in sys.modules, torch.compile.__module__

def ask(name, question, fixed, environment, ranks=1):
    with socket.create_server(("localhost", 0)) as probe:
        world = {"MASTER_ADDR": "localhost", "MASTER_PORT": probe.getsockname()[1], "WORLD_SIZE": ranks}
    world["LOCAL_WORLD_SIZE"] = ranks
    for rank in range(ranks):
        if os.fork():
            continue
        try:
            of_rank = (world | {"RANK": rank, "LOCAL_RANK": rank}) if ranks > 1 else {}
            os.environ.update({**environment, **{name: str(value) for name, value in of_rank.items()}})
            if fixed:
                cpu_ranks.apply()
            for answer in question:
                if rank == 0:
                    Path(sys.argv[1], name).write_text(" ".join(map(str, answer)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    for _ in range(ranks):
        _, status = os.wait()
        assert status == 0, name

assert COMPILER not in sys.modules
assert len(os.listdir("/proc/self/task")) == 1  # a fork would lose the others
for kind, environment in ("fsdp", FSDP), ("deepspeed", DEEPSPEED):
    ask(f"{kind}, fixed", strategy(), True, environment, ranks=2)
    ask(f"{kind}, as it is", strategy(), False, environment, ranks=2)
ask("bitsandbytes, as it is", importing("bitsandbytes"), False, DEEPSPEED)
ask("muon, as it is", importing(MUON), False, DEEPSPEED)
ask("both, fixed", importing("bitsandbytes", MUON), True, DEEPSPEED)
"""


@pytest.fixture(scope="module")
def answers(once: Callable[..., Path]) -> Path:
    def ask(folder: Path) -> None:
        subprocess.run([sys.executable, "-c", ASK, str(folder)], check=True, timeout=300)

    return once("cpu-ranks", ask)


@pytest.mark.parametrize(
    ("engine", "wanted", "without"),
    [("fsdp", "FSDP 2", "MULTI_CPU 2"), ("deepspeed", "DEEPSPEED 2", "DEEPSPEED 1")],
)
def test_strategies(answers: Path, engine: str, wanted: str, without: str) -> None:
    """What accelerate makes of the environment on two gloo ranks."""
    assert (answers / f"{engine}, fixed").read_text() == wanted
    assert (answers / f"{engine}, as it is").read_text() == without, "upstream has changed: is the fix still needed?"


@pytest.mark.parametrize(
    ("what", "imported"), [("bitsandbytes, as it is", True), ("muon, as it is", True), ("both, fixed", False)]
)
def test_the_compiler_is_not_imported(answers: Path, what: str, imported: bool) -> None:
    """Every engine of DeepSpeed imports its Muon optimizer."""
    assert (answers / what).read_text() == f"{imported} torch"
