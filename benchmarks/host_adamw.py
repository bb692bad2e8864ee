"""The optimizer's step in host memory (parallelism.offload): torch's fused AdamW beside DeepSpeedCPUAdam, in one run.

    python benchmarks/host_adamw.py [--million 200]

DeepSpeedCPUAdam is compiled first, with a C++ compiler and ninja, into TORCH_EXTENSIONS_DIR.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

BYTES = 28  # read: gradient, weight, two moments; written: the latter three


def stepper(elements: int, kind: Callable[..., Any], **options: Any) -> Callable[[], float]:
    """A function that makes a step and returns its seconds."""
    weight = torch.nn.Parameter(torch.randn(elements))
    weight.grad = torch.randn(elements)
    optimizer = kind([weight], lr=1e-4, weight_decay=0.01, **options)

    def step() -> float:
        began = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - began

    step()  # makes the states
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=int, default=200, help="elements, in millions")
    elements = parser.parse_args().million * 1_000_000
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    steps = {
        "torch's fused AdamW": stepper(elements, torch.optim.AdamW, fused=True),
        "DeepSpeedCPUAdam": stepper(elements, DeepSpeedCPUAdam),
        "torch's AdamW (adamw_torch)": stepper(elements, torch.optim.AdamW),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(7):  # in turn, so that a busy moment meets all of them
        for name, step in steps.items():
            times[name].append(step())
    fused = statistics.median(times["torch's fused AdamW"])
    print(f"a step of {elements:,} elements, {torch.get_num_threads()} threads, median of 7")
    for name, found in times.items():
        seconds = statistics.median(found)
        print(f"  {name}: {seconds * 1e3:.0f} ms, {BYTES * elements / seconds / 1e9:.0f} GB/s, {seconds / fused:.2f} x")


if __name__ == "__main__":
    main()
