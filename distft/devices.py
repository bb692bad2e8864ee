"""What a rank computes on: this machine's devices, and the GPUs that a cluster profile can name."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from distft.errors import ClusterError
from distft.topology import Topology

if TYPE_CHECKING:
    from distft.cluster import Cluster


@dataclass(frozen=True)
class Device:
    """What one rank computes on. `memory` in bytes; for `cpu` it is the rank's share of the host's memory."""

    type: str  # "cuda" or "cpu"
    name: str
    memory: int
    compute_capability: float | None = None  # 8.0 is Ampere; None for a CPU
    cores: int | None = None  # of the whole node, where known


GIB = 2**30
# A profile's name of a GPU → memory in GiB, compute capability. Data sheets' sizes less 1.1%, which the driver keeps
# (A100-80GB: 79.15 GiB seen by torch; T4 with ECC: 14.9).
GPUS = {
    "V100-16GB": (15.8, 7.0),
    "V100-32GB": (31.6, 7.0),
    "T4": (14.9, 7.5),
    "A100-40GB": (39.5, 8.0),
    "A100-80GB": (79.15, 8.0),
    "A10G": (23.7, 8.6),
    "RTX-3090": (23.7, 8.6),
    "L4": (23.7, 8.9),
    "L40S": (47.4, 8.9),
    "RTX-4090": (23.7, 8.9),
    "H100": (79.1, 9.0),
    "H200": (139.4, 9.0),
    "B200": (178.0, 10.0),
    "RTX-5090": (31.6, 12.0),
}


def cluster_device(cluster: Cluster, nproc_per_node: int) -> Device:
    """The device of one rank on a cluster, as its profile describes it.

    Raises:
        ClusterError: more ranks than GPUs, or a GPU whose memory is not known.
    """
    node = cluster.node
    if node.gpus_per_node == 0:
        memory = node.memory * GIB if node.memory else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device("cpu", "cpu", int(memory // nproc_per_node), cores=cluster.slurm.cpus_per_task)
    if nproc_per_node > node.gpus_per_node:
        raise ClusterError(
            f"--gpus-per-node: got {nproc_per_node}, the profile's node.gpus_per_node is {node.gpus_per_node}"
        )
    known = {name.lower(): name for name in GPUS}.get((node.gpu or "").lower())
    memory, capability = GPUS[known] if known else (node.gpu_memory, None)
    if memory is None:
        got = f"got {node.gpu}, which is not known" if node.gpu else "missing"
        raise ClusterError(f"node.gpu: {got}; give one of {', '.join(GPUS)}, or set node.gpu_memory (GiB)")
    return Device("cuda", known or node.gpu or "GPU", int((node.gpu_memory or memory) * GIB), capability)


@lru_cache
def visible_gpus() -> tuple[Device, ...]:
    """The NVIDIA GPUs of this machine as nvidia-smi tells them, without torch; () where there are none.

    CUDA_VISIBLE_DEVICES narrows them, as it will for the ranks.
    """
    if not shutil.which("nvidia-smi") or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ()
    import subprocess  # only here: a plan for another machine takes less time than this import

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
        return Device("cpu", "cpu", memory // nproc_per_node, cores=len(os.sched_getaffinity(0)))
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
            "--cluster has SLURM start them, or render and start each by hand (launch/multinode.sh)"
        )
