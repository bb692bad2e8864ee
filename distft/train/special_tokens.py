"""Tokens that a recipe adds to the model's tokenizer, and the token that ends a text.

New tokens get the ids after the tokenizer's last one, in the recipe's order: the same in the preparation of the data
and on every rank. The model's embeddings may have rows for them already (Qwen's vocabulary is padded), or grow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distft.config.recipe import Recipe
from distft.errors import DataError, NoTokenizerError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class NewTokens:
    """What model.add_tokens means for a model."""

    ids: tuple[int, ...] = ()  # of all of them, ascending
    # For each row that has to be made: the ids of the pieces that its token was split into; () for none.
    pieces: Mapping[int, tuple[int, ...]] | None = None
    present: tuple[str, ...] = ()  # those that the vocabulary has already
    rows: int | None = None  # of the embeddings, once they have one for each; None: config.json does not say


def read_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer as it is stored.

    Raises:
        NoTokenizerError: there is none.
    """
    from transformers import AutoTokenizer

    model = recipe.model
    try:
        return AutoTokenizer.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise NoTokenizerError(
            f"model.name_or_path: no tokenizer can be read from {model.name_or_path} ({first_line(error)})"
        ) from None


def set_special_tokens(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Add model.add_tokens to a tokenizer, and set model.eos_token and model.pad_token.

    Raises:
        DataError: one of them is not in the vocabulary, or there is no padding token.
    """
    model = recipe.model
    _add(tokenizer, recipe)
    if model.eos_token is not None:
        if not _has(tokenizer, model.eos_token):
            raise DataError(
                f"model.eos_token: {model.eos_token!r} is not in the tokenizer's vocabulary; "
                f"add it: model.add_tokens: {json.dumps([*model.add_tokens, model.eos_token], ensure_ascii=False)}"
            )
        tokenizer.eos_token = model.eos_token
    if model.pad_token is not None:
        if not _has(tokenizer, model.pad_token):
            raise DataError(f"model.pad_token: {model.pad_token!r} is not in the tokenizer's vocabulary")
        tokenizer.pad_token = model.pad_token
    if tokenizer.pad_token_id is None:
        fix = f"; set model.pad_token: {json.dumps(tokenizer.eos_token)}" if tokenizer.eos_token else ""
        raise DataError(f"model.pad_token: the tokenizer of {model.name_or_path} has no padding token{fix}")


def new_tokens(recipe: Recipe) -> NewTokens:
    """What becomes of the recipe's model.add_tokens.

    Raises:
        DataError: there is no tokenizer.
    """
    rows = _embedding_rows(recipe)
    if not recipe.model.add_tokens:
        return NewTokens(rows=rows)
    tokenizer = read_tokenizer(recipe)
    wanted = list(dict.fromkeys(recipe.model.add_tokens))
    present = tuple(token for token in wanted if _has(tokenizer, token))
    split = {token: _pieces(tokenizer, token) for token in wanted}
    _add(tokenizer, recipe)
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary[token] for token in wanted}
    have = rows if rows is not None else len(tokenizer)
    made = {ids[token] for token in wanted if token not in present or ids[token] >= have}
    pieces = {
        ids[token]: tuple(piece for piece in split[token] if piece < have and piece not in made)
        for token in wanted
        if ids[token] in made
    }
    return NewTokens(tuple(sorted(ids.values())), pieces, present, max(have, max(ids.values()) + 1))


def _add(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    from tokenizers import AddedToken

    new = [token for token in dict.fromkeys(recipe.model.add_tokens) if not _has(tokenizer, token)]
    # Exactly as they are written: no spaces around them, and no normalization, belong to them.
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in new], special_tokens=True)


def _has(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    return tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id) or token == tokenizer.unk_token


def _pieces(tokenizer: PreTrainedTokenizerBase, token: str) -> list[int]:
    return list(tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"])


def _embedding_rows(recipe: Recipe) -> int | None:
    """Rows of the model's embeddings as they are stored; None where its config cannot be read, which others report."""
    from transformers import AutoConfig

    model = recipe.model
    options: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(model.name_or_path, **options)
    except (OSError, ValueError, KeyError, ImportError):
        return None
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None
