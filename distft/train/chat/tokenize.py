"""Texts to tokens, and which of these lie in the ranges that are trained."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from distft.data.problems import RowProblem
from distft.train.chat.ranges import Range
from distft.train.chat.values import short

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[list[int], list[bool]]  # ids, and whether each is trained on
COMPARED = 200  # so many texts first, and then one in that many


class TokensDifferError(Exception):
    """fastokens and tokenizers do not give the same tokens."""


class Tokenization:
    """How texts become tokens: by the tokenizer itself, or quickly.

    tokenizers is by far the slowest step of preparing data. fastokens gives the same tokens of byte-pair encodings many
    times as fast, and no positions.

    Attributes:
        notes: what is worth knowing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._quick: Any = None
        self._count = 0
        self.notes: list[str] = []

    def speed_up(self) -> None:
        """Use fastokens from now on, where it is installed and takes this tokenizer. What it gives is compared with the
        tokenizer's tokens, for the first texts and then for a few of them."""
        if not self.tokenizer.is_fast or self.notes:
            return
        os.environ["FASTOKENS_BPE_THREADS"] = "1"  # threads would not survive a fork
        try:
            import fastokens

            self._quick = fastokens.Tokenizer.from_json_str(backend(self.tokenizer).to_str())
        except (ImportError, ValueError):  # the latter: a kind of tokenizer that it does not know
            self._quick = None

    def slow_down(self, text: str) -> None:
        """Never use fastokens: it gives other tokens for this text."""
        self._quick = None
        self.notes = [
            f"fastokens and tokenizers give different tokens for {short(text)}; the slower tokenizers is used"
        ]

    def ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text.

        Raises:
            TokensDifferError
        """
        if self._quick is None:
            return self._slow_ids(text, add_special_tokens)
        ids = list(self._quick.encode(text, add_special_tokens).ids)
        if self._is_compared() and ids != self._slow_ids(text, add_special_tokens):
            raise TokensDifferError(text)
        return ids

    def _slow_ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def marked(self, text: str, ranges: Sequence[Range], add_special_tokens: bool = False) -> Tokens:
        """The tokens of a text, and for each whether it has a character in one of the ranges.

        As in transformers, a token on the edge of a range is in it: a word's token may begin with the space that the
        generation prompt ends with.

        Raises:
            RowProblem: the tokenizer gives no positions (it is not a fast one) and joins the edge of a range with the
                text beside it.
            TokensDifferError
        """
        quick = None if self._quick is None or add_special_tokens else self._by_pieces(text, ranges)
        if quick is None or self._is_compared():
            slow = self._by_positions(text, ranges, add_special_tokens)
            if quick is not None and quick != slow:
                raise TokensDifferError(text)
            return slow
        return quick

    def _is_compared(self) -> bool:
        self._count += 1
        return self._count <= COMPARED or self._count % COMPARED == 0

    def _by_pieces(self, text: str, ranges: Sequence[Range]) -> Tokens | None:
        """By tokenizing the text up to and from each edge as well: None where an edge is within a token."""
        ids: list[int] = list(self._quick.encode(text, False).ids)
        edges = sorted({0, *chain.from_iterable(ranges), len(text)})
        starts = {start for start, _ in ranges}
        pieces: list[int] = []
        trained: list[bool] = []
        for start, end in pairwise(edges):
            piece = self._quick.encode(text[start:end], False).ids
            pieces += piece
            trained += [start in starts] * len(piece)
        return (ids, trained) if pieces == ids else None

    def _by_positions(self, text: str, ranges: Sequence[Range], add_special_tokens: bool) -> Tokens:
        if not self.tokenizer.is_fast:
            return self._by_beginnings(text, ranges, add_special_tokens)
        encoding = backend(self.tokenizer).encode(text, add_special_tokens=add_special_tokens)
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

    def _by_beginnings(self, text: str, ranges: Sequence[Range], add_special_tokens: bool) -> Tokens:
        """Tokenizers written in Python tell no positions: the text up to each edge is tokenized by itself."""
        ids = self._slow_ids(text, add_special_tokens)
        trained = [False] * len(ids)
        for start, end in ranges:
            before, until = (self._slow_ids(text[:edge], add_special_tokens) for edge in (start, end))
            if ids[: len(before)] != before or ids[: len(until)] != until:
                raise RowProblem(
                    "mask-misaligned",
                    "the tokenizer joins the edge of what is trained with the text beside it; use a fast tokenizer",
                )
            trained[len(before) : len(until)] = [True] * (len(until) - len(before))
        return ids, trained


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
