"""train/numa.py: which CPUs a rank may use, from a machine's own files."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest

from distft.train.numa import bind, cpus

GPU = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1A, pci_device_id=0)


@pytest.mark.parametrize(
    ("text", "found"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("\n", set()), ("0-1,4-5", {0, 1, 4, 5})]
)
def test_the_kernels_lists(text: str, found: set[int]) -> None:
    assert cpus(text) == found


def machine(folder: Path, node: int, near: str) -> Path:
    gpu = folder / "bus/pci/devices/0000:1a:00.0"
    gpu.mkdir(parents=True)
    (gpu / "numa_node").write_text(f"{node}\n")
    if node >= 0:
        (folder / f"devices/system/node/node{node}").mkdir(parents=True)
        (folder / f"devices/system/node/node{node}/cpulist").write_text(near)
    return folder


def bound(root: Path, ranks: int) -> tuple[str | None, set[int]]:
    return bind(GPU, ranks, root), os.sched_getaffinity(0)


def test_a_rank_stays_near_its_gpu(tmp_path: Path) -> None:
    here = sorted(os.sched_getaffinity(0))
    if len(here) < 2:
        pytest.skip("needs two CPUs")
    first, rest = here[0], set(here)
    cases = {
        "near": (1, f"{first},{max(here) + 100}", 8, {first}, f"bound to 1 of {len(here)} CPUs, those of the GPU's"),
        "few": (0, str(first), 1, rest, f"not bound: of {len(here)} CPUs, 1 are near the GPU (NUMA node 0)"),
        "elsewhere": (0, str(max(here) + 100), 8, rest, f"not bound: of {len(here)} CPUs, 0 are near"),
        "one node": (0, ",".join(map(str, here)), 8, rest, None),
        "unknown": (-1, "", 8, rest, None),
    }
    for name, (node, near, ranks, allowed, says) in cases.items():
        with ProcessPoolExecutor(1, get_context("fork")) as pool:  # a process that may be bound
            said, found = pool.submit(bound, machine(tmp_path / name, node, near), ranks).result()
        assert found == allowed, name
        assert said == says if says is None else said.startswith(says), name
    assert bind(GPU, 8, tmp_path / "nothing") is None
