"""`python -m distft.train.show_rows RECIPE ANSWER [--eval] [--row N | --sample N]`: rows as they are trained, as JSON.

What it writes into the file ANSWER: {"train": SPLIT, "eval": SPLIT} (without eval where the recipe has none; with --row
one of the two), or {"error": text, "no_tokenizer": bool}. A SPLIT has the fields of SplitReport.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from distft.config.recipe import Recipe
from distft.data.batches import Objects, Row
from distft.data.files import Found
from distft.data.formats import IGNORE, Example
from distft.data.layouts import Layout
from distft.data.mixing import is_mix, taken
from distft.data.overlap import TrainedRows
from distft.data.problems import Problems, RowProblem
from distft.data.reading import FirstRows, Tally, batches, examples
from distft.data.sources import Use, find_data
from distft.errors import DataError, DistftError, NoTokenizerError
from distft.train import worker
from distft.train.chat import Document
from distft.train.data import check_left, check_lengths
from distft.train.encoding import Counts, RowEncoder, labels_of
from distft.train.tokens import load_tokenizer
from distft.units import plural

SHOWN_ROWS = 2  # of a sample


@dataclass
class ShownRow:
    """A document as it is trained.

    `pieces` are its text as the tokens spell it, cut where training begins and ends: (text, whether it is trained).
    `roles` are what the template printed, in order: (role, whether any of it is trained). Long rows are shown as
    data.long_rows leaves them; with --row, one that is left out or refused is shown whole.
    """

    place: str
    ids: list[int]
    labels: list[int]
    pieces: list[tuple[str, bool]]
    roles: list[tuple[str, bool]]


@dataclass
class SplitReport:
    """What becomes of the rows of a split. Lengths are those of whole documents, in tokens."""

    format: str = ""
    not_used: str = ""  # fields that nothing is made of
    read: int = 0  # rows
    elsewhere: int = 0  # of them, those of the other split, where data.eval is a fraction
    which: str = ""  # which of the split's rows those are, to be printed
    all_read: bool = True  # whether all
    lengths: list[int] = field(default_factory=list)
    max_length: int = 0
    mixed: bool = False  # whether the training takes more or fewer of a source's rows; here each counts once
    counts: dict[str, Any] = field(default_factory=dict)
    left_out: str = ""  # why the row of --row is not trained
    problems: list[str] = field(default_factory=list)
    shown: list[ShownRow] = field(default_factory=list)


class _Reader:
    """Encodes rows of one split."""

    def __init__(self, rows: RowEncoder, found: Sequence[Found], split: Use, trained: TrainedRows):
        self.rows, self.found, self.split, self.trained = rows, found, split, trained
        self.recipe = rows.recipe
        self.what = f"data.{split}"
        self.is_held_out = split == "eval" and rows.held_out > 0  # the split is what is held out of data.train

    def row(self, number: int) -> SplitReport:
        """The row of this number, counted from 1: of data.train among all its rows, held out or not.

        Raises:
            DataError: there is no such row, or it does not fit.
        """
        wanted = next(islice(self._rows(), number - 1, None), None)
        if wanted is None:
            total = plural(sum(1 for _ in self._rows()), "row")
            raise DataError(f"--row: got {number}, and {self.what} has {total}")
        (place, row), layout = wanted
        report, counts = self._report(), Counts.of(self.recipe)
        report.all_read, report.format = False, str(layout)
        try:
            example = self.rows.formatter.example(row, layout)
            where = f"{place} (held out)" if self._holds_out(example) else place
            report.shown = list(self._shown(where, example, report, counts)) or list(self._whole(where, example))
        except RowProblem as problem:
            raise DataError(f"{place}: {problem.text}") from None
        report.read, report.counts = 1, _counted(counts)
        if not counts.documents:
            report.left_out = "left out" if counts.done else "refused by launch (data.long_rows: error)"
            report.left_out += ", with all that is trained cut off" if counts.cut_answers else ""
        return report

    def sample(self, size: int) -> SplitReport:
        """The first rows of each file, `size` in all. Their problems are in the report."""
        report, counts, first = self._report(), Counts.of(self.recipe), FirstRows(self.found, self.recipe.data, size)
        tally, own = Tally(), Tally()  # of all rows that are read, and of those of this split
        have = [0] * len(self.found)  # rows of each source that are trained
        seen = set[str]()  # the formats of files, whether their rows fit or not
        for number, batch, layout in first:
            seen |= {str(layout)} if layout.seen_at else set()
            for place, example in examples(batch, layout, self.rows.formatter, tally, self._compared()):
                if self.rows.can_share_rows and self.split == "train":
                    self.trained.update((example.key(),))
                if self.rows.held_out and self._holds_out(example) != self.is_held_out:
                    report.elsewhere += 1
                    continue
                try:
                    shown = list(self._shown(place, example, report, counts))
                except RowProblem as problem:
                    own.problems.add(problem.kind, place, problem.text)
                    continue
                report.shown += shown[: SHOWN_ROWS - len(report.shown)]
                have[number] += bool(shown)
        report.read, report.all_read, report.which = tally.rows, first.is_whole, first.which(tally.rows)
        if report.mixed and report.all_read:
            counts.mix = taken([one.source for one in self.found], have)
        report.format, report.not_used = ", ".join(tally.layouts or sorted(seen)), tally.not_used()
        counts.layouts, counts.notes = dict(tally.layouts), self.rows.notes()
        if self.is_held_out:  # what concerns all rows is in the report of data.train
            tally.problems = Problems()
        else:
            counts.untrained, counts.odd = tally.left_out(), tally.odd.summary()
            if report.all_read:
                counts.empty = tally.empty(self.found)
                counts.notes += tally.notes(self.what, self.recipe.data)
                if self.split == "train":
                    counts.notes += counts.unseen(self.recipe)
        report.counts = _counted(counts)
        tally.problems.merge(own.problems)
        try:
            tally.check(self.what, self.found)
            check_lengths(self.recipe, self.what, counts)
            if report.all_read:
                check_left(self.recipe, self.what, counts, tally.rows)
        except DataError as error:
            report.problems = str(error).splitlines()
        return report

    def _compared(self) -> TrainedRows | None:
        return self.trained if self.rows.can_share_rows and self.split == "eval" else None

    def _rows(self) -> Iterator[tuple[Row, Layout]]:
        """Those that --row counts."""
        for row, layout in self._read():
            read = examples(Objects([row]), layout, self.rows.formatter, Tally()) if self.is_held_out else []
            if not self.is_held_out or any(self._holds_out(example) for _, example in read):
                yield row, layout

    def _read(self) -> Iterator[tuple[Row, Layout]]:
        for _, batch, layout in batches(self.found, self.recipe.data):
            for row in batch.rows():
                yield row, layout

    def _report(self) -> SplitReport:
        mixed = self.split == "train" or not self.rows.held_out
        mixed = mixed and is_mix([one.source for one in self.found])
        return SplitReport(max_length=self.recipe.data.max_length, mixed=mixed)

    def _holds_out(self, example: Example) -> bool:
        return self.rows.held_out > 0 and example.is_held_out(self.rows.held_out)

    def _shown(self, place: str, example: Example, report: SplitReport, counts: Counts) -> Iterator[ShownRow]:
        for ids, labels, document in self.rows.documents(place, example, counts, report.lengths):
            yield self._shown_row(place, ids, labels, document)

    def _whole(self, place: str, example: Example) -> Iterator[ShownRow]:
        """A row that is too long to be trained, as it would be if max_length were larger."""
        for document in self.rows.of(example).encode(example.fields):
            yield self._shown_row(place, document.ids, labels_of(document.ids, document.trained), document)

    def _shown_row(self, place: str, ids: list[int], labels: list[int], document: Document) -> ShownRow:
        return ShownRow(place, ids, labels, list(self._pieces(ids, labels)), list(_roles(document)))

    def _pieces(self, ids: list[int], labels: list[int]) -> Iterator[tuple[str, bool]]:
        """The text between the edges of what is trained.

        Each piece is what it adds to the text before it: decoded by itself, it would lose the space before a word.
        """
        before, start = "", 0
        for end in range(1, len(ids) + 1):
            trained = labels[start] != IGNORE
            if end == len(ids) or (labels[end] != IGNORE) != trained:
                text = str(self.rows.tokenization.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
                yield text[len(before) :], trained
                before, start = text, end


def _counted(counts: Counts) -> dict[str, Any]:
    """Nothing is packed here: each document is a row."""
    return asdict(counts) | {"rows": counts.documents}


def _roles(document: Document) -> Iterator[tuple[str, bool]]:
    """The roles in order, once per run of their text, without the template's own text between them."""
    last: tuple[str, bool] | None = None
    for span in document.spans:
        if not span.role:
            continue
        if last and last[0] == span.role:
            last = (span.role, last[1] or span.trained)
            continue
        if last:
            yield last
        last = (span.role, span.trained)
    if last:
        yield last


def show(recipe: Recipe, splits: Sequence[Use], row: int | None, sample: int) -> dict[str, Any]:
    """The answer: of these splits, as far as the recipe has them.

    Raises:
        DataError: the tokenizer or the data cannot be used, or the recipe has none of the splits.
    """
    rows, found = RowEncoder(recipe, load_tokenizer(recipe)), find_data(recipe.data)
    if rows.held_out:
        found["eval"] = found["train"]
    trained = TrainedRows()
    readers = [_Reader(rows, found[use], use, trained) for use in splits if found[use]]
    if not readers:
        raise DataError("--eval: the recipe has no data.eval; name data, or hold some out: data.eval: 0.05")
    return {reader.split: asdict(reader.sample(sample) if row is None else reader.row(row)) for reader in readers}


def main() -> int:
    """See the module."""
    from distft.config.loading import DATA_FILES, load_recipe

    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("answer", type=Path)
    parser.add_argument("--eval", action="store_true")
    parser.add_argument("--row", type=int)
    parser.add_argument("--sample", type=int, default=1000)
    arguments = parser.parse_args()
    try:
        recipe = load_recipe(arguments.recipe, needed=DATA_FILES)
        with worker.importing():
            from transformers import AutoTokenizer  # noqa: F401
        splits: list[Use] = ["eval"] if arguments.eval else ["train"] if arguments.row else ["train", "eval"]
        answer = show(recipe, splits, arguments.row, arguments.sample)
    except DistftError as error:
        answer = {"error": str(error), "no_tokenizer": isinstance(error, NoTokenizerError)}
    arguments.answer.write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
