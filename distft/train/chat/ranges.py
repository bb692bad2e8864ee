"""Which characters of a rendered conversation are trained."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property

from distft.data.problems import RowProblem
from distft.train.chat.habits import Habits
from distft.train.chat.messages import Message
from distft.train.chat.template import Rendered
from distft.train.chat.values import place, short

Range = tuple[int, int]


class TrainedRanges:
    """The ranges of each assistant's message of one rendered conversation."""

    def __init__(self, habits: Habits, messages: Sequence[Message], rendered: Rendered):
        self.habits = habits
        self.messages = messages
        self.rendered = rendered

    def of(self, index: int) -> list[Range]:
        """The characters of an assistant's message that are trained.

        Raises:
            RowProblem: turn-without-end, turns-not-separable, mask-misaligned.
        """
        return self._learned(index) if self.rendered.marks is None else self._marked(index)

    def _learned(self, index: int) -> list[Range]:
        """By the header and the end that the template gives such turns."""
        text, spans = self.rendered.text, self.rendered.spans.get(index)
        if not spans:
            return []
        start, end = spans[0]
        headers = {self.habits.header(self._role(index - 1)), self.habits.header("user")}
        fitting = [header for header in headers if header is not None and text.startswith(header, start)]
        if not fitting:
            raise RowProblem(
                "turns-not-separable",
                f"{place(self.messages, index)}: the turn begins in another way than others of this chat template, so "
                "what the assistant produces cannot be told; set data.chat_template to one with {% generation %} marks",
            )
        ranges = [(start + max(map(len, fitting)), end), *spans[1:]]
        start, end = ranges[-1]
        last = self._after_end(self.habits.ends, start, end)
        tail = self._tail(index, end, last is None)
        if last is not None:
            ranges[-1] = (start, last)
        else:
            # Some templates write the end when the next turn begins.
            begun = next((len(token) for token in self.habits.ends if text.startswith(token, end)), 0)
            within = self._after_end(self.habits.ends_within, start, end)
            if not begun and within is None and tail is None and not self._goes_on(index):
                raise self._endless(index)
            ranges[-1] = (start, end + begun if begun else within or end)
        if tail is not None:
            ranges.append((ranges[-1][1], tail))
        return [(start, end) for start, end in ranges if end > start]

    def _tail(self, index: int, end: int, is_open: bool) -> int | None:
        """Where the last turn ends in the text after all messages: that may be an eos_token, the end of a turn that
        is_open, or the next header whatever was asked for."""
        start, after, owner = self.rendered.owners[-1]
        if index != len(self.messages) - 1 or owner is not None or start != end:
            return None
        return self._after_end(self.habits.ends if is_open else {self._eos} & self.habits.ends, start, after)

    @property
    def _eos(self) -> str:
        return str(self.habits.template.tokenizer.eos_token or "")

    def _after_end(self, ends: Iterable[str], start: int, end: int) -> int | None:
        """The position after the last end token between two others, and after the line breaks that belong to it. (A
        space after it is left out: with most tokenizers it is one token with the next word.)"""
        text = self.rendered.text
        found = max((at + len(token) for token in ends if (at := text.rfind(token, start, end)) >= 0), default=None)
        if found is None:
            return None
        after = found
        while after < min(end, found + self.habits.line_breaks) and text[after] == "\n":
            after += 1
        return after

    def _goes_on(self, index: int) -> bool:
        """Whether the turn goes on in the next assistant message, which then has no header."""
        after = next((n for n in range(index + 1, len(self.messages)) if self._role(n) != "tool"), None)
        header = self.habits.header("user")
        return bool(
            after is not None
            and self._role(after) == "assistant"
            and header
            and not self.rendered.own(after).startswith(header)
        )

    def _marked(self, index: int) -> list[Range]:
        """By the template's `{% generation %}` blocks."""
        ranges = self._marks.get(index, [])
        own = "".join(self.rendered.text[start:end] for start, end in ranges).rstrip()
        if own and not own.endswith(tuple(self.habits.ends_within)) and not self._goes_on(index):
            raise self._endless(index)
        return ranges

    @cached_property
    def _marks(self) -> dict[int, list[Range]]:
        """The marks of each assistant message. A mark in text that belongs to no message, such as the eos_token after
        all turns, is of the message before it."""
        marks: dict[int, list[Range]] = {}
        owners = self.rendered.owners
        starts = [start for start, _, _ in owners]
        for start, end in self.rendered.marks or ():
            first, after = bisect_right(starts, start) - 1, bisect_left(starts, end)
            owned = [owner for _, _, owner in owners[first:after] if owner is not None]
            if not owned:
                owned = [next((o for _, _, o in reversed(owners[:first]) if o is not None), -1)]
            if len(owned) != 1 or self._role(owned[0]) != "assistant":
                where = place(self.messages, owned[-1]) if owned[-1] >= 0 else "messages"
                raise RowProblem(
                    "mask-misaligned",
                    f"{where}: a {{% generation %}} block of the chat template is around "
                    f"{short(self.rendered.text[start:end])}, which is not one assistant message; correct the block in "
                    "data.chat_template",
                )
            marks.setdefault(owned[0], []).append((start, end))
        return marks

    def _endless(self, index: int) -> RowProblem:
        if self.rendered.marks is not None:
            fix = "put {% endgeneration %} after the token that ends the turn"
        else:
            closing = self.habits.closing.strip()
            fix = f"set data.chat_template to {self.habits.other_template('writes one, such as eos_token')}" + (
                f", or model.eos_token to {closing!r} if that is one token" if closing else ""
            )
        return RowProblem(
            "turn-without-end",
            f"{place(self.messages, index)}: no token that ends the turn is trained after it, so the model would not "
            f"learn to stop; {fix}",
        )

    def _role(self, index: int) -> str | None:
        return str(self.messages[index]["role"]) if 0 <= index < len(self.messages) else None


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The ranges in order, those that touch as one."""
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
