"""One conversation through its template: which characters are trained, and what the template took away."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.data.problems import RowProblem
from distft.train.chat.checks import Checks
from distft.train.chat.habits import Habits
from distft.train.chat.messages import REASONING, Message
from distft.train.chat.ranges import Range, TrainedRanges, joined
from distft.train.chat.template import Rendered, TemplateRefuses
from distft.train.chat.values import Lost, place


@dataclass(frozen=True)
class Turns:
    """A rendered conversation, the (start, end) characters that are trained, and the wanted assistant messages that are
    not, because the template took their thought away: index → what was lost."""

    rendered: Rendered
    ranges: list[Range]
    thoughtless: dict[int, Lost]


class Conversation:
    """Args:
    habits: what is known of the template.
    messages: without flags.
    fields: tools and documents, where the row has them.
    """

    def __init__(self, habits: Habits, messages: Sequence[Message], fields: Mapping[str, Any]):
        self.habits = habits
        self.messages = list(messages)
        self.fields = dict(fields)

    def turns(self, count: int, wanted: Collection[int]) -> Turns:
        """The first `count` messages, with the wanted assistant messages trained.

        Raises:
            RowProblem: the text would not be what the row means.
        """
        messages = self.messages[:count]
        rendered = self._render(messages)
        checks, trained = Checks(self.habits, messages, rendered), TrainedRanges(self.habits, messages, rendered)
        ranges: list[Range] = []
        thoughtless: dict[int, Lost] = {}
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                checks.other(index)
                continue
            own = trained.of(index) if index in wanted else None
            lost = checks.answer(index, own)
            if own is not None and lost is not None:
                thoughtless[index] = lost
            elif own is not None:
                ranges += own
        checks.fields(self.fields)
        return Turns(rendered, joined(ranges), thoughtless)

    def _render(self, messages: Sequence[Message]) -> Rendered:
        template, ready = self.habits.template, self.habits.prepare(messages)
        try:
            if self.habits.twin is not None:
                rendered = self.habits.twin.find_turns(template.render(ready, **self.fields), ready, **self.fields)
                if rendered is not None:
                    return rendered
            return template.render_turns(ready, **self.fields)
        except TemplateRefuses as error:
            raise self._refusal(messages, str(error)) from None

    def _refusal(self, messages: Sequence[Message], reason: str) -> RowProblem:
        """Names the message with which the template begins to refuse."""
        first = len(messages)
        while first > 1 and len(messages) - first < 64:
            try:
                self.habits.template.render(self.habits.prepare(messages[: first - 1]), **self.fields)
                break
            except TemplateRefuses:
                first -= 1
        return RowProblem(
            "template-refuses",
            f"{place(messages, first - 1)}: the chat template does not take the conversation from here on ({reason}); "
            "change the row, or set data.chat_template",
        )

    def thought_problem(self, index: int, lost: Lost) -> RowProblem:
        """For a turn that is to be trained with a thought that the template removes wherever it stands."""
        where = place(self.messages, index, lost.field)
        if lost.field in REASONING and self.habits.shows_reasoning is False:
            return RowProblem(
                "reasoning-lost",
                f"{where}: the chat template does not print it; put the thought into content as <think>…</think>, set "
                "data.chat_template to a template that prints it, or leave it out with "
                f"data.ignore_fields: [{lost.field}]",
            )
        return RowProblem(
            "reasoning-lost",
            f"{where}: the chat template removes the thought, and the answer would be trained without it; "
            f"set data.chat_template to {self.habits.other_template('keeps it')}, or remove the thought from the row",
        )
