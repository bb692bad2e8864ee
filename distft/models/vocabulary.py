"""A tokenizer's vocabulary without transformers: how many rows the embeddings need for model.add_tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.models.layout import Tensor

if TYPE_CHECKING:
    from distft.config.recipe import Recipe


def new_token_count(recipe: Recipe) -> int:
    """Tokens whose rows are trained beside adapters."""
    return len(set(recipe.model.add_tokens))


def rows_needed(recipe: Recipe, have: int) -> int:
    """Rows that the embeddings have once each of model.add_tokens has one; now they `have` some.

    A vocabulary that cannot be read here (a hub id whose tokenizer is not in the cache, a tokenizer without
    tokenizer.json) is taken to be as large as the embeddings, and to have none of the tokens.
    """
    wanted = list(dict.fromkeys(recipe.model.add_tokens))
    if not wanted:
        return have
    known = _vocabulary(recipe)
    if known is None:
        return have + len(wanted)
    size = max(known.values(), default=-1) + 1
    new = [token for token in wanted if token not in known]
    ids = [known[token] for token in wanted if token in known] + [size + number for number in range(len(new))]
    return max(have, max(ids) + 1)


def vocabulary_tensors(tensors: Sequence[Tensor], vocab_size: int | None) -> list[Tensor]:
    """The weights with a row for each token: the embeddings, and the output layer where it is among `tensors`."""
    return [tensor for tensor in tensors if tensor.kind in ("embedding", "output") and tensor.shape[0] == vocab_size]


def _vocabulary(recipe: Recipe) -> dict[str, int] | None:
    """Token to id, as tokenizer.json has them; None where it is not on this machine."""
    folder = Path(recipe.model.name_or_path)
    path: Any = folder / "tokenizer.json"
    if not folder.is_dir():
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            return None
        path = try_to_load_from_cache(recipe.model.name_or_path, "tokenizer.json", revision=recipe.model.revision)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        vocabulary = found["model"]["vocab"]
        if not isinstance(vocabulary, dict):  # Unigram's: pairs of token and score
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        return vocabulary | {token["content"]: token["id"] for token in found.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
