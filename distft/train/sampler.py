"""The order of the rows: one stream, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import torch


class StreamSampler(torch.utils.data.Sampler[int]):
    """`total` row numbers: one seeded permutation of the rows after another, without a gap between epochs.

    Every global batch is the next `global_batch_size` of them, at every world size: there is no short batch at the end
    of an epoch, and none is filled up with repeated rows. A run that continues skips the first `start`.
    """

    def __init__(self, rows: int, total: int, seed: int, start: int = 0):
        self.rows, self.total, self.seed, self.start = rows, total, seed, start

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[int]:
        for epoch in range(self.start // self.rows, ceil(self.total / self.rows)):
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.rows, generator=generator).tolist()
            before = epoch * self.rows
            yield from order[max(0, self.start - before) : self.total - before]
