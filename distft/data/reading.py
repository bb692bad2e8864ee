"""Reading a recipe's data: its files, their rows, and what each is trained as. No torch.

    found = find_data(recipe.data)["train"]                     which files (sources.py)
    for _, batch, layout in batches(found, recipe.data):           rows, not parsed yet, and the format of their file
        for place, example in examples(batch, layout, Formatter.of(recipe.data), tally): ...
    tally.check("data.train", found)                            raises for all rows that do not fit

A batch, its layout and a Formatter can be sent to another process; the tallies of several are merged in the order of
the batches.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from distft.config.paths import HUB_PAGE, data_is_there, holds, locate_data
from distft.config.recipe import Data, Recipe, Source
from distft.config.schema_text import closest, did_you_mean
from distft.data.batches import Objects
from distft.data.conversations import FLAGS, MESSAGE_FIELDS, says_no
from distft.data.files import DataFile, Found, some
from distft.data.formats import Example, Formatter
from distft.data.hub import model_commit
from distft.data.hub import pinned as pinned_path
from distft.data.layouts import SAMPLE, Layout, find_layout
from distft.data.overlap import TRAINED, TRAINED_TEXT, TrainedRows, can_share_rows
from distft.data.problems import Problems, RowProblem, Summary, Untrained
from distft.data.readers import Batch, read_batches
from distft.data.sources import as_sources, find_data
from distft.errors import DataError
from distft.units import plural


@dataclass
class Tally:
    """What reading rows has found so far, to be printed."""

    rows: int = 0
    files: set[str] = field(default_factory=set)  # those that have rows
    fields: set[str] = field(default_factory=set)  # those that rows have
    unused: set[str] = field(default_factory=set)  # those that their format has no use for
    message_fields: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)  # those of data.ignore_fields that rows or their messages have
    kinds: set[str] = field(default_factory=set)  # of examples
    layouts: Counter[str] = field(default_factory=Counter)  # how many rows have each format
    untrained: Problems = field(default_factory=Problems)
    odd: Problems = field(default_factory=Problems)  # rows that are trained, and may not be meant
    problems: Problems = field(default_factory=Problems)

    def merge(self, later: Tally) -> None:
        """Add that of rows that come after these."""
        self.rows += later.rows
        self.files |= later.files
        self.fields |= later.fields
        self.unused |= later.unused
        self.message_fields |= later.message_fields
        self.ignored |= later.ignored
        self.kinds |= later.kinds
        self.layouts += later.layouts
        self.untrained.merge(later.untrained)
        self.odd.merge(later.odd)
        self.problems.merge(later.problems)

    def left_out(self) -> Summary:
        """The rows that say themselves that they are not to be trained."""
        return self.untrained.summary()

    def not_used(self) -> str:
        """The fields that nothing is made of, to be printed; "" where all are used."""
        more = self.message_fields - MESSAGE_FIELDS
        return "; ".join(
            [
                *([", ".join(sorted(self.unused))] if self.unused else []),
                *([f"in messages, unless the chat template prints them: {', '.join(sorted(more))}"] if more else []),
            ]
        )

    def check(self, what: str, found: Sequence[Found]) -> None:
        """Raises DataError for rows that do not fit, the first of each kind and how many there are, or for no rows."""
        if self.problems.counts:
            raise DataError("\n".join(self.problems.lines(what, self.rows)))
        if not self.rows:
            raise DataError(f"{what}: no rows in {some(self.empty(found))}")

    def notes(self, what: str, data: Data) -> list[str]:
        """What may not be meant, once all rows are read and fit: settings that change nothing for these rows."""
        if self.problems.counts or not self.rows:
            return []
        columns = {name: column for name, column in data.columns.items() if name not in ("role", "content")}
        notes = [
            f"data.columns: {name}: no row of {what} has {column}{did_you_mean(closest(column, list(self.fields)))}"
            for name, column in columns.items()
            if column not in self.fields
        ]
        if what != "data.train":  # whose rows may have what these have not
            return notes
        have = list(self.fields | self.message_fields)
        notes += [
            f"data.ignore_fields: no row has {name}{did_you_mean(closest(name, have))}"
            for name in data.ignore_fields
            if name not in self.ignored
        ]
        about_turns = {
            "chat_template": data.chat_template is not None,
            "train_on": data.train_on in ("last", "all_with_reasoning"),
            "roles": bool(data.roles),
        }
        if "messages" not in self.kinds:
            unused = [name for name, is_set in about_turns.items() if is_set]
            notes += [f"data.{name}: changes nothing: no row is trained as a conversation" for name in unused]
        return notes

    def empty(self, found: Sequence[Found]) -> list[str]:
        return [file.name for source in found for file in source.files if file.name not in self.files]


def batches(found: Sequence[Found], data: Data) -> Iterator[tuple[int, Batch, Layout]]:
    """All rows of the files, in order and not parsed yet, with the number of their source and the layout of their file.

    Raises:
        DataError: a file that cannot be read, or whose rows are in no known format.
    """
    for number, source in enumerate(found):
        for file in source.files:
            layout: Layout | None = None
            for batch in read_batches([file]):
                layout = layout or _layout(batch, data, file)
                yield number, batch, layout or Layout("text", {})  # no row of the batch can be read at all


class FirstRows:
    """The first rows of each file, at most `most` in all (None: all rows), in batches as above.

    Each source has the same share, and each of its files on this machine; what a file does not have is left to the
    others. Of a source on the hub, files are downloaded until its share is full. Once all is read, `is_whole` says
    whether these are all rows there are.
    """

    def __init__(self, found: Sequence[Found], data: Data, most: int | None):
        self.found, self.data = found, data
        self.left = sys.maxsize // 2 if most is None else most
        self.is_whole = True

    def __iter__(self) -> Iterator[tuple[int, Batch, Layout]]:
        more: list[tuple[int, Found, int]] = []  # what has more rows, and how many of them were read
        for number, source in enumerate(self.found):
            own = _share(self.left, len(self.found) - number)
            self.left -= own
            parts = _parts(source)
            for n, part in enumerate(parts):
                own -= yield from self._read(number, part, 0, _share(own, len(parts) - n), more)
            self.left += own
        while self.left and more:
            again, more = more, []
            for n, (number, part, read) in enumerate(again):
                self.left -= yield from self._read(number, part, read, _share(self.left, len(again) - n), more)
        self.is_whole = not more

    def _read(
        self, number: int, part: Found, skip: int, share: int, more: list[tuple[int, Found, int]]
    ) -> Generator[tuple[int, Batch, Layout], None, int]:
        """Yields no more rows than its share, after the first `skip`, and returns how many. It goes into `more` where
        others follow."""
        read, left = skip + share, share
        for _, batch, layout in batches([part], self.data):
            rows = list(islice(batch.rows(), skip + left + 1))
            rows, skip = rows[skip:], max(0, skip - len(rows))
            if rows[:left]:
                yield number, Objects(rows[:left]), layout
            if len(rows) > left:
                more.append((number, part, read))
                return share
            left -= len(rows)
        return share - left

    def which(self, count: int, of: str = "") -> str:
        """`the first 200 rows of text`, to be printed once all is read; `of` is what they are."""
        rows = plural(count, "row") + of
        parts = [len(_parts(source)) for source in self.found]
        if self.is_whole:
            return "all " * (count > 1) + rows
        if sum(parts) == 1:
            return f"the first {rows}"
        each = "file" if sum(parts) == sum(len(source.files) for source in self.found) else "source"
        return f"{rows}, the first of each {each}"


def _share(rows: int, number: int) -> int:
    return -(-rows // number)


def _parts(source: Found) -> list[Found]:
    """Each file on this machine; those on the hub together."""
    if any(file.path is None for file in source.files):
        return [source]
    return [replace(source, files=(file,)) for file in source.files]


def _layout(batch: Batch, data: Data, file: DataFile) -> Layout | None:
    rows = [(place, row) for place, row in islice(batch.rows(), SAMPLE) if not isinstance(row, RowProblem)]
    if not rows:
        return None
    try:
        layout = find_layout([row for _, row in rows], data.format, data.columns)
    except RowProblem as problem:
        header = (
            "; the first line of a CSV file must name the fields"
            if (file.kind, problem.kind) == ("csv", "format-unknown")
            else ""
        )
        raise DataError(f"{rows[0][0]}: {problem.text}{header}") from None
    return replace(layout, seen_at=next((place for place, row in rows if layout.has_needed(row)), ""))


def examples(
    batch: Batch, layout: Layout, formatter: Formatter, tally: Tally, trained: TrainedRows | None = None
) -> Iterator[tuple[str, Example]]:
    """The examples in a batch, with their place. Rows that do not fit are counted in `tally`.

    Args:
        trained: for rows of data.eval, those of data.train, where they may share some.
    """
    used = layout.fields() | formatter.ignored
    for number, (place, row) in enumerate(batch.rows()):
        if not number:
            tally.files.add(place.rpartition(":")[0])
        tally.rows += 1
        if not isinstance(row, RowProblem):
            tally.fields.update(row)
            if missing := formatter.ignored - tally.ignored:
                tally.ignored.update(_had(missing, row))
            tally.unused.update(name for name in row.keys() - used if not _is_flag(name, row[name]))
        try:
            example = formatter.example(row, layout)
        except Untrained as reason:
            tally.untrained.add(reason.kind, place, reason.text)
        except RowProblem as problem:
            tally.problems.add(problem.kind, place, problem.text)
        else:
            tally.layouts[str(layout)] += 1
            tally.kinds.add(example.kind)
            if example.kind == "messages":
                tally.message_fields.update(*example.fields["messages"])
                if not any(message["role"] == "user" for message in example.fields["messages"]):
                    tally.odd.add("no-user-turn", place, "without a user turn")
            if token := formatter.control_token(example):
                text = f"with the control token {token} within a message, which the model reads as one"
                tally.odd.add("control-token", place, text)
            if trained is not None and example.key() in trained:
                tally.odd.add(TRAINED, place, TRAINED_TEXT)
            yield place, example


def _had(names: Iterable[str], row: Mapping[str, Any]) -> Iterator[str]:
    """Those that a row or one of its messages has."""
    for name in names:
        for value in row.values():
            messages = value if isinstance(value, list) else ()
            in_text = isinstance(value, str) and f'"{name}"' in value  # a conversation as JSON
            if name in row or in_text or any(isinstance(one, dict) and name in one for one in messages):
                yield name
                break


def _is_flag(name: str, value: Any) -> bool:
    return name in FLAGS and says_no(name, value) is not None


def read_examples(
    found: Sequence[Found],
    data: Data,
    what: str,
    tally: Tally | None = None,
    rows: FirstRows | None = None,
    trained: TrainedRows | None = None,
) -> Iterator[tuple[str, Example]]:
    """All examples in the files, or those of the first rows, in order, in this process. `trained` as of examples().

    Raises:
        DataError: a file that cannot be read; at the end, rows that do not fit, or no rows.
    """
    tally = Tally() if tally is None else tally
    formatter = Formatter.of(data)
    for _, batch, layout in rows or batches(found, data):
        yield from examples(batch, layout, formatter, tally, trained)
    tally.check(what, found)


def is_absent(source: str) -> bool:
    """Whether a source is a path that is not on this machine."""
    return Path(source).is_absolute() and not holds(data_is_there, locate_data(Path("/"), source)[0])


def are_here(recipe: Recipe) -> bool:
    """Whether all local data of a recipe is on this machine."""
    return not any(
        is_absent(source.path) for value in (recipe.data.train, recipe.data.eval) for source in as_sources(value)
    )


def checked_whole(recipe: Recipe) -> list[str]:
    """The splits of which check_files looks at all sources."""
    sources = {"train": as_sources(recipe.data.train), "eval": as_sources(recipe.data.eval)}
    return [split for split, several in sources.items() if several and all(map(_is_here, several))]


def check_files(recipe: Recipe, most: int | None = None) -> list[str]:
    """Check the rows of the recipe's files that are on this machine. Hub data sets are checked when they are read.

    Returns what is read, what is left out, and in which format the rows are, to be printed.

    Args:
        most: how many rows of each split are checked; None for all.

    Raises:
        DataError: a path that stands for nothing, files that are both trained on and evaluated, rows that do not fit.
    """
    lines = []
    trained = TrainedRows() if can_share_rows(recipe.data) else None
    for use, found in find_data(recipe.data, _is_here).items():
        lines += [
            f"data.{use}: {source.path}: a data set of the hub, as nothing of that name is here"
            for source in as_sources(getattr(recipe.data, use))
            if not Path(source.path).is_absolute() and not HUB_PAGE.match(source.path)
        ]
        if not found:
            continue
        tally, what, rows = Tally(), f"data.{use}", FirstRows(found, recipe.data, most)
        for _, example in read_examples(found, recipe.data, what, tally, rows, trained if use == "eval" else None):
            if trained is not None and use == "train":
                trained.update((example.key(),))
            if recipe.data.long_rows == "split" and not example.can_split:
                raise DataError(
                    f"data.long_rows: split needs rows of text, and data.{use} has {example.kind}; use error, "
                    "truncate or drop"
                )
        lines += [f"{what}: {line}" for source in found for line in source.lines()]
        which = [rows.which(count, f" of {layout}").removeprefix("all ") for layout, count in tally.layouts.items()]
        lines += [f"{what}: {several}" for several in which]
        lines += [f"{what}: not used: {names}" for names in [tally.not_used()] if names]
        lines += [*left_out_lines(use, tally.left_out()), *odd_lines(use, tally.odd.summary())]
        if rows.is_whole:
            lines += empty_lines(use, tally.empty(found))
            lines += [f"warning: {note}" for note in tally.notes(what, recipe.data)]
    return lines


def left_out_lines(split: str, left_out: Summary) -> list[str]:
    """What Tally.left_out found, to be printed."""
    return [
        f"data.{split}: {plural(count, 'row')} left out ({kind}); the first: {place}: {text}"
        for kind, (count, place, text) in left_out.items()
    ]


def odd_lines(split: str, odd: Summary) -> list[str]:
    """What Tally.odd counted, to be printed."""
    return [
        f"warning: data.{split}: {plural(count, 'row')} {text}; the first: {place}"
        for count, place, text in odd.values()
    ]


def empty_lines(split: str, empty: Sequence[str]) -> list[str]:
    """What Tally.empty found, to be printed."""
    return [f"warning: data.{split}: no rows in {some(empty)}"] if empty else []


def _is_here(source: Source) -> bool:
    return Path(source.path).is_absolute() and not is_absent(source.path)


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with its model and every data set of the hub at the commit that their revision stands for now.

    Raises:
        DataError: a commit cannot be found out.
    """

    def pin(value: Any) -> Any:
        if isinstance(value, list):
            return [pin(source) for source in value]
        if isinstance(value, Source):
            return value.model_copy(update={"path": pin(value.path)})
        return pinned_path(value) if isinstance(value, str) and not Path(value).is_absolute() else value

    data, model = recipe.data, recipe.model
    if not Path(model.name_or_path).exists() and (commit := model_commit(model.name_or_path, model.revision)):
        model = model.model_copy(update={"revision": commit})
    return recipe.model_copy(
        update={"model": model, "data": data.model_copy(update={"train": pin(data.train), "eval": pin(data.eval)})}
    )
