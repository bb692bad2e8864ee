"""What decides about the memory and speed of a rank, beside recipe and model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """What decides about the memory of a rank, beside recipe and model; `shard_size` ranks share one copy of what the
    strategy shards."""

    strategy: str
    offload: str = "none"
    shard_size: int = 1
    world_size: int = 1
    nproc_per_node: int = 1
    micro_batch_size: int = 1
    gradient_checkpointing: bool = False
    attn_implementation: str = "sdpa"
    device_type: str = "cuda"

    @property
    def dtype_regime(self) -> str:
        """What the strategy computes with: see train/fake_model.py, build."""
        return "autocast" if self.strategy == "ddp" else "zero" if self.strategy.startswith("zero") else "fsdp"
