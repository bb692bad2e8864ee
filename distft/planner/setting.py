"""What determines the memory and speed of a rank, besides recipe and model."""

from __future__ import annotations

from dataclasses import dataclass

from distft.strategies.kinds import KINDS, Kind


@dataclass(frozen=True)
class Setting:
    """What determines the memory and speed of a rank, besides recipe and model."""

    strategy: str
    offload: str = "none"
    shard_size: int = 1  # ranks that share one copy of what the strategy shards
    world_size: int = 1
    nproc_per_node: int = 1
    micro_batch_size: int = 1
    gradient_checkpointing: bool = False
    attn_implementation: str = "sdpa"
    device_type: str = "cuda"

    @property
    def kind(self) -> Kind:
        return KINDS[self.strategy]
