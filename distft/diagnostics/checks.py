"""Facts about one machine, and whether it computes correctly: for the preflight of a job and for `distft doctor`.

Every check catches its own failure: a machine without torch reports that, and does not end in a traceback.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distft.errors import in_one_line
from distft.units import GIB

MIN_FREE = 1 * GIB  # the files of a LoRA run; with less, most runs fail
LOW_FREE = 20 * GIB
SLOW = 0.7  # of the usual speed
GPU_SIZE = 8192  # of the square matrices that are timed on a GPU
VERSIONS = ("distft", "python", "torch", "cuda", "driver", "transformers")


@dataclass
class Findings:
    """`facts` by name. `problems` end a job, `warnings` do not."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def attempt(self, check: Callable[[Findings], None], what: str) -> None:
        """Run one check; an exception is a problem of this machine."""
        try:
            check(self)
        except Exception as error:
            self.problems.append(f"{what}: {in_one_line(error)}")


def look(folder: Path | None, gpus: int) -> Findings:
    """Versions, whether `gpus` GPUs compute a known product, free space under `folder`, host name and time."""
    found = Findings()
    found.attempt(versions, "versions")
    found.attempt(lambda f: products(f, gpus), "matrix products")
    if folder is not None:
        found.attempt(lambda f: space(f, folder), "runs_dir")
    found.attempt(own_name, "host name")
    found.facts["time"] = time.time()
    return found


def versions(found: Findings) -> None:
    """Versions of what must be the same on all nodes.

    Raises:
        ImportError: torch cannot be imported.
    """
    from importlib import metadata

    import distft

    found.facts |= {"distft": distft.__version__, "python": platform.python_version(), "driver": driver()}
    import torch

    found.facts |= {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
    found.facts["transformers"] = metadata.version("transformers")


def driver() -> str | None:
    """NVIDIA's driver version, None without one."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    return done.stdout.split("\n")[0].strip() or None


def products(found: Findings, gpus: int) -> None:
    """Compute a product of known result on each device, and time products: TFLOP/s, float32 on a CPU, bf16 on a GPU."""
    import torch

    have = torch.cuda.device_count()
    if have < gpus:
        found.problems.append(f"the job wants {gpus} GPUs, and {have} are visible here")
        return
    devices = [torch.device("cuda", i) for i in range(gpus)] or [torch.device("cpu")]
    size, dtype, rounds = (GPU_SIZE, torch.bfloat16, 10) if gpus else (512, torch.float32, 5)
    speeds = []
    for device in devices:
        # Products of 0s and 1s are whole numbers, so A(B1) = (AB)1 holds to the last bit.
        a, b = (torch.randint(0, 2, (1024, 1024), device=device).float() for _ in range(2))
        ones = torch.ones(1024, 1, device=device)
        if not torch.equal((a @ b) @ ones, a @ (b @ ones)):
            found.problems.append(f"{device} computes matrix products wrong")
        a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        a @ b
        _wait(device)
        began = time.perf_counter()
        for _ in range(rounds):
            a @ b
        _wait(device)
        speeds.append(rounds * 2 * size**3 / (time.perf_counter() - began) / 1e12)
    found.facts |= {"device": str(devices[0].type), "tflops": min(speeds)}
    if gpus and min(speeds) < SLOW * statistics.median(speeds):
        slow = speeds.index(min(speeds))
        found.problems.append(
            f"cuda:{slow} computes at {speeds[slow]:.0f} TFLOP/s, its neighbours at {max(speeds):.0f}"
        )


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def space(found: Findings, folder: Path) -> None:
    """Free space on the file system of `folder`, in bytes."""
    if not folder.is_dir():
        found.problems.append(f"{folder} does not exist: is its file system mounted?")
        return
    free = shutil.disk_usage(folder).free
    found.facts["free"] = free
    if not os.access(folder, os.W_OK):
        found.problems.append(f"{folder} is not writable")
    elif free < MIN_FREE:
        found.problems.append(f"{folder} has only {free / GIB:.2f} GiB free")
    elif free < LOW_FREE:
        found.warnings.append(f"{folder} has only {free / GIB:.1f} GiB free")


def own_name(found: Findings) -> None:
    """Whether the host's name resolves to a network address, where gloo listens; Debian's `127.0.1.1 host` does not."""
    name = socket.gethostname()
    found.facts["host"] = name
    try:
        found.facts["loopback"] = socket.gethostbyname(name).startswith("127.")
    except OSError:
        found.warnings.append(f"the host name {name} cannot be resolved")
