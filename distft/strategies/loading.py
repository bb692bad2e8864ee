"""How the ranks read a base model and write a trained one, for those that plan it and those that do it."""

from __future__ import annotations

from distft.config.recipe import Recipe, changes_base
from distft.strategies.kinds import KINDS

SHARD_BYTES = 2 << 30  # of a file of a whole model


def streams(recipe: Recipe, strategy: str, stored_quantized: bool) -> bool:
    """Whether each unit of the model gets its weights just before it is sharded (train/streaming.py).

    Under ZeRO-3 a model that is not quantized is sharded while it is made. DoRA, PiSSA and OLoRA start from values of
    the whole base, and a base that is stored quantized is unpacked by transformers: there every rank reads all of it.
    """
    kind, lora = KINDS[strategy], recipe.lora
    if kind.engine != "fsdp2" and not (kind.zero_stage == 3 and recipe.model.quantization):
        return False
    return not (stored_quantized or changes_base(lora) or (lora is not None and lora.use_dora))
