"""WHERE and HOW WIDE: the topology, and the devices that a rank gets."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache

from distft.errors import ClusterError


@dataclass(frozen=True)
class Topology:
    """`nnodes` machines with `nproc_per_node` ranks each."""

    nnodes: int
    nproc_per_node: int

    def __post_init__(self) -> None:
        for option, value in (("--nodes", self.nnodes), ("--gpus-per-node", self.nproc_per_node)):
            if value < 1:
                raise ClusterError(f"{option}: got {value}, need >= 1")

    @property
    def world_size(self) -> int:
        return self.nnodes * self.nproc_per_node


@dataclass(frozen=True)
class Device:
    """What one rank computes on. `memory` in bytes; for `cpu` it is the rank's share of the host's memory."""

    type: str  # "cuda" or "cpu"
    name: str
    memory: int
    compute_capability: float | None = None  # 8.0 is Ampere; None for a CPU


@lru_cache
def visible_gpus() -> tuple[Device, ...]:
    """The NVIDIA GPUs of this machine as nvidia-smi tells them, without torch; () where there are none.

    CUDA_VISIBLE_DEVICES narrows them, as it will for the ranks.
    """
    if not shutil.which("nvidia-smi") or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ()
    query = ["nvidia-smi", "--query-gpu=uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # a driver that does not answer: no usable GPU
        return ()
    gpus = []
    for line in answer.splitlines():
        uuid, name, mib, capability = (field.strip() for field in line.split(","))
        gpus.append((uuid, Device("cuda", name, int(mib) * 2**20, float(capability))))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(gpu for _, gpu in gpus)
    wanted = [word.strip() for word in chosen.split(",")]
    by_name = {str(index): gpu for index, (_, gpu) in enumerate(gpus)} | dict(gpus)
    return tuple(by_name[word] for word in wanted if word in by_name)


def local_device(nproc_per_node: int) -> Device:
    """The device of one rank when `nproc_per_node` ranks run on this machine.

    Raises:
        ClusterError: more ranks than GPUs, on a machine with GPUs.
    """
    gpus = visible_gpus()
    if not gpus:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device("cpu", "cpu", memory // nproc_per_node)
    if nproc_per_node > len(gpus):
        raise ClusterError(
            f"--gpus-per-node: got {nproc_per_node}, this machine has {len(gpus)} ({gpus[0].name}); "
            f"ask for at most {len(gpus)}, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return min(gpus[:nproc_per_node], key=lambda gpu: gpu.memory)


def topology_here(nodes: int | None, gpus_per_node: int | None) -> Topology:
    """Nodes like this machine: one, with every GPU, unless told otherwise (one process on a machine without GPUs)."""
    ranks = gpus_per_node if gpus_per_node is not None else len(visible_gpus()) or 1
    return Topology(nodes if nodes is not None else 1, ranks)


def only_this_machine(topology: Topology) -> None:
    """Raises ClusterError for more than one node: from here only this machine can be started."""
    if topology.nnodes != 1:
        raise ClusterError(
            f"--nodes: got {topology.nnodes}, and only this machine can be started from here; "
            "render for several nodes and start each (launch/multinode.sh)"
        )
