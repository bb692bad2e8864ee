"""Messages in the forms that templates take."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]
REASONING = ("reasoning_content", "thinking", "reasoning")  # the keys that transformers takes a thought from


def formed(
    message: Message,
    takes_text: bool,
    takes_parts: bool,
    arguments_as_text: bool,
    empty_content: bool,
    thought_as_part: bool = False,
) -> Message:
    """A message with its content as text or as parts, the arguments of its calls as a dict or as JSON text, its thought
    under all the names that templates read, or as the first part of its content, and without keys that have no value
    (later versions of transformers do the last two themselves)."""
    message = {key: value for key, value in message.items() if value is not None}
    thought = next((message[key] for key in REASONING if key in message), None)
    if thought is not None:
        message = {"thinking": thought, **message, "reasoning_content": thought}
    content, calls = message.get("content"), message.get("tool_calls")
    if content is None and (empty_content or not calls):
        message["content"] = content = ""
    if isinstance(content, str) and not takes_text:
        message["content"] = [{"type": "text", "text": content}]
    elif isinstance(content, list) and not takes_parts:
        message["content"] = "".join(map(part_text, content))
    if thought is not None and thought_as_part:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        message["content"] = [{"type": "thinking", "thinking": thought}, *parts]
    if calls and arguments_as_text:
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _as_json(call["function"].get("arguments"))}}
            for call in calls
        ]
    return message


def part_text(part: Any) -> str:
    """The text of one part of a content."""
    return str(part.get("text") or "") if isinstance(part, dict) else str(part)


def _as_json(arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments
    return json.dumps({} if arguments is None else arguments, ensure_ascii=False)
