"""What a chat template does, learned once from short conversations with known words in them.

Nothing here looks at the template's source: a template that mentions `tools` may still not print them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from distft.train.chat.messages import Message, formed
from distft.train.chat.template import ChatTemplate, Rendered, TemplateRefuses, environment_of
from distft.train.chat.twins import training_version

# A generation prompt may open the thought. The opening is trained all the same, as it is in trl's marked templates.
_THOUGHT = re.compile(r"<think(?:ing)?>|\[THINK\]|<\|channel>|<\|START_THINKING\|>|<seed:think>")
_TAG = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]")
_ASKED, _SAID, _THOUGHT_OF, _TOOL, _KEY, _VALUE, _RESULT, _SYSTEM, _DOCUMENT = (
    f"zq{word}qz" for word in ("asked", "answered", "pondered", "tool", "key", "value", "result", "system", "document")
)
_USER: Message = {"role": "user", "content": _ASKED}
_ASSISTANT: Message = {"role": "assistant", "content": _SAID}
SAMPLE = [_USER, _ASSISTANT]  # a conversation that every template takes
# Nine letters and digits: Mistral's templates take no other id.
_CALLS: Message = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "id": "call00001", "function": {"name": _TOOL, "arguments": {_KEY: _VALUE}}}],
}
_TOOL_RESULT: Message = {"role": "tool", "name": _TOOL, "tool_call_id": "call00001", "content": _RESULT}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": "none",
            "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "none"}}},
        },
    }
]


class Habits:
    """The habits of one template, each learned when it is first asked for."""

    def __init__(self, template: ChatTemplate):
        self.template = template
        self.twin_path = training_version(template.source)
        marked = self.twin_path.read_text(encoding="utf-8") if self.twin_path else None
        self.twin = ChatTemplate(template.tokenizer, marked, template.options) if marked else None
        """trl's version of the template with `{% generation %}` marks, which may render another text."""
        self._headers: dict[str | None, str | None] = {}
        self._roles: dict[str, str | None] = {}
        self._shown: dict[tuple[str, bool], bool | None] = {}

    # How messages are passed to it.

    def prepare(self, messages: Iterable[Message]) -> list[Message]:
        """The messages in the form that the template takes: contents as text or as parts, arguments as a dict or as
        JSON, thoughts under all the names that templates read, or as a part (Ministral's reads no other)."""
        form = (self.takes_text, self.takes_parts, *self._call_form, self._thought_as_part)
        return [formed(message, *form) for message in messages]

    def _shows(self, words: Sequence[str], messages: Sequence[Message], **fields: Any) -> bool | None:
        """Whether all the words are printed; None where the template takes no such conversation."""
        try:
            text = self.template.render(messages, **fields)
        except TemplateRefuses:
            return None
        return all(word in text for word in words)

    @cached_property
    def takes_parts(self) -> bool:
        chat = [
            {**message, "content": [{"type": "text", "text": message["content"]}]} for message in (_USER, _ASSISTANT)
        ]
        return self._shows_parts([_ASKED, _SAID], chat)

    def _shows_parts(self, words: Sequence[str], messages: Sequence[Message]) -> bool:
        """Whether the words are printed, and not the keys of parts: a template that concatenates contents fails with
        parts, and one that formats them prints Python's or JSON's list."""
        return bool(self._shows(words, messages)) and not re.search(
            r"""(['"])(text|thinking)\1: """, self.template.render(messages)
        )

    @cached_property
    def takes_text(self) -> bool:
        return bool(self._shows([_ASKED, _SAID], [_USER, _ASSISTANT])) or not self.takes_parts

    @cached_property
    def _call_form(self) -> tuple[bool, bool]:
        """Whether arguments go in as JSON text, and whether a message with calls alone needs an empty content."""
        forms = sorted(self._call_forms, key=lambda form: not form[1])
        return forms[0][0] if forms else (False, False)

    @cached_property
    def _call_forms(self) -> list[tuple[tuple[bool, bool], bool]]:
        """The forms of a call that the template takes, best first, and whether it prints their name and arguments."""
        forms: list[tuple[tuple[bool, bool], bool]] = []
        for form in ((False, False), (False, True), (True, False), (True, True)):
            for chat in ([_USER, _CALLS, _TOOL_RESULT], [_USER, _CALLS]):
                ready = [formed(message, self.takes_text, self.takes_parts, *form) for message in chat]
                shown = self._shows([_TOOL, _KEY, _VALUE], ready)
                if shown is not None:
                    forms.append((form, shown))
        return forms

    @cached_property
    def _thought_as_part(self) -> bool:
        """Whether a thought is printed only as a part of the content."""
        chat = [_USER, {**_ASSISTANT, "reasoning_content": _THOUGHT_OF}]
        by_key, as_part = (
            [formed(message, self.takes_text, self.takes_parts, False, False, is_part) for message in chat]
            for is_part in (False, True)
        )
        words = [_THOUGHT_OF, _SAID]
        return self.takes_parts and not self._shows(words, by_key) and self._shows_parts(words, as_part)

    # What it prints: None where the conversation that would tell is refused.

    @cached_property
    def shows_calls(self) -> bool | None:
        """Whether the name and arguments of a tool call are printed."""
        return any(shown for _, shown in self._call_forms) if self._call_forms else None

    def shows_role(self, role: str, leading: bool) -> bool | None:
        """Whether a message of this role is printed, at the start of a conversation or amid it."""
        if (role, leading) not in self._shown:
            chat = [self._message(role), _USER, _ASSISTANT]
            self._shown[role, leading] = self._shows(
                [_RESULT], self.prepare(chat if leading else [*self._before(role), *chat])
            )
        return self._shown[role, leading]

    @cached_property
    def shows_tools(self) -> bool | None:
        """Whether the names of `tools` are printed."""
        return self._shows([_TOOL], self.prepare([_USER, _ASSISTANT]), tools=_TOOLS)

    @cached_property
    def shows_documents(self) -> bool | None:
        """Whether the text of `documents` is printed."""
        document = {"title": "title", "text": _DOCUMENT, "contents": _DOCUMENT, "content": _DOCUMENT, "doc_id": 1}
        return self._shows([_DOCUMENT], self.prepare([_USER, _ASSISTANT]), documents=[document])

    @cached_property
    def shows_reasoning(self) -> bool | None:
        """Whether the thought of the last answer is printed when it has a key to itself."""
        return self._shows([_THOUGHT_OF], self.prepare([_USER, {**_ASSISTANT, "reasoning_content": _THOUGHT_OF}]))

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads."""
        from jinja2 import meta

        return frozenset(
            meta.find_undeclared_variables(environment_of(self.template.source).parse(self.template.source))
        )

    @cached_property
    def sample(self) -> str:
        """The text of a short conversation with the generation prompt after it; "" where the template refuses it."""
        try:
            return self.template.render(self.prepare(SAMPLE), prompt=True)
        except TemplateRefuses:
            return ""

    @cached_property
    def closing(self) -> str:
        """What stands after the answer that ends a conversation."""
        try:
            return self.template.render(self.prepare(SAMPLE)).rpartition(_SAID)[2]
        except TemplateRefuses:
            return ""

    # How turns begin and end.

    def _turn(self, chat: Sequence[Message], index: int, **fields: Any) -> tuple[Rendered, str] | None:
        """`chat` with the own text of one of its messages, where the template takes it and says whose text it is."""
        try:
            rendered = self.template.render_turns(self.prepare(chat), **fields)
        except TemplateRefuses:
            return None
        own = rendered.own(index)
        return (rendered, own) if own else None

    def header(self, before: str | None) -> str | None:
        """What stands before all that the assistant produces, after a message of the role `before` (None: the first).

        It is what the generation prompt and all kinds of turns have in common: what follows is up to the model. ""
        where the template has no generation prompt, or writes it into the message before; None where it refuses.
        """
        if before not in self._headers:
            self._headers[before] = self._header(self._beginning(before))
        return self._headers[before]

    def _header(self, chat: Sequence[Message]) -> str | None:
        frames: list[str] = []  # what stands before the first word of the assistant's
        prompted: str | None = None
        kinds = [
            ([_ASSISTANT], _SAID),
            ([_ASSISTANT, _USER], _SAID),
            ([{**_ASSISTANT, "reasoning_content": _THOUGHT_OF}], _THOUGHT_OF),
            ([_CALLS], _TOOL),
        ]
        for last, word in kinds:
            turn = self._turn([*chat, *last], len(chat))
            if turn is None:
                continue
            if not frames and chat:
                before = turn[0].text[: turn[0].spans[len(chat)][0][0]]
                prompted = self._prompt(chat, before)
            frames.append(turn[1].partition(word)[0] if word in turn[1] else turn[1].partition(_SAID)[0])
        if not frames:
            return None
        header = _common_beginning([*frames, prompted] if prompted is not None else frames)
        if prompted is None and header:  # nothing to compare with, but the same turn after a question
            usual = self.header("user") if chat != [_USER] else None
            if not usual or usual not in header:
                return None
            header = header[: header.find(usual) + len(usual)]
        thought = _THOUGHT.search(header)
        return header[: thought.start()] if thought else header

    def _prompt(self, chat: Sequence[Message], before: str) -> str | None:
        """What the generation prompt puts after `before`; None where the text with it does not begin with `before`."""
        try:
            text = self.template.render(self.prepare(chat), prompt=True)
        except TemplateRefuses:
            return None
        return text.removeprefix(before) if text.startswith(before) else None

    def _beginning(self, role: str | None) -> list[Message]:
        if role is None:
            return []
        if role == "user":
            return [_USER]
        if role == "assistant":
            return [_USER, _ASSISTANT]
        if role == "tool":
            return [_USER, _CALLS, _TOOL_RESULT]
        if role in ("system", "developer"):
            return [{"role": role, "content": _SYSTEM}]
        return [_USER, {"role": role, "content": _SYSTEM}]

    @cached_property
    def ends(self) -> frozenset[str]:
        """The tokens that end a turn of the assistant's: the last special one that follows the answer or the tool call
        at the end of short conversations, and the tokenizer's eos_token."""
        # </tool_call> and </think> are added tokens too, but not special ones, and no generation stops at them.
        eos = self.template.tokenizer.eos_token
        return self._ends([([_USER, _ASSISTANT], 1, _SAID), ([_USER, _CALLS], 1, _VALUE)]) | ({eos} if eos else set())

    @cached_property
    def ends_within(self) -> frozenset[str]:
        """`ends`, and the tokens that end turns amid a conversation: Gemma 4 writes <tool_call|>, and the end proper,
        <|tool_response>, begins the text of the result."""
        return self.ends | self._ends(
            [([_USER, _ASSISTANT, _USER, _ASSISTANT], 1, _SAID), ([_USER, _CALLS, _TOOL_RESULT], 1, _VALUE)]
        )

    @cached_property
    def line_breaks(self) -> int:
        """How many line breaks follow the end of a turn where nothing follows it: they are the turn's own. Others stand
        between turns."""
        if (turn := self._turn(SAMPLE, 1)) is None:
            return 0
        own = turn[1].rstrip(" ")
        return len(own) - len(own.rstrip("\n"))

    def _ends(self, chats: Sequence[tuple[list[Message], int, str]]) -> frozenset[str]:
        """For each conversation, the index of an assistant's message in it and the last word of that message."""
        special = any_of(t.content for t in self.template.tokenizer.added_tokens_decoder.values() if t.special)
        tokens: set[str] = set()
        for chat, index, word in chats:
            if (turn := self._turn(chat, index)) is None:
                continue
            rendered, own = turn
            if word not in own:
                continue
            found = special.findall(own.partition(word)[2])
            last = rendered.owners[-1]
            if not found and index == len(chat) - 1 and last[2] is None:  # the template writes it after all messages
                found = special.findall(rendered.text[last[0] : last[1]])
            tokens.update(found[-1:])
        return frozenset(tokens)

    def stands_for(self, role: str) -> str | None:
        """user or assistant, where a message of this role amid a conversation is printed just as one of theirs."""
        if role not in self._roles:
            own = self._frame(role, role)
            others = [other for other in ("assistant", "user") if other != role] if own else []
            self._roles[role] = next((other for other in others if self._frame(role, other) == own), None)
        return self._roles[role]

    def _frame(self, role: str, other: str) -> list[str] | None:
        """What is printed around the content of a message of role `other` where one of `role` may stand."""
        before = self._before(role)
        turn = self._turn([*before, self._message(other), _USER, _ASSISTANT], len(before))
        return turn[1].split(_RESULT) if turn and _RESULT in turn[1] else None

    def _before(self, role: str) -> list[Message]:
        return [_USER, _CALLS] if role == "tool" and self.shows_calls else [_USER, _ASSISTANT]

    @staticmethod
    def _message(role: str) -> Message:
        return _TOOL_RESULT if role == "tool" else {"role": role, "content": _RESULT}

    def other_template(self, does: str) -> str:
        """Words for a template that does what this one does not: the version that trl made for training, where it has
        one (it keeps thoughts and ends turns)."""
        return f"trl's version for training, {self.twin_path}" if self.twin_path else f"a template that {does}"


def _common_beginning(texts: Sequence[str]) -> str:
    """What all the texts begin with, without a tag that only begins in it: <think> and </think> have < in common."""
    first, last = min(texts), max(texts)
    end = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    cut = (tag.start() for text in texts for tag in _TAG.finditer(text) if tag.start() < end < tag.end())
    return first[: min(cut, default=end)]


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the words, the longest first; nothing where there are none."""
    longest_first = sorted((word for word in words if word.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
