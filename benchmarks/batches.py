"""How long a rank takes to make a batch: of rows read as arrays, as distft does, and as Python lists.

    python benchmarks/batches.py [--rows 8] [--tokens 8192]

Collating is in the rank's own thread, so what it takes is added to every micro-batch. One thread, median of 15.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy
import torch
from datasets import Dataset

from distft.train.trainer import Collator


def seconds(rows: Dataset, count: int, collate: Collator) -> float:
    times = []
    for _ in range(15):
        began = time.perf_counter()
        collate([rows[i] for i in range(count)])
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ids = numpy.random.default_rng(0).integers(0, 100_000, options.tokens)
    documents = [512] * (options.tokens // 512)
    row: dict[str, Any] = {"input_ids": ids, "labels": ids, "seq_lengths": documents}
    lists = Dataset.from_list([row] * options.rows)
    for name, unpadded in (("SDPA", False), ("FlashAttention or varlen", True)):
        collate = Collator(0, packing=True, unpadded=unpadded)
        slow, fast = (seconds(rows, options.rows, collate) for rows in (lists, lists.with_format("numpy")))
        print(
            f"{name}: {options.rows} x {options.tokens:,} tokens in {fast * 1e3:.1f} ms as arrays, "
            f"{slow * 1e3:.1f} ms as lists: {slow / fast:.0f} times"
        )


if __name__ == "__main__":
    main()
