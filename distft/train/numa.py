"""Keeps a rank on the CPUs of its GPU's NUMA node, so that what it sends to the GPU does not cross the sockets' link.

torchrun's --numa-binding=node does that too, and ends every rank where it cannot: without numactl, or where the job has
no CPU of that node.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any


def bind(gpu: Any, ranks: int, root: Path = Path("/sys")) -> str | None:
    """Bind this process to its GPU's NUMA node. Returns what was done, in words; None where nothing was to be done.

    Left alone: one NUMA node, a node that is not known, and one of which the job has less than a rank's share of CPUs.

    Args:
        gpu: what torch.cuda.get_device_properties gives.
        ranks: on this machine, which share the CPUs.
    """
    allowed = os.sched_getaffinity(0)
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    try:
        node = int((root / "bus/pci/devices" / address / "numa_node").read_text())
        near = cpus((root / f"devices/system/node/node{node}/cpulist").read_text()) & allowed
    except (OSError, ValueError):
        return None
    if near == allowed:
        return None
    if len(near) * ranks < len(allowed):
        return f"not bound: of {len(allowed)} CPUs, {len(near)} are near the GPU (NUMA node {node})"
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setaffinity(int(thread.name), near)
    return f"bound to {len(near)} of {len(allowed)} CPUs, those of the GPU's NUMA node {node}"


def cpus(text: str) -> set[int]:
    """The CPUs of a list as the kernel writes it: `0-3,8`."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
