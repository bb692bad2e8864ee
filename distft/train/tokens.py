"""Rows to tokens: a recipe's tokenizer, and which tokens of a row are trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.config.recipe import Recipe
from distft.data.formats import IGNORE, Kind
from distft.errors import DataError
from distft.train.chat import ChatEncoder, Document, RowProblem, Span, Tokenization, Tokens, check_template
from distft.train.special_tokens import new_tokens, read_tokenizer, set_special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[Mapping[str, Any]], list[Document]]  # takes the fields of a row; raises RowProblem


@dataclass(frozen=True)
class Encoder:
    """What makes tokens of rows in one format, and what is worth knowing about its tokenizer."""

    encode: Encode
    notes: list[str]


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the recipe's special tokens and chat template.

    Raises:
        DataError: there is no tokenizer, or it lacks one of the special tokens, or a padding token.
    """
    tokenizer = read_tokenizer(recipe)
    set_special_tokens(tokenizer, recipe)
    if recipe.data.chat_template:
        tokenizer.chat_template = _chat_template(tokenizer, recipe.data.chat_template)
    return tokenizer


def _chat_template(tokenizer: PreTrainedTokenizerBase, given: str) -> str:
    """The text of a template that a recipe gives as a file (absolute in a loaded recipe) or by its name."""
    if Path(given).is_absolute():
        return Path(given).read_text(encoding="utf-8")
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if given not in named:
        have = ", ".join(named) or "none with a name"
        raise DataError(f"data.chat_template: got {given!r}, and the tokenizer's chat templates are {have}")
    return str(named[given])


def encoder(kind: Kind, tokenization: Tokenization, recipe: Recipe) -> Encoder:
    """The encoder of examples of this kind.

    Raises:
        DataError: the tokenizer cannot encode them.
    """
    made = _ENCODERS[kind](tokenization, recipe)
    encode, added = made.encode, new_tokens(recipe)
    trained = ": its row is trained" if recipe.lora else ""
    notes = [
        *made.notes,
        *(f"model.add_tokens: {t} is in the vocabulary already, and is not added{trained}" for t in added.present),
    ]
    if added.rows is not None:
        encode = _with_embeddings(encode, tokenization.tokenizer, recipe, added.rows)
    if recipe.data.train_on != "everything" or kind == "tokens":  # whose labels say what is trained
        return Encoder(encode, notes)
    return Encoder(lambda row: [_all_trained(document) for document in encode(row)], notes)


def _with_embeddings(encode: Encode, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: int) -> Encode:
    """An encoder that refuses rows with a token for which the model has no embedding.

    Not every tokenizer with such tokens is: that of Gemma 3's text models has one for images.

    Raises:
        DataError: the padding token is such a token.
    """

    def problem(token: int) -> str:
        text = str(tokenizer.convert_ids_to_tokens(token))
        names = json.dumps([*recipe.model.add_tokens, text], ensure_ascii=False)
        return (
            f"the tokenizer's token {text} has id {token}, and the model's embeddings have {rows} rows; "
            f"to add and train it: model.add_tokens: {names}"
        )

    padding = tokenizer.pad_token_id
    if isinstance(padding, int) and padding >= rows:
        raise DataError(f"model.pad_token: {problem(padding)}")

    def checked(row: Mapping[str, Any]) -> list[Document]:
        documents = encode(row)
        for document in documents:
            if (largest := max(document.ids, default=0)) >= rows:
                raise RowProblem("token-without-embedding", problem(largest))
        return documents

    return checked


def _all_trained(document: Document) -> Document:
    """data.train_on: everything."""
    spans = [replace(span, trained=True) for span in document.spans]
    return replace(document, trained=[True] * len(document.ids), spans=spans)


def _chat_encoder(tokenization: Tokenization, recipe: Recipe) -> Encoder:
    tokenizer = tokenization.tokenizer
    if not tokenizer.chat_template:
        raise DataError(
            f"data.format: messages need a chat template, and the tokenizer of {recipe.model.name_or_path} has none; "
            "set data.chat_template to a Jinja file, or use prompt + completion"
        )
    train_on = "all" if recipe.data.train_on == "everything" else recipe.data.train_on
    chat = ChatEncoder(tokenizer, train_on=train_on, ignore_fields=recipe.data.ignore_fields, tokenization=tokenization)
    problems, notes = check_template(chat)
    if problems:
        source = recipe.data.chat_template or f"the chat template of {recipe.model.name_or_path}"
        raise DataError("\n".join(f"{source}: {problem.text}" for problem in problems))
    return Encoder(chat.encode, notes)


def _text_encoder(tokenization: Tokenization, recipe: Recipe) -> Encoder:
    tokenizer = tokenization.tokenizer
    _check_end(tokenizer, recipe)

    def encode(row: Mapping[str, Any]) -> list[Document]:
        text = row["text"]
        ids = _begun(tokenization.ids(text), tokenizer)
        ids, trained = _ended(ids, [True] * len(ids), tokenizer)
        return [Document(ids, trained, text, [Span("text", 0, len(text), True)])]

    return Encoder(encode, [])


def _pair_encoder(tokenization: Tokenization, recipe: Recipe) -> Encoder:
    """A prompt and its completion, tokenized separately as at inference: there the prompt is tokenized before any
    completion exists.

    A tokenizer that puts a space before every text (SentencePiece's, for one) would put one between the two, so there
    they are tokenized as one text.
    """
    tokenizer = tokenization.tokenizer
    _check_end(tokenizer, recipe)
    joined = _puts_space_before(tokenizer)

    def encode(row: Mapping[str, Any]) -> list[Document]:
        prompt, completion = row["prompt"], row["completion"]
        text, edge = prompt + completion, len(prompt)
        if joined:
            ids, trained = tokenization.marked(text, [(edge, len(text))], add_special_tokens=True)
        else:
            ids = tokenization.ids(prompt)
            if ids and ids[-1] == tokenizer.eos_token_id:
                ids.pop()
            answer = tokenization.ids(completion, add_special_tokens=False)
            ids, trained = ids + answer, [False] * len(ids) + [True] * len(answer)
        begun = _begun(ids, tokenizer)
        ids, trained = _ended(begun, trained[len(ids) - len(begun) :], tokenizer)
        return [
            Document(ids, trained, text, [Span("prompt", 0, edge, False), Span("completion", edge, len(text), True)])
        ]

    return Encoder(encode, [])


def _token_encoder(tokenization: Tokenization, recipe: Recipe) -> Encoder:
    """Tokens as they are: none is added."""
    size = len(tokenization.tokenizer)

    def encode(row: Mapping[str, Any]) -> list[Document]:
        ids = row["input_ids"]
        if max(ids) >= size:
            place = next(n for n, token in enumerate(ids) if token >= size)
            raise RowProblem("tokens", f"input_ids[{place}]: got {ids[place]}, and the tokenizer has {size} tokens")
        return [Document(ids, [label != IGNORE for label in row["labels"]], "", [])]

    return Encoder(encode, [])


_ENCODERS: dict[Kind, Callable[[Tokenization, Recipe], Encoder]] = {
    "messages": _chat_encoder,
    "prompt_completion": _pair_encoder,
    "text": _text_encoder,
    "tokens": _token_encoder,
}


def _puts_space_before(tokenizer: PreTrainedTokenizerBase) -> bool:
    first = tokenizer.convert_ids_to_tokens(Tokenization(tokenizer).ids("x", add_special_tokens=False))[0]
    return first.startswith(("▁", "Ġ"))  # SentencePiece's and byte-level BPE's space


def _begun(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Without the BOS that the tokenizer puts before a text that already begins with one."""
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _check_end(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Raises DataError where no token ends a text: the model would not learn to stop."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"model.eos_token: the tokenizer of {recipe.model.name_or_path} has none, so the model would not learn to "
            "stop; set model.eos_token to one of its tokens, or to a new one that model.add_tokens adds"
        )


def _ended(ids: list[int], trained: list[bool], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """With one trained EOS at the end, which the text, the tokenizer or both may have put there already."""
    end = tokenizer.eos_token_id
    present = sum(token == end for token in ids[-2:]) if ids[-1:] == [end] else 0
    kept = len(ids) - present
    return [*ids[:kept], end], [*trained[:kept], True]
