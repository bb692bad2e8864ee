"""A text to tokens, once, and which of them lie in the ranges that are trained."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distft.data.problems import RowProblem
from distft.train.chat.ranges import Range

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, ranges: Sequence[Range], add_special_tokens: bool = False
) -> tuple[list[int], list[bool]]:
    """The ids, and for each whether it has a character in one of the ranges.

    As in transformers, a token on the edge of a range is in it: a word's token may begin with the space that the
    generation prompt ends with.

    Raises:
        RowProblem: the tokenizer gives no positions (it is not a fast one) and joins the edge of a range with the text
            beside it.
    """
    if not tokenizer.is_fast:
        return _tokenize_slowly(tokenizer, text, ranges, add_special_tokens)
    encoding = backend(tokenizer).encode(text, add_special_tokens=add_special_tokens)
    trained = [False] * len(encoding)
    for start, end in ranges:
        # Only the edges are looked up: the offsets of all tokens would cost half as much again as tokenizing.
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        after = encoding.char_to_token(end) if end < len(text) else len(encoding)
        if add_special_tokens or first is None or last is None or after is None:  # or characters that are removed
            return encoding.ids, _by_offsets(encoding, text, ranges)
        after = max(after, last + 1)  # a character may be several tokens, and a token may go beyond the edge
        trained[first:after] = [True] * (after - first)
    return encoding.ids, trained


def backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer of a fast one, without the truncation and padding that its file may ask for."""
    found: Tokenizer = tokenizer.backend_tokenizer
    if found.truncation is not None:
        found.no_truncation()
    if found.padding is not None:
        found.no_padding()
    return found


def _by_offsets(encoding: Encoding, text: str, ranges: Sequence[Range]) -> list[bool]:
    offsets = encoding.offsets
    # Tokens that are added stand at no character, (0, 0): those at the end are after the text.
    first = next((n for n, (start, end) in enumerate(offsets) if end > start), len(offsets))
    offsets = [*offsets[:first], *(pair if pair[1] else (len(text), len(text)) for pair in offsets[first:])]
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    trained = [False] * len(offsets)
    for start, end in ranges:
        first, after = bisect_right(ends, start), bisect_left(starts, end)
        trained[first:after] = [True] * (after - first)
    return trained


def _tokenize_slowly(
    tokenizer: PreTrainedTokenizerBase, text: str, ranges: Sequence[Range], add_special_tokens: bool
) -> tuple[list[int], list[bool]]:
    """Tokenizers written in Python tell no positions: the text up to each edge is tokenized by itself."""

    def encode(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    ids = encode(text)
    trained = [False] * len(ids)
    for start, end in ranges:
        before, until = encode(text[:start]), encode(text[:end])
        if ids[: len(before)] != before or ids[: len(until)] != until:
            raise RowProblem(
                "mask-misaligned",
                "the tokenizer joins the edge of what is trained with the text beside it; use a fast tokenizer",
            )
        trained[len(before) : len(until)] = [True] * (len(until) - len(before))
    return ids, trained
