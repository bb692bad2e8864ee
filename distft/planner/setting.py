"""What determines the memory and speed of a rank, besides recipe and model."""

from __future__ import annotations

from dataclasses import dataclass

from distft.config.recipe import Recipe
from distft.strategies.accelerate import syncs_each_batch
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
    reshard_after_forward: bool = True  # FSDP2: false keeps what the forward pass gathered for the backward pass

    @property
    def kind(self) -> Kind:
        return KINDS[self.strategy]

    def accumulates(self, recipe: Recipe) -> bool:
        """Whether an optimizer step has several micro-batches."""
        return recipe.training.global_batch_size > self.micro_batch_size * self.world_size

    def keeps_whole_gradients(self, recipe: Recipe) -> bool:
        """Whether FSDP2 has unsharded gradients between micro-batches."""
        return self.kind.engine == "fsdp2" and not syncs_each_batch(recipe) and self.accumulates(recipe)
