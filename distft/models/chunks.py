"""The loss in chunks (training.loss; train/chunked_loss.py): which runs have it, and how many tokens are a chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distft.models.lora import adapters, saved
from distft.models.vocabulary import new_token_count

if TYPE_CHECKING:
    from distft.config.recipe import Recipe
    from distft.models.shapes import ModelShape

CHUNK_BYTES = 2**28  # of float32 logits: small beside a GPU, and some 500 tokens of the largest vocabularies
OVERRIDE = "label_smoothing_factor"  # of trainer.overrides, which needs all logits


def chunk_tokens(vocab_size: int) -> int:
    """Tokens of a chunk, a multiple of 64."""
    return max(64, CHUNK_BYTES // (4 * vocab_size) // 64 * 64)


def asked_for(recipe: Recipe) -> str | None:
    """What in the recipe asks for all logits at once."""
    if recipe.training.loss == "full":
        return "training.loss: full"
    return f"trainer.overrides.{OVERRIDE} needs all logits" if OVERRIDE in recipe.trainer.overrides else None


def why_full(recipe: Recipe, model: ModelShape, zero_stage: int | None) -> str | None:
    """Why the loss is computed from all logits at once; None where it is in chunks."""
    if why := asked_for(recipe):
        return why
    if zero_stage == 3 and recipe.lora is not None and _changes_head(recipe, model):
        return "ZeRO-3 would gather an output layer with adapters or new rows once for every chunk"
    return None


def head_is_trained(recipe: Recipe, model: ModelShape) -> bool:
    """Whether the weight of the output layer is trained itself, also as one that it shares with the embeddings."""
    ends = (*model.tensors, *model.tied)
    if recipe.lora is not None:
        return any(tensor.kind == "output" for tensor in saved(recipe.lora, ends))
    kind = "output" if any(tensor.kind == "output" for tensor in model.tensors) else "embedding"
    return any(tensor.kind == kind and tensor.name not in model.fixed for tensor in model.tensors)


def _changes_head(recipe: Recipe, model: ModelShape) -> bool:
    lora, ends = recipe.lora, (*model.tensors, *model.tied)
    if lora is None:
        return False
    changed = [*saved(lora, ends), *(tensor for tensor, _ in adapters(lora, ends, model.peft_experts))]
    return new_token_count(recipe) > 0 or any(tensor.kind == "output" for tensor in changed)
