"""What a rank needs besides its steps: while it reads the model, and in host memory while it saves."""

from __future__ import annotations

from distft.config.recipe import Recipe
from distft.models.loading import SHARD_BYTES, needs_whole_base
from distft.planner.setting import Setting
from distft.planner.sharding import Share, Sizes


def peak(recipe: Recipe, sizes: Sizes, setting: Setting, mine: Share) -> tuple[int, int]:
    """Bytes of the rank's GPU, and of host memory for the rank, at most, before the first step (train/model.py).

    The files' own pages are not counted: all ranks of a node share them, and the system drops them when it must. A
    tensor is on the GPU as it is stored (16 bit) before it is cast or quantized. DeepSpeed's flat copy of the weights
    under ZeRO-1 and 2 is not counted either: where the GPU has no room, it is made in host memory.
    """
    kind, whole = setting.kind, sizes.frozen_bytes + sizes.wide * sizes.trained
    one = 2 * sizes.largest_tensor
    needs_whole = needs_whole_base(recipe, sizes.stored_quantized)
    if kind.shards_a_made_model(recipe.model.quantization is not None) and not needs_whole:
        unit = max(
            unit.bytes + (sizes.wide - sizes.low) * unit.trained for unit in (sizes.embedding, sizes.block, sizes.tail)
        )
        # With offload, what was sharded leaves the GPU.
        return mine.parameters + unit + one, mine.host
    if not kind.shards_parameters:
        return (mine.parameters if kind.engine == "deepspeed" else whole) + one, 0
    if recipe.model.quantization or sizes.stored_quantized:
        return whole + one, 0
    if kind.zero_stage == 3:  # zero.Init gathers a module at a time
        return mine.parameters + sizes.largest_module, mine.host
    return mine.parameters + sizes.block.bytes + (sizes.wide - sizes.low) * sizes.block.trained, whole


def saving(recipe: Recipe, sizes: Sizes, setting: Setting, optimizer: int) -> int:
    """Bytes of host memory for each node, at most, for checkpoints and final/.

    Weights and optimizer states are copied there before they are written, to buffers that stay: a part for
    each rank of the job (train/checkpoint.py). Of a whole model each rank has a file at a time, and a tensor as it was
    trained, as it is stored and in the file (train/save.py); of an adapter the first rank has all, twice.

    Args:
        optimizer: bytes of the states under DDP, as they are checkpointed: 8-bit ones in float32.
    """
    copied = -(-(sizes.wide * sizes.trained + optimizer) // setting.world_size) * setting.nproc_per_node
    if recipe.lora is not None:
        return copied + 8 * sizes.trained
    return copied + setting.nproc_per_node * (min(2 * sizes.parameters, SHARD_BYTES) + 6 * sizes.largest_tensor)
