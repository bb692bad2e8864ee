"""A text to tokens, once, and which of them lie in the ranges that are trained."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distft.data.problems import RowProblem
from distft.train.chat.ranges import Range

if TYPE_CHECKING:
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
    encoding = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
    if add_special_tokens:  # those that are added stand at no character: (0, 0) at either end
        first = next((n for n, (start, end) in enumerate(offsets) if end > start), len(ids))
        offsets = [*offsets[:first], *(pair if pair[1] else (len(text), len(text)) for pair in offsets[first:])]
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    trained = [False] * len(ids)
    for start, end in ranges:
        first, after = bisect_right(ends, start), bisect_left(starts, end)
        trained[first:after] = [True] * (after - first)
    return ids, trained


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
