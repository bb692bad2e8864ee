"""Devices of ranks: those of this machine, and the GPUs that a cluster profile can name."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from distft.errors import ClusterError
from distft.hardware.topology import Topology
from distft.units import GIB


@dataclass(frozen=True)
class Device:
    """The device of one rank. `memory` in bytes; for `cpu` it is the rank's share of host memory."""

    type: str  # "cuda" or "cpu"
    name: str
    memory: int
    compute_capability: float | None = None  # 8.0 is Ampere; None for a CPU, or unknown
    cores: int | None = None  # of the whole node, where known


class Gpu(NamedTuple):
    """Data sheet of one GPU: memory in GiB, compute capability, dense TFLOP/s in 16 bit and in float32, TB/s of its
    memory, GB/s to the other GPUs in its node in one direction, measured matmul TFLOP/s, if there are any, and GB/s to
    other nodes for each GPU of a node as they are usually sold, if there is such a node."""

    memory: float
    compute_capability: float
    tflops: float
    float32_tflops: float
    memory_bandwidth: float
    link: float
    measured_tflops: float | None = None
    network: float | None = None


# Name of a GPU in profiles → its data sheet. Memory: the data sheet's size less 1.1%, which the driver keeps (torch
# sees 79.15 GiB on an A100-80GB, and 14.9 on a T4 with ECC). Links: NVLink, else PCIe. Measured: the "maximum
# achievable matmul FLOPS" in https://github.com/stas00/ml-engineering, compute/accelerator/benchmarks. Network: a port
# for each GPU, of 200 Gb/s in DGX A100, of 400 in DGX H100, H200 and B200 (NVIDIA's data sheets).
GPUS = {
    "V100-16GB": Gpu(15.8, 7.0, 125, 15.7, 0.90, 150),
    "V100-32GB": Gpu(31.6, 7.0, 125, 15.7, 0.90, 150),
    "T4": Gpu(14.9, 7.5, 65, 8.1, 0.32, 13),
    "A100-40GB": Gpu(39.5, 8.0, 312, 19.5, 1.555, 300, 271.2, 25),
    "A100-80GB": Gpu(79.15, 8.0, 312, 19.5, 2.0, 300, 271.2, 25),
    "A10G": Gpu(23.7, 8.6, 70, 31.2, 0.60, 31),
    "RTX-3090": Gpu(23.7, 8.6, 71, 35.6, 0.94, 31),
    "RTX-A6000": Gpu(47.4, 8.6, 155, 38.7, 0.77, 31),
    "L4": Gpu(23.7, 8.9, 121, 30.3, 0.30, 31),
    "L40S": Gpu(47.4, 8.9, 362, 91.6, 0.86, 31),
    "RTX-4090": Gpu(23.7, 8.9, 165, 82.6, 1.01, 31),
    "H100-PCIE": Gpu(79.1, 9.0, 756, 51, 2.0, 63),
    "H100": Gpu(79.1, 9.0, 989, 67, 3.35, 450, 794.5, 50),
    "H200": Gpu(139.4, 9.0, 989, 67, 4.8, 450, 794.5, 50),
    "B200": Gpu(178.0, 10.0, 2250, 80, 8.0, 900, 1745, 50),
    "RTX-5090": Gpu(31.6, 12.0, 209, 105, 1.79, 63),
}


LARGEST_GPU = 4096  # GiB; more is a typo
QUERY = ("nvidia-smi", "--query-gpu=uuid,name,memory.total,compute_cap,mig.mode.current")
# What the driver leaves of a MIG device's nominal size: 4,864 MiB of 1g.5gb, 9,856 of 1g.10gb (nvidia-smi's tables).
MIG_SHARE = 0.95
GPU_LINE, MIG_LINE = r"GPU (\d+): .*\(UUID: (\S+)\)", r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (\S+)\)"


def known_gpu(name: str) -> str | None:
    """The name in GPUS for a GPU as people (h100-80gb, rtx4090) or nvidia-smi (NVIDIA A100-SXM4-80GB) call it; None for
    an unknown one."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    whole = "".join(re.findall(r"[a-z0-9]+", name.lower()))
    for known in sorted(GPUS, key=len, reverse=True):
        parts = known.lower().split("-")
        if set(parts) <= words or "".join(parts) == whole:
            return known
    return None


@lru_cache
def data_sheet(name: str) -> Gpu | None:
    """The data sheet of a GPU by any of its names; None for an unknown one, and for a CPU."""
    known = known_gpu(name)
    return GPUS[known] if known else None


def named_device(name: str, nproc_per_node: int) -> Device:
    """The device that `--gpu` names: a GPU, a size such as 48GiB, or `local` for this machine's.

    Raises:
        ClusterError: it is none of these.
    """
    if name == "local":
        return local_device(nproc_per_node)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gib|gb)", name.strip().lower())
    if size and 1 <= float(size[1]) <= LARGEST_GPU:
        memory = float(size[1]) * (GIB if size[2] == "gib" else 10**9)
        return Device("cuda", f"{size[1]} {'GiB' if size[2] == 'gib' else 'GB'} GPU", int(memory))
    if known := known_gpu(name):
        return Device("cuda", known, int(GPUS[known].memory * GIB), GPUS[known].compute_capability)
    word = "".join(re.findall(r"[a-z0-9]+", name.lower()))
    near = [known for known in GPUS if word and word in known.lower().replace("-", "")]
    guess = f"did you mean {' or '.join(near)}? Give" if near else "give"
    raise ClusterError(f"--gpu: got {name!r}; {guess} one of {', '.join(GPUS)}, a size such as 48GiB or 80GB, or local")


@lru_cache
def visible_gpus() -> tuple[Device, ...]:
    """The GPUs that ranks started here would have, as nvidia-smi lists them, without torch; () where there are none.

    CUDA_VISIBLE_DEVICES selects among them as it will for the ranks (CUDA programming guide, "CUDA environment
    variables"). Of MIG devices CUDA gives a process the first one alone (NVIDIA's MIG user guide,
    "CUDA_VISIBLE_DEVICES").

    Raises:
        ClusterError: CUDA_VISIBLE_DEVICES names one that is not there, from which on CUDA would see none.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not shutil.which("nvidia-smi") or chosen in ("", "-1"):
        return ()
    whole: dict[str, Device] = {}
    divided = False
    for line in _output(*QUERY, "--format=csv,noheader,nounits").splitlines():
        uuid, name, mib, capability, *mig = (field.strip() for field in line.split(","))
        whole[uuid] = Device("cuda", name, int(mib) * 2**20, float(capability))
        divided = divided or mig == ["Enabled"]
    if not whole:
        return ()
    parts = _mig_devices(whole) if divided else {}
    if chosen is None:
        return tuple(parts.values())[:1] if parts else tuple(whole.values())
    found = []
    for word in (word.strip() for word in chosen.split(",")):
        if word == "-1":
            break
        if (gpu := _named(word, whole, parts)) is None:
            raise ClusterError(
                f"CUDA_VISIBLE_DEVICES: {word!r} is no GPU of this machine, which has {', '.join([*whole, *parts])}; "
                "give numbers from 0 or these names, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        found.append(gpu)
    return tuple(found[:1] if any(gpu in parts.values() for gpu in found) else found)


def _named(word: str, whole: dict[str, Device], parts: dict[str, Device]) -> Device | None:
    """The GPU with that number, or whose UUID begins so; numbers of MIG's are GPU:DEVICE."""
    if word.isdecimal():
        return list(whole.values())[int(word)] if int(word) < len(whole) else None
    matches = [gpu for uuid, gpu in (whole | parts).items() if word and uuid.startswith(word)]
    return matches[0] if len(matches) == 1 else None


def _mig_devices(whole: dict[str, Device]) -> dict[str, Device]:
    """UUID → MIG device, of `nvidia-smi -L`."""
    found: dict[str, Device] = {}
    parent = None
    for line in _output("nvidia-smi", "-L").splitlines():
        if gpu := re.match(GPU_LINE, line):
            parent = whole.get(gpu[2])
        elif (part := re.match(MIG_LINE, line)) and parent:
            size = re.search(r"(\d+)gb", part[1])
            memory = int(int(size[1]) * GIB * MIG_SHARE) if size else parent.memory
            found[part[3]] = replace(parent, name=f"{parent.name} MIG {part[1]}", memory=memory)
    return found


def _output(*command: str) -> str:
    """What a command prints; "" where it fails: with a driver that does not answer no GPU is usable."""
    import subprocess  # only here: this import takes longer than a plan for another machine

    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def physical_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def local_device(nproc_per_node: int) -> Device:
    """The device of one rank when `nproc_per_node` ranks run on this machine.

    Raises:
        ClusterError: more ranks than GPUs, on a machine with GPUs.
    """
    gpus = visible_gpus()
    if not gpus:
        return Device("cpu", "cpu", physical_memory() // nproc_per_node, cores=len(os.sched_getaffinity(0)))
    if nproc_per_node > len(gpus):
        raise ClusterError(
            f"--gpus-per-node: got {nproc_per_node}, this machine has {len(gpus)} ({gpus[0].name}); "
            f"ask for at most {len(gpus)}, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return min(gpus[:nproc_per_node], key=lambda gpu: gpu.memory)


def topology_here(nodes: int | None, gpus_per_node: int | None) -> Topology:
    """The topology on this machine: one node with all of its GPUs (one process without GPUs), unless given."""
    ranks = gpus_per_node if gpus_per_node is not None else len(visible_gpus()) or 1
    return Topology(nodes if nodes is not None else 1, ranks)


def only_this_machine(topology: Topology) -> None:
    """Raises ClusterError for more than one node: without a cluster, distft can start only this machine."""
    if topology.nnodes != 1:
        raise ClusterError(
            f"--nodes: got {topology.nnodes}, but without a cluster distft starts only this machine; use --cluster to "
            "have SLURM start them, or render and start each by hand (launch/multinode.sh)"
        )
