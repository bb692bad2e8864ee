"""What of a message must be in the text that is trained, and what is not there.

Templates trim contents, cut thoughts off, write JSON or Python literals: a value counts as printed in any such form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from distft.data.problems import RowProblem
from distft.train.chat.messages import REASONING, Message, part_text

FLAGS = ("weight", "train", "training", "loss")  # keys by which rows say that a turn is not to be trained
# Names that other formats have for these roles. A template that passes roles on would print them as they are, and what
# the assistant says would not be trained.
_OTHER_NAMES = {
    **dict.fromkeys(("gpt", "model", "bot", "chatbot", "chatgpt", "ai", "bing", "bard", "function_call"), "assistant"),
    "human": "user",
}
THOUGHT_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
_THOUGHTS = [
    re.compile(re.escape(opening) + "(?P<thought>.*?)" + re.escape(closing), re.DOTALL)
    for opening, closing in THOUGHT_MARKS
]


@dataclass(frozen=True)
class Lost:
    """Something of a message that is not in its text. `field` is as in the row: content, tool_calls[0].arguments.x."""

    kind: str
    field: str
    value: str


def place(messages: Sequence[Message], index: int, field: str = "") -> str:
    return f"messages[{index}]{'.' if field else ''}{field} ({messages[index].get('role')})"


def check_message(messages: Sequence[Message], index: int) -> None:
    """Raises RowProblem for a role that is another format's name for one of a chat template's roles (role-unknown), and
    for a part of a content that is no text (content-lost)."""
    role, content = messages[index].get("role"), messages[index].get("content")
    if not isinstance(role, str) or not role:
        raise RowProblem("role-unknown", f"messages[{index}].role: got {role!r}, need system, user, assistant or tool")
    if role in _OTHER_NAMES:
        name = _OTHER_NAMES[role]
        raise RowProblem(
            "role-unknown",
            f"messages[{index}].role: got {role!r}, which chat templates call {name!r}; set data.roles: "
            f"{{{role}: {name}}}",
        )
    for number, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict) and part.get("text") is None:
            raise RowProblem(
                "content-lost",
                f"{place(messages, index, f'content[{number}]')}: got a part of type {part.get('type')!r}, need text",
            )


def is_trained(messages: Sequence[Message], index: int) -> bool:
    """Whether the row leaves this assistant turn to be trained: weight 0, or train, training or loss false, say no.

    Raises:
        RowProblem: flag-unsupported for another value, flag-ignored where another role's turn is to be trained.
    """
    message, trained = messages[index], True
    for key in FLAGS:
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise RowProblem(
                "flag-unsupported",
                f"{place(messages, index, key)}: got {value!r}, need "
                + ("0 or 1" if key == "weight" else "true or false")
                + "; a turn is trained or not",
            )
        trained = trained and bool(value)
        if value and key != "weight" and message.get("role") != "assistant":
            raise RowProblem(
                "flag-ignored",
                f"{place(messages, index, key)}: only the assistant's turns are trained; remove the flag, or add "
                f"{key!r} to data.ignore_fields",
            )
    return trained


def content_texts(message: Message) -> list[str]:
    """The content as texts: one, or one of each part."""
    content = message.get("content")
    if isinstance(content, list):
        return [part_text(part) for part in content]
    return [] if content is None else [content if isinstance(content, str) else json.dumps(content)]


def is_shown(value: str, text: str) -> bool:
    """Whether `value`, without the space around it, stands in `text` as it is or as part of a JSON or Python string."""
    return _end_of(value, text) >= 0


def _end_of(value: str, text: str, start: int = 0) -> int:
    """The position after the first place where `value` is printed, or -1."""
    value = value.strip()
    for form in chain((value,), _quoted(value)):
        if (at := text.find(form, start)) >= 0:
            return at + len(form)
    return -1


def _quoted(value: str) -> Iterator[str]:
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield json.dumps(value)[1:-1]
    yield repr(value)[1:-1]


def split_thoughts(text: str) -> tuple[list[str], str]:
    """The thoughts in a content, and the content without them."""
    thoughts: list[str] = []
    for pattern in _THOUGHTS:
        found = [match["thought"].strip() for match in pattern.finditer(text)]
        if found:
            thoughts += found
            text = pattern.sub("", text)
    return [thought for thought in thoughts if thought], text


def lost_of_answer(message: Message, text: str) -> Iterator[Lost]:
    """All of an assistant's message that is not in `text`: kinds reasoning-lost, content-lost, tool-call-lost and
    arguments-double-encoded."""
    parts = content_texts(message)
    for key in REASONING:
        thought = message.get(key)
        if isinstance(thought, str) and not _is_thought_before("".join(parts), thought, text):
            yield Lost("reasoning-lost", key, thought)
    for part in parts:
        if is_shown(part, text):
            continue
        thoughts, answer = split_thoughts(part)
        if not thoughts or not is_shown(answer, text):
            yield Lost("content-lost", "content", answer)
        else:
            yield from (
                Lost("reasoning-lost", "content", t) for t in thoughts if not _is_thought_before(answer, t, text)
            )
    calls = message.get("tool_calls") or []
    if any(name in part for name in names_of_tools(calls) for part in parts if name):
        for part in parts:  # what the answer says of the call is not the call
            text = text.replace(part.strip(), "\0", 1)
    yield from _lost_calls(calls, text)


def _is_thought_before(answer: str, thought: str, text: str) -> bool:
    """Whether the thought is printed, and the answer after it: a thought of one word may well stand in the answer."""
    end = _end_of(thought, text)
    return end >= 0 and _end_of(split_thoughts(answer)[1], text, end) >= 0


def _lost_calls(calls: Sequence[Mapping[str, Any]], text: str) -> Iterator[Lost]:
    position = 0
    for number, call in enumerate(calls):
        function = call.get("function") or {}
        name, arguments, field = str(function.get("name") or ""), function.get("arguments"), f"tool_calls[{number}]"
        found = text.find(name, position)
        if found < 0:
            yield Lost("tool-call-lost", f"{field}.function.name", name)
            continue
        position = found + len(name)
        rest = text[position:]
        if isinstance(arguments, str):
            if json.dumps(arguments, ensure_ascii=False) in rest:
                yield Lost("arguments-double-encoded", f"{field}.function.arguments", arguments)
            elif not is_shown(arguments, rest):
                yield Lost("tool-call-lost", f"{field}.function.arguments", arguments)
        else:
            yield from (
                Lost("tool-call-lost", f"{field}.function.arguments{path}", forms[0])
                for path, forms in _leaves(arguments, "")
                if not any(form in rest for form in forms)
            )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    """The keys and values of arguments, each with the forms that it can be printed in."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{path}.{key}", [str(key), *_quoted(str(key))]
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}[{number}]")
    elif isinstance(value, str):
        # Not stripped: an argument is data. Templates that write XML trim it, so that form counts too.
        yield path, [value, *_quoted(value), value.strip()]
    elif value is not None:  # templates leave null arguments out
        yield path, [json.dumps(value), str(value)]


def names_of_tools(tools: Sequence[Any]) -> list[str]:
    return [str((tool.get("function") or tool).get("name") or "") for tool in tools if isinstance(tool, Mapping)]


def longest_text(value: Any) -> str:
    """The longest string in a document: its text, whatever the key."""
    if isinstance(value, Mapping):
        return max(map(longest_text, value.values()), key=len, default="")
    if isinstance(value, list):
        return max(map(longest_text, value), key=len, default="")
    return value if isinstance(value, str) else ""


def short(text: str) -> str:
    """The text as it stands in messages."""
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "…")
