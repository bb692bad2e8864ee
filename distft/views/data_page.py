"""`distft data` as a page of text: counts, a histogram of lengths, and rows with what is trained marked."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from typing import Any

import click

from distft.units import plural
from distft.views.summary import data_lines

BINS = 8
UNKNOWN_MIX = "what the mix takes of each source is known once all rows are read; --sample N reads more"
SHOWN_CHARACTERS = 2000  # of a row in a summary


def lines(found: dict[str, Any], width: int, coloured: bool, whole: bool) -> Iterator[str]:
    """The page, `width` columns wide; rows keep their own line breaks. `whole`: rows are not shortened."""
    for number, (split, report) in enumerate(found.items()):
        if number:
            yield ""
        if not whole:
            yield from _summary(split, report, width)
        for row in report["shown"]:
            if not whole:
                yield ""
            yield from _row(row, report, width, coloured, whole)


def _summary(split: str, report: dict[str, Any], width: int) -> Iterator[str]:
    which = report["which"] + ", more follow" * (not report["all_read"])
    elsewhere = f", {report['elsewhere']:,} of them in the other split" if report["elsewhere"] else ""
    elsewhere += ", before they are mixed" if report["mixed"] else ""
    yield from _wrapped(f"data.{split}: {which}{elsewhere}; {report['format'] or 'no format'}", width)
    for line in data_lines({split: report["counts"]}):
        yield from _wrapped(line, width)
    if report["mixed"] and not report["all_read"]:
        yield from _wrapped(f"data.{split}: {UNKNOWN_MIX}", width)
    if report["not_used"]:
        yield from _wrapped(f"data.{split}: not used: {report['not_used']}", width)
    yield from _histogram(report["lengths"], report["max_length"], width)


def _histogram(lengths: list[int], max_length: int, width: int) -> Iterator[str]:
    """How many documents are how long, in at most BINS bins of a round width."""
    if not lengths:
        return
    step = _round_up(max(lengths) / BINS)
    first = min(lengths) // step  # nothing is shorter
    counts = [0] * (max(lengths) // step + 1 - first)
    for length in lengths:
        counts[length // step - first] += 1
    names = [f"{n * step:,}-{(n + 1) * step - 1:,}" if step > 1 else str(n) for n in range(first, first + len(counts))]
    left, right = max(map(len, names)), max(len(f"{count:,}") for count in counts)
    room = max(8, min(60, width - left - right - 6))
    yield f"tokens of a document (data.max_length: {max_length:,})"
    for name, count in zip(names, counts, strict=True):
        bar = "█" * math.ceil(room * count / max(counts))
        yield f"  {name:>{left}}  {count:>{right},} {bar}".rstrip()


def _round_up(value: float) -> int:
    """To 1, 2 or 5 times a power of ten, at least 1."""
    power = 10 ** math.floor(math.log10(max(value, 1)))
    return int(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value))


def _row(row: dict[str, Any], report: dict[str, Any], width: int, coloured: bool, whole: bool) -> Iterator[str]:
    trained = sum(label >= 0 for label in row["labels"])
    note = ""
    if len(row["ids"]) > report["max_length"]:  # shown whole, as none of it is trained
        note = f", more than data.max_length ({report['max_length']:,}): {report['left_out']}"
    for line in _wrapped(f"{row['place']}: {plural(len(row['ids']), 'token')}, {trained:,} trained{note}", width):
        yield click.style(line, bold=True)
    mark = _green if coloured else _bracketed
    roles = " → ".join(mark(role) if is_trained else role for role, is_trained in row["roles"])
    yield from _wrapped(roles, width, "  ") if not coloured else [f"  {roles}"]
    pieces = row["pieces"] if whole else list(_shortened(row["pieces"]))
    yield "".join(mark(_printable(text)) if is_trained else _printable(text) for text, is_trained in pieces)


def _shortened(pieces: list[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """The beginning and the end of a long text."""
    total, position, half = sum(len(text) for text, _ in pieces), 0, SHOWN_CHARACTERS // 2
    if total <= SHOWN_CHARACTERS:
        yield from pieces
        return
    gap = f" … {total - 2 * half:,} characters … "
    for text, trained in pieces:
        head, tail = text[: max(0, half - position)], text[max(0, total - half - position) :]
        if head:
            yield head, trained
        if position + len(text) > half and gap:
            yield gap, False
            gap = ""
        if tail:
            yield tail, trained
        position += len(text)


def _printable(text: str) -> str:
    """With control characters as escapes: a row must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _green(text: str) -> str:
    """Each line by itself, so that pagers keep the colour."""
    return "\n".join(click.style(line, fg="green") if line else "" for line in text.split("\n"))


def _bracketed(text: str) -> str:
    return f"⟦{text}⟧"


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        max(40, width),
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
