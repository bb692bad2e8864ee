"""`python -m distft.train.show_rows RECIPE ANSWER [--row N | --sample N]`: rows as they are trained, as JSON.

What it writes into the file ANSWER: {"train": SPLIT, "eval": SPLIT} (without eval where the recipe has none, or with
--row), or {"error": text}. A SPLIT has the fields of SplitReport.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.config.recipe import Recipe
from distft.data import rows
from distft.errors import DataError, DistftError
from distft.train import worker
from distft.train.chat import Document, RowProblem
from distft.train.data import IGNORE, Counts, check_lengths, check_supported, fit, labels_of
from distft.train.problems import Problems
from distft.train.tokens import Encoder, encoder, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_ROWS = 2  # of a sample


@dataclass
class ShownRow:
    """A document as it is trained.

    `pieces` are its text as the tokens spell it, cut where training begins and ends: (text, whether it is trained).
    `roles` are what the template printed, in order: (role, whether any of it is trained). Long rows are shown as
    data.long_rows leaves them; with --row, one that is not trained at all is shown whole.
    """

    place: str
    ids: list[int]
    labels: list[int]
    pieces: list[tuple[str, bool]]
    roles: list[tuple[str, bool]]


@dataclass
class SplitReport:
    """What becomes of the rows of a split. Lengths are those of whole documents, in tokens."""

    format: str
    read: int = 0  # rows
    all_read: bool = True  # whether those are all rows of the split
    lengths: list[int] = field(default_factory=list)
    max_length: int = 0
    counts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    shown: list[ShownRow] = field(default_factory=list)


class _Reader:
    """Encodes rows of one split."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, split: str):
        self.recipe, self.tokenizer = recipe, tokenizer
        self.what = f"data.{split}"
        self.sources = rows.to_read(recipe, "train" if split == "train" else "eval")
        chosen = recipe.data.format
        self.format = rows.first_format(self.sources) if chosen == "auto" else chosen
        self.encoder: Encoder = encoder(self.format, tokenizer, recipe)

    def row(self, number: int) -> SplitReport:
        """The row of this number, counted from 1.

        Raises:
            DataError: there is no such row, or it does not fit.
        """
        report = SplitReport(self.format, max_length=self.recipe.data.max_length)
        found = next(islice(rows.read_rows(self.sources), number - 1, None), None)
        if found is None:
            total = sum(1 for _ in rows.read_rows(self.sources))
            raise DataError(f"--row: got {number}, and {self.what} has {total} rows")
        place, row = found
        if misfit := rows.problem(row, self.format):
            raise DataError(f"{place}: {misfit}")
        counts = self._counts()
        try:
            report.shown = list(self._shown(place, row, report, counts)) or list(self._whole(place, row))
        except RowProblem as problem:
            raise DataError(f"{place}: {problem.text}") from None
        report.read, report.counts = 1, asdict(counts)
        report.all_read = False
        return report

    def sample(self, size: int) -> SplitReport:
        """The first `size` rows. Their problems are in the report."""
        report = SplitReport(self.format, max_length=self.recipe.data.max_length)
        counts, problems, stream = self._counts(), Problems(), rows.read_rows(self.sources)
        for place, row in islice(stream, size):
            report.read += 1
            if misfit := rows.problem(row, self.format):
                problems.add("row", place, misfit)
                continue
            try:
                shown = list(self._shown(place, row, report, counts))
            except RowProblem as problem:
                problems.add(problem.kind, place, problem.text)
                continue
            report.shown += shown[: SHOWN_ROWS - len(report.shown)]
        report.all_read = next(stream, None) is None
        report.counts = asdict(counts)
        if problems.counts:
            report.problems = problems.lines(self.what, report.read)
        if not report.read:
            report.problems = [f"{self.what}: no rows"]
        elif not problems.counts:
            try:
                check_lengths(self.recipe, self.format, self.what, counts)
            except DataError as error:
                report.problems = str(error).splitlines()
        return report

    def _counts(self) -> Counts:
        return Counts.of(self.recipe, self.encoder.notes)

    def _shown(self, place: str, row: Any, report: SplitReport, counts: Counts) -> Iterator[ShownRow]:
        for document in self.encoder.encode(row):
            report.lengths.append(len(document.ids))
            counts.thoughtless += len(document.left_out)
            for ids, trained in fit(place, (document.ids, document.trained), self.recipe, counts):
                labels = labels_of(ids, trained)
                counts.add(labels)
                yield self._shown_row(place, ids, labels, document)

    def _whole(self, place: str, row: Any) -> Iterator[ShownRow]:
        """A row that is too long to be trained, as it would be if max_length were larger."""
        for document in self.encoder.encode(row):
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
                text = str(self.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
                yield text[len(before) :], trained
                before, start = text, end


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


def show(recipe: Recipe, row: int | None, sample: int) -> dict[str, Any]:
    """The answer.

    Raises:
        DataError: the tokenizer or the data cannot be used.
    """
    check_supported(recipe)
    tokenizer = load_tokenizer(recipe)
    if row is not None:
        return {"train": asdict(_Reader(recipe, tokenizer, "train").row(row))}
    splits = ["train", *(["eval"] if recipe.data.eval else [])]
    return {split: asdict(_Reader(recipe, tokenizer, split).sample(sample)) for split in splits}


def main() -> int:
    """See the module."""
    from distft.config.loading import DATA_FILES, load_recipe

    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("answer", type=Path)
    parser.add_argument("--row", type=int)
    parser.add_argument("--sample", type=int, default=1000)
    arguments = parser.parse_args()
    try:
        recipe = load_recipe(arguments.recipe, needed=DATA_FILES)
        with worker.importing():
            from transformers import AutoTokenizer  # noqa: F401
        answer = show(recipe, arguments.row, arguments.sample)
    except DistftError as error:
        answer = {"error": str(error)}
    arguments.answer.write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
