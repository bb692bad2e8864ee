"""How a base model is read and a trained one written, for those that plan it and those that do it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distft.models.lora import changes_base

if TYPE_CHECKING:
    from distft.config.recipe import Recipe

SHARD_BYTES = 2 << 30  # of a file of a whole model


def needs_whole_base(recipe: Recipe, stored_quantized: bool) -> bool:
    """Whether every rank must read all of the base before it is sharded.

    DoRA, PiSSA and OLoRA start from values of the whole base, and a base that is stored quantized is unpacked by
    transformers. Otherwise each unit can get its weights just before it is sharded (train/streaming.py).
    """
    lora = recipe.lora
    return stored_quantized or changes_base(lora) or (lora is not None and lora.use_dora)
