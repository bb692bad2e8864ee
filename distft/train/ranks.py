"""What the ranks of a run tell each other. Every function is collective: all ranks call it, in the same order."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

NO_LIMIT = timedelta(days=365)


class RankGroup:
    """All ranks, over gloo connections apart from the training's: a thread that saves may use them at any time. However
    slow the disk is, there is no time-out; a rank that is lost closes its connections.

    Rank 0 of 1, without connections, where torch.distributed is not in use.
    """

    def __init__(self) -> None:
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.process_group = dist.new_group(backend="gloo", timeout=NO_LIMIT) if distributed else None

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values = [value]
        if self.process_group is not None:
            values = [None] * self.world_size
            dist.all_gather_object(values, value, group=self.process_group)
        return values

    def from_first(self, value: Any) -> Any:
        """The first rank's value."""
        box = [value]
        if self.process_group is not None:
            dist.broadcast_object_list(box, src=0, group=self.process_group)
        return box[0]


def largest(value: int, device: torch.device) -> int:
    """The largest of all ranks' values, over the training's own connections."""
    return largest_of([value], device)[0]


def largest_of(values: list[int], device: torch.device) -> list[int]:
    """Of each value, the largest of all ranks', in one message."""
    if not dist.is_initialized():
        return values
    found = torch.tensor(values, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()
