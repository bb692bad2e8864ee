"""Rows to the documents that are trained, in parallel processes, in the order of the rows and in bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import numpy

from distft.config.recipe import Recipe
from distft.data.formats import IGNORE, Example, Formatter
from distft.data.layouts import Layout
from distft.data.overlap import TrainedRows, can_share_rows
from distft.data.problems import SHOWN, RowProblem, Summary
from distft.data.readers import Batch
from distft.data.reading import Tally, examples
from distft.data.sources import Use
from distft.errors import DataError, RunError
from distft.runs.processes import die_with_parent
from distft.train.chat import Document, Tokenization, Tokens
from distft.train.chat.habits import any_of
from distft.train.chat.values import THOUGHT_MARKS
from distft.train.documents import Encoded
from distft.train.tokens import Encoder, encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Work = tuple[int, Batch, Layout]  # of the source with this number
Answer = tuple[int, "dict[Use, tuple[Encoded, Counts]]", Tally, "array[int]"]


@dataclass
class Counts:
    """What became of the rows of one split."""

    documents: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    long_rows: int = 0
    can_split: bool = True  # whether data.long_rows: split could be done to all of them
    longest: int = 0
    done: str = ""  # what was done to the long rows
    examples: list[tuple[str, int]] = field(default_factory=list)  # the first long rows: their place and length
    cut_answers: int = 0  # long rows that are not trained at all: what is left of them has no token to train on
    cut_examples: list[str] = field(default_factory=list)
    thoughtless: int = 0  # the assistant's turns whose thought the chat template removes
    thoughtless_done: str = ""  # what was done to them
    notes: list[str] = field(default_factory=list)  # what is worth knowing of the tokenizer and its chat template
    new_tokens: list[str] = field(default_factory=list)  # those of model.add_tokens that are in a row
    layouts: dict[str, int] = field(default_factory=dict)  # rows by their format
    untrained: Summary = field(default_factory=dict)  # rows that say so
    odd: Summary = field(default_factory=dict)  # rows that may not be meant
    empty: list[str] = field(default_factory=list)  # files without rows
    mix: list[tuple[str, int, int]] = field(default_factory=list)  # of each source: its path, its rows, and those taken

    @classmethod
    def of(cls, recipe: Recipe) -> Counts:
        """Those of no row yet."""
        done = {"truncate": "cut off", "drop": "left out", "split": "split"}.get(recipe.data.long_rows, "")
        return cls(
            done=done,
            thoughtless_done="trained without it" if recipe.data.train_on == "everything" else "not trained",
        )

    def merge(self, later: Counts) -> None:
        """Add those of rows that come after these."""
        for name in ("documents", "rows", "tokens", "trained_tokens", "long_rows", "cut_answers", "thoughtless"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.can_split = self.can_split and later.can_split
        self.longest = max(self.longest, later.longest)
        self.examples = [*self.examples, *later.examples][:SHOWN]
        self.cut_examples = [*self.cut_examples, *later.cut_examples][:SHOWN]
        self.new_tokens = sorted({*self.new_tokens, *later.new_tokens})
        self.notes = list(dict.fromkeys([*self.notes, *later.notes]))

    def unseen(self, recipe: Recipe) -> list[str]:
        """A note on tokens of model.add_tokens, where no row of data.train has them."""
        left = [token for token in recipe.model.add_tokens if token not in self.new_tokens]
        return (
            [f"model.add_tokens: no row of data.train has {', '.join(left)}: nothing is learned of it"] if left else []
        )

    def add(self, labels: list[int]) -> None:
        """Count a document."""
        self.documents += 1
        self.tokens += len(labels)
        self.trained_tokens += len(labels) - labels.count(IGNORE)


class RowEncoder:
    """Encodes rows as a recipe says. With `held_out`, a fraction of them goes to the evaluation data."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase):
        self.recipe = recipe
        self.tokenization = Tokenization(tokenizer)
        self.formatter = Formatter.of(recipe.data, bool(tokenizer.chat_template), _control_tokens(tokenizer))
        self.held_out = recipe.data.eval if isinstance(recipe.data.eval, float) else 0.0
        self.can_share_rows = can_share_rows(recipe.data)
        self.trained: TrainedRows | None = None  # for rows of data.eval, those of data.train, where they may share some
        self._encoders: dict[str, Encoder] = {}
        self.new_tokens = {tokenizer.convert_tokens_to_ids(token): token for token in recipe.model.add_tokens}

    def of(self, example: Example) -> Encoder:
        """What encodes examples of this kind.

        Raises:
            DataError: the tokenizer cannot encode them, or data.long_rows cannot be done to them.
        """
        kind = example.kind
        if kind not in self._encoders:
            if self.recipe.data.long_rows == "split" and not example.can_split:
                raise DataError(
                    f"data.long_rows: split needs rows of text, and got {kind}; use error, truncate or drop"
                )
            self._encoders[kind] = encoder(kind, self.tokenization, self.recipe)
        return self._encoders[kind]

    def documents(
        self, place: str, example: Example, counts: Counts, lengths: list[int] | None = None
    ) -> Iterator[tuple[list[int], list[int], Document]]:
        """Ids and labels of the documents that a row becomes, and each whole. They are counted in `counts`.

        Args:
            lengths: gets those of whole documents, in tokens.

        Raises:
            RowProblem: the row would not be trained as it is meant.
        """
        limit = self.recipe.data.max_length
        for document in self.of(example).encode(example.fields):
            counts.thoughtless += len(document.left_out)
            if lengths is not None:
                lengths.append(len(document.ids))
            counts.can_split = counts.can_split and (example.can_split or len(document.ids) <= limit)
            for ids, trained in fit(place, (document.ids, document.trained), self.recipe, counts):
                labels = labels_of(ids, trained)
                counts.add(labels)
                if found := self.new_tokens.keys() & set(ids) if self.new_tokens else None:
                    counts.new_tokens = sorted({*counts.new_tokens, *(self.new_tokens[token] for token in found)})
                yield ids, labels, document

    def notes(self) -> list[str]:
        """Of the tokenizer and its chat template, as far as they were used."""
        return [*self.tokenization.notes, *(note for one in self._encoders.values() for note in one.notes)]

    def encode(self, work: Work) -> Answer:
        """The number of the source, what is trained and what is held out, what was found in the rows, and the keys of
        rows of data.train with which those of data.eval are to be compared."""
        number, batch, layout = work
        tally, keys, has_keys = Tally(), array("Q"), self.can_share_rows and self.trained is None
        parts: dict[Use, Part] = {"train": Part(), "eval": Part()}
        for row, (place, example) in enumerate(examples(batch, layout, self.formatter, tally, self.trained)):
            if has_keys:
                keys.append(example.key())
            use: Use = "eval" if self.held_out and example.is_held_out(self.held_out) else "train"
            try:
                for ids, labels, _ in self.documents(place, example, parts[use].counts):
                    parts[use].add(row, ids, labels)
            except RowProblem as problem:
                tally.problems.add(problem.kind, place, problem.text)
        parts["train"].counts.notes = self.notes()
        return number, {use: (part.encoded(), part.counts) for use, part in parts.items()}, tally, keys


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches them, but for the marks of a thought, which people write into what the assistant says."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return any_of(special.difference(chain.from_iterable(THOUGHT_MARKS)))


class Part:
    """The documents of some rows that belong to one split."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.rows: list[int] = []
        self.ids: list[list[int]] = []
        self.labels: list[list[int]] = []

    def add(self, row: int, ids: list[int], labels: list[int]) -> None:
        self.rows.append(row)
        self.ids.append(ids)
        self.labels.append(labels)

    def encoded(self) -> Encoded:
        lengths = numpy.fromiter(map(len, self.ids), numpy.int64, len(self.ids))
        total = int(lengths.sum())
        ids, labels = (
            numpy.fromiter(chain.from_iterable(side), numpy.int32, total) for side in (self.ids, self.labels)
        )
        return Encoded(ids, labels, lengths, numpy.array(self.rows, numpy.int64))


def processes() -> int:
    """How many encode: all cores that this process may use but one, which reads and writes."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def encode_all(work: Iterable[Work], rows: RowEncoder) -> Iterator[Answer]:
    """Encode all rows, a batch at a time and in order.

    The first batch is encoded here. For more, processes are forked, which find what was learnt from it: the tokenizer,
    the chat template's habits. No more batches are read than they are busy with.

    Raises:
        DataError: the tokenizer cannot encode such rows.
        TokensDifferError: it cannot be sped up.
        RunError: a process was killed.
    """
    batches = iter(work)
    for first in batches:
        yield rows.encode(first)
        break
    second = next(batches, None)
    if second is None:
        return
    if len(os.sched_getaffinity(0)) == 1:
        yield from map(rows.encode, chain([second], batches))
        return
    number = processes()
    # Each process tokenizes one text at a time; threads of the tokenizer's own would not survive the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("fork"), _start, (rows,))
    waiting: deque[Future[Answer]] = deque()
    try:
        for batch in chain([second], batches):
            waiting.append(pool.submit(_encode, batch))
            if len(waiting) > 2 * number:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RunError("a process that prepares the data was killed; out of memory, perhaps") from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: list[RowEncoder] = []  # of a forked process


def _start(rows: RowEncoder) -> None:
    """First in a forked process."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its processes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rows.tokenization.speed_up()  # in each process its own: the one that reads and writes has no use for it
    _encoder.append(rows)


def _encode(work: Work) -> Answer:
    return _encoder[0].encode(work)


def labels_of(ids: list[int], trained: list[bool]) -> list[int]:
    """The labels of a document: its trained tokens, IGNORE elsewhere.

    Its first token cannot be predicted: nothing comes before it. In a packed row, the model would learn to guess it
    from the document before.
    """
    labels = [IGNORE] * len(ids)
    flags = [False, *trained[1:], False, True]  # both are found after the last token
    end = 0
    while (start := flags.index(True, end)) < len(ids):
        end = flags.index(False, start)
        labels[start:end] = ids[start:end]
    return labels


def fit(place: str, tokens: Tokens, recipe: Recipe, counts: Counts) -> Iterator[Tokens]:
    """A row as one document of at most max_length tokens, as several (`split`), or as none (`drop`).

    Raises:
        RowProblem: the row fits, and none of its tokens is trained on.
    """
    ids, trained = tokens
    limit, how = recipe.data.max_length, recipe.data.long_rows
    if len(ids) > limit:
        counts.long_rows += 1
        counts.longest = max(counts.longest, len(ids))
        if len(counts.examples) < SHOWN:
            counts.examples.append((place, len(ids)))
        if how in ("drop", "error"):
            return
        if how == "split":
            for start in range(0, len(ids), limit):
                if len(ids) - start > 1:  # from a single token nothing is predicted
                    yield ids[start : start + limit], trained[start : start + limit]
            return
        ids, trained = ids[:limit], trained[:limit]
        if not any(trained[1:]):
            counts.cut_answers += 1
            if len(counts.cut_examples) < SHOWN:
                counts.cut_examples.append(place)
            return
    if any(trained[1:]):
        yield ids, trained
    else:
        raise RowProblem("no-trained-token", "no token to train on")
