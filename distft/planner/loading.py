"""What a rank needs while it reads the model: as much as a step, where a strategy shards what was whole before."""

from __future__ import annotations

from distft.config.recipe import Recipe
from distft.planner.setting import Setting
from distft.planner.sharding import Share, Sizes
from distft.strategies.loading import streams


def peak(recipe: Recipe, sizes: Sizes, setting: Setting, mine: Share) -> tuple[int, int]:
    """Bytes of the rank's GPU, and of host memory for the rank, at most, before the first step (train/model.py).

    The files' own pages are not counted: all ranks of a node share them, and the system drops them when it must. A
    tensor is on the GPU as it is stored (16 bit) before it is cast or quantized. DeepSpeed's flat copy of the weights
    under ZeRO-1 and 2 is not counted either: where the GPU has no room, it is made in host memory.
    """
    kind, whole = setting.kind, sizes.frozen_bytes + 4 * sizes.trained
    one = 2 * sizes.largest_tensor
    if streams(recipe, setting.strategy, sizes.stored_quantized):
        unit = max(unit.bytes + (4 - sizes.low) * unit.trained for unit in (sizes.embedding, sizes.block, sizes.tail))
        # With offload, what was sharded leaves the GPU.
        return mine.parameters + unit + one, mine.host
    if not kind.shards_parameters:
        return (mine.parameters if kind.engine == "deepspeed" else whole) + one, 0
    if recipe.model.quantization or sizes.stored_quantized:
        return whole + one, 0
    if kind.zero_stage == 3:  # zero.Init gathers a module at a time
        return mine.parameters + sizes.largest_module, mine.host
    return mine.parameters + sizes.block.bytes + (4 - sizes.low) * sizes.block.trained, whole
