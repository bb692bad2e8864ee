"""A tokenizer's vocabulary without transformers: what it has, and how many rows model.add_tokens need."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.models.layout import Tensor

if TYPE_CHECKING:
    from distft.config.recipe import Recipe

# What templates write as one token; the tags of thoughts and tool calls are words in many vocabularies.
_CONTROL = re.compile(
    r"<\|[^\s|<>]{1,40}\|>|\[\|[a-z]{1,40}\|\]|<｜[^\s｜<>]{1,40}｜>|<(?:start|end)_of_(?:turn|utterance)>|</?s>|<(?:bos|eos)>"
)


def control_tokens(text: str) -> list[str]:
    """The tokens of a chat template, or of what it prints, each once."""
    return list(dict.fromkeys(_CONTROL.findall(text)))


def new_token_count(recipe: Recipe) -> int:
    """Tokens whose rows are trained beside adapters; with lora.modules_to_save they are part of the layers there."""
    return 0 if recipe.lora and recipe.lora.modules_to_save else len(set(recipe.model.add_tokens))


def rows_needed(recipe: Recipe, have: int) -> int:
    """Rows that the embeddings have once each of model.add_tokens has one; now they `have` some.

    A vocabulary that cannot be read here (a hub id whose tokenizer is not in the cache, a tokenizer without
    tokenizer.json) is taken to be as large as the embeddings, and to have none of the tokens.
    """
    wanted = list(dict.fromkeys(recipe.model.add_tokens))
    if not wanted:
        return have
    known = vocabulary(recipe.model.name_or_path, recipe.model.revision)
    if known is None:
        return have + len(wanted)
    size = max(known.values(), default=-1) + 1
    new = [token for token in wanted if token not in known]
    ids = [known[token] for token in wanted if token in known] + [size + number for number in range(len(new))]
    return max(have, max(ids) + 1)


def vocabulary_tensors(tensors: Sequence[Tensor], vocab_size: int | None) -> list[Tensor]:
    """The weights with a row for each token: the embeddings, and the output layer where it is among `tensors`."""
    return [tensor for tensor in tensors if tensor.kind in ("embedding", "output") and tensor.shape[0] == vocab_size]


def vocabulary(name_or_path: str, revision: str | None) -> dict[str, int] | None:
    """Token to id, as tokenizer.json has them; None where it is not on this machine."""
    folder = Path(name_or_path)
    path: Any = folder / "tokenizer.json"
    try:
        if not folder.is_dir():
            from huggingface_hub import constants

            if not (Path(constants.HF_HUB_CACHE) / f"models--{name_or_path.replace('/', '--')}").is_dir():
                return None  # and no client of the hub is loaded, which takes 0.2 s
            from huggingface_hub import try_to_load_from_cache

            path = try_to_load_from_cache(name_or_path, "tokenizer.json", revision=revision)
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        tokens = found["model"]["vocab"]
        if not isinstance(tokens, dict):  # Unigram's: pairs of token and score
            tokens = {token: number for number, (token, _) in enumerate(tokens)}
        return tokens | {token["content"]: token["id"] for token in found.get("added_tokens") or ()}
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
