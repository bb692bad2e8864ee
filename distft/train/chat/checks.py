"""Whether a rendered conversation is what its row means: all of it printed, in order, under the right roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from distft.data.problems import RowProblem
from distft.train.chat.habits import Habits
from distft.train.chat.messages import Message
from distft.train.chat.ranges import Range
from distft.train.chat.template import Rendered
from distft.train.chat.values import (
    Lost,
    content_texts,
    is_shown,
    longest_text,
    lost_of_answer,
    names_of_tools,
    place,
    short,
    split_thoughts,
)

_LEADING = ("system", "developer")
_NEW_TEMPLATE = "set data.chat_template to a template that does"


class Checks:
    """The checks of one rendered conversation."""

    def __init__(self, habits: Habits, messages: Sequence[Message], rendered: Rendered):
        self.habits = habits
        self.messages = messages
        self.rendered = rendered

    def _role(self, index: int) -> str:
        return str(self.messages[index]["role"])

    def answer(self, index: int, ranges: Sequence[Range] | None) -> Lost | None:
        """Raises RowProblem for what is missing from an assistant's message: from what is trained of it, or where it is
        not trained (`ranges` None) from its text. Returns the thought that is missing."""
        message, own = self.messages[index], self.rendered.own(index)
        trained = own if ranges is None else "".join(self.rendered.text[start:end] for start, end in ranges)
        if message.get("tool_calls") and self.habits.shows_calls is False:
            raise RowProblem(
                "tool-call-lost",
                f"{place(self.messages, index, 'tool_calls')}: the chat template does not print tool calls; "
                f"{_NEW_TEMPLATE}",
            )
        if index in self._moved_messages:
            raise self._moved(index)
        self._check_order(index)
        thought: Lost | None = None
        for lost in lost_of_answer(message, trained):
            if lost.kind == "reasoning-lost":
                thought = thought or lost
                continue
            where, shown = place(self.messages, index, lost.field), short(lost.value)
            if lost.kind == "arguments-double-encoded":
                text = f"{where}: got text, which the chat template writes as JSON once more; give an object"
            elif ranges is not None and is_shown(lost.value, own):
                raise RowProblem(
                    "mask-misaligned",
                    f"{where}: {shown} is printed outside of what is trained; correct the {{% generation %}} blocks in "
                    "data.chat_template, or set another template",
                )
            elif not own and is_shown(lost.value, self.rendered.text):
                raise RowProblem(
                    "turns-not-separable",
                    f"{where}: which text of the chat template is this message's cannot be told; "
                    "set data.chat_template to a template that loops over messages",
                )
            else:
                text = f"{where}: the chat template does not print {shown}; change the row, or {_NEW_TEMPLATE}"
            raise RowProblem(lost.kind, text)
        return thought

    def _check_order(self, index: int) -> None:
        """Raises RowProblem (out-of-order) where the content comes after the result of the tool call after it."""
        spans = self.rendered.spans.get(index, [])
        if len(spans) < 2 or not self.messages[index].get("tool_calls"):
            return
        after = self.rendered.spans.get(index + 1, spans)[0][0]
        before = "".join(self.rendered.text[start:end] for start, end in spans if start <= after)
        for text in content_texts(self.messages[index]):
            if not is_shown(split_thoughts(text)[1], before):
                raise RowProblem(
                    "out-of-order",
                    f"{place(self.messages, index, 'content')}: the chat template prints it after the result of the "
                    "tool call; make it a message before the call, or set data.chat_template",
                )

    def other(self, index: int) -> None:
        """Raises RowProblem where a message of another role is left out, moved, or printed as yet another role."""
        message, role, own = self.messages[index], self._role(index), self.rendered.own(index)
        leading = index <= self._leading
        if index in self._moved_messages:
            raise self._moved(index)
        for text in content_texts(message):
            if is_shown(text, own):
                continue
            # Templates print the system prompt before they loop over the messages, or in the first or last user turn,
            # and some print the tools together with the first user message.
            elsewhere = is_shown(text, self._other_text)
            dropped = not elsewhere or (role != "user" and self.habits.shows_role(role, leading) is False)
            if not dropped and (leading or not self.rendered.by_signs):
                continue
            if not dropped:
                raise self._moved(index)
            if own.strip():
                raise RowProblem(
                    "content-lost",
                    f"{place(self.messages, index)}: the chat template does not print {short(text)}; "
                    f"change the row, or {_NEW_TEMPLATE}",
                )
            fix = "put its text into the first user message" if leading and role in _LEADING else "remove the message"
            if role == "developer" and self.habits.shows_role("system", leading):
                fix = "set data.roles: {developer: system}"
            elif role not in (*_LEADING, "user", "tool"):
                fix = f"if the user says it, set data.roles: {{{role}: user}}, else {fix}"
            raise RowProblem(
                "role-dropped",
                f"{place(self.messages, index)}: the chat template leaves out messages of this role"
                f"{'' if leading else ' here'}; {fix}, or set data.chat_template to another template",
            )
        if role != "user" and not (leading and role == "system"):
            other = self.habits.stands_for(role)
            if other is not None:
                raise RowProblem(
                    "role-renamed",
                    f"{place(self.messages, index)}: the chat template prints this role just as {other!r}; "
                    f"call it {other!r} if that is meant, else set data.chat_template",
                )
        self._check_name(index, own)

    @cached_property
    def _moved_messages(self) -> set[int]:
        """The messages whose text begins before that of one before them (system prompts at the start apart)."""
        moved: set[int] = set()
        latest = -1
        for index in range(self._leading, len(self.messages)):
            spans = self.rendered.spans.get(index)
            if spans:
                moved.update({index} if spans[0][0] < latest else ())
                latest = max(latest, spans[0][0])
        return moved

    @cached_property
    def _leading(self) -> int:
        """How many system prompts the conversation begins with."""
        roles = [self._role(index) for index in range(len(self.messages))]
        return next((index for index, role in enumerate(roles) if role not in _LEADING), len(roles))

    def _moved(self, index: int) -> RowProblem:
        return RowProblem(
            "out-of-order",
            f"{place(self.messages, index)}: the chat template prints this message in another place of the "
            "conversation; move it there in the row, or set data.chat_template",
        )

    def _check_name(self, index: int, own: str) -> None:
        name = self.messages[index].get("name")
        if not isinstance(name, str) or is_shown(name, own):
            return
        calls = [call for message in self.messages[:index] for call in message.get("tool_calls") or []]
        if self._role(index) != "tool" or name not in names_of_tools(calls):
            raise _ignored(place(self.messages, index, "name"), "name")

    @cached_property
    def _other_text(self) -> str:
        """All text but the assistant's."""
        return "\0".join(
            self.rendered.text[start:end]
            for start, end, owner in self.rendered.owners
            if owner is None or self._role(owner) != "assistant"
        )

    def fields(self, fields: Mapping[str, Any]) -> None:
        """Raises RowProblem where a tool or a document is not in the text."""
        shows = {"tools": self.habits.shows_tools, "documents": self.habits.shows_documents}
        values = {
            "tools": names_of_tools(fields.get("tools") or []),
            "documents": [longest_text(document) for document in fields.get("documents") or []],
        }
        for field, texts in values.items():
            if texts and shows[field] is False:
                raise _ignored(field, field)
            for number, text in enumerate(texts):
                if not is_shown(text, self._other_text):
                    raise _ignored(f"{field}[{number}]", field)


def _ignored(where: str, field: str) -> RowProblem:
    return RowProblem(
        "field-ignored",
        f"{where}: the chat template does not print it; {_NEW_TEMPLATE}, or leave it out with "
        f"data.ignore_fields: [{field}]",
    )


def ignored_option(option: str) -> RowProblem:
    """For a variable that a row gives and the template does not read."""
    return RowProblem(
        "field-ignored",
        f"chat_template_kwargs.{option}: the chat template has no such variable; remove it, or {_NEW_TEMPLATE}",
    )
