"""Messages, tools and calls in the forms that people write them → one form: what a chat template takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distft.config.schema_text import closest
from distft.data.problems import RowProblem

Message = dict[str, Any]
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "chatbot", "bot", "model", "ai", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("function_response", "function-response", "tool_response", "tool-response"), "tool"),
}
_CALL_ROLES = ("function_call", "function-call", "tool_call", "tool-call", "tool_calls")
# What is made of a message's fields, with the names that they have in an example.
MESSAGE_FIELDS = frozenset(
    ["role", "content", "tool_calls", "name", "tool_call_id", "train", "reasoning_content", "reasoning", "thinking"]
)
# Names that other tools give to the two sides of a message.
_ROLE_NAMES = ("from", "speaker", "author", "sender", "participant", "name")
_CONTENT_NAMES = ("value", "text", "message", "body", "utterance")
# Keys by which a message, or a whole row, says whether it is trained: weights by 0 or 1; `masked` by false.
_WEIGHTS = ("weight", "loss_weight")
FLAGS = (*_WEIGHTS, "train", "training", "loss", "masked")
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA = {
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("video", "video_url"), "video"),
    **dict.fromkeys(("file", "input_file"), "file"),
}
# Keys of a JSON schema under which null is a value.
_NULL_IN_SCHEMA = ("default", "const")


def shown(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def from_json(value: Any, where: str, need: str) -> Any:
    """What a column that may hold JSON text stands for; None for empty text.

    Raises:
        RowProblem: not-json.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        fix = "; it looks like Python, write it with json.dumps" if value.lstrip()[:2] in ("[{", "{'") else ""
        raise RowProblem("not-json", f"{where}: got {shown(value)}, need {need} or its JSON{fix}") from None


class Messages:
    """Reads the messages of rows.

    Args:
        role, content: the keys of a message that hold them.
        roles: names of roles → those of chat templates; ShareGPT's too where `is_sharegpt`.
        ignored: keys that are left out.
    """

    def __init__(self, role: str, content: str, roles: Mapping[str, str], is_sharegpt: bool, ignored: frozenset[str]):
        self.role = role
        self.content = content
        self.roles = roles
        self.is_sharegpt = is_sharegpt
        self.ignored = ignored

    def read(self, value: Any, where: str, parameters: Mapping[str, frozenset[str]]) -> list[Message]:
        """The messages in one form: role, content (text, or None beside tool_calls), tool_calls with parsed arguments,
        `train: false` where a turn is not to be trained, and whatever else a message has.

        Args:
            parameters: the names of each tool's parameters, where they are known.

        Raises:
            RowProblem: all that is wrong with the messages, with the kind of the first.
        """
        need = f"a list of {{{self.role}, {self.content}}}"
        messages = from_json(value, where, need)
        if not isinstance(messages, list) or not messages:
            raise RowProblem("no-messages", f"{where}: got {shown(value)}, need {need}")
        self._check_names(messages, where)
        found: list[Message] = []
        problems: list[RowProblem] = []
        for index, message in enumerate(messages):
            try:
                found.append(self._message(message, f"{where}[{index}]", parameters))
            except RowProblem as problem:
                problems.append(problem)
        if problems:
            raise RowProblem(problems[0].kind, "; ".join(problem.text for problem in problems[:3]))
        return found

    def _check_names(self, messages: list[Any], where: str) -> None:
        """Raises RowProblem where no message has a role or a content under the names that are looked for, or where
        ShareGPT's roles are others: for all messages at once, with the line that mends it."""
        objects = [message for message in messages if isinstance(message, dict) and len(message) > 1]
        keys = list(dict.fromkeys(key for message in objects for key in message))
        if keys and (self.role not in keys or not {self.content, "tool_calls", "function_call"} & {*keys}):
            role, content = _name_in(keys, self.role, _ROLE_NAMES), _name_in(keys, self.content, _CONTENT_NAMES)
            fix = f"; set data.columns: {{role: {role}, content: {content}}}" if role and content else ""
            missing = self.role if self.role not in keys else self.content
            kind = "role" if self.role not in keys else "content"
            raise RowProblem(kind, f"{where}: no message has {missing}; they have {', '.join(keys)}{fix}")
        if not self.is_sharegpt:
            return
        names = [name for message in objects if isinstance(name := message.get(self.role), str) and name]
        unknown = [name for name in dict.fromkeys(names) if not self._is_role(name)]
        if unknown:
            raise RowProblem(
                "role-unknown",
                f"{where}: got the role{'s' * (len(unknown) > 1)} {', '.join(map(shown, unknown))}, need some of "
                f"{', '.join(SHAREGPT_ROLES)}; if that is who they are, set {roles_line(self.roles, unknown, names)}",
            )

    def _is_role(self, name: str) -> bool:
        return name in self.roles or name.lower() in SHAREGPT_ROLES or name.lower() in _CALL_ROLES

    def _message(self, value: Any, where: str, parameters: Mapping[str, frozenset[str]]) -> Message:
        message = from_json(value, where, f"{{{self.role}, {self.content}}}")
        if not isinstance(message, dict):
            raise RowProblem("no-message", f"{where}: got {shown(value)}, need {{{self.role}, {self.content}}}")
        message = {key: value for key, value in message.items() if value is not None and key not in self.ignored}
        name = message.pop(self.role, None)
        if not isinstance(name, str) or not name:
            has = _instead(self.role, message) if name is None else ""
            raise RowProblem("role", f"{where}.{self.role}: got {shown(name)}, need a string{has}")
        content, flags = message.pop(self.content, None), {key: message.pop(key, None) for key in FLAGS}
        if "train_detail" in message:
            raise RowProblem("flag-unsupported", f"{where}.train_detail: a turn is trained or not; split the message")
        calls = message.pop("tool_calls", None)
        if self.is_sharegpt and name.lower() in _CALL_ROLES and name not in self.roles:
            role, calls, content = "assistant", from_json(content, f"{where}.{self.content}", "a call"), None
            calls = calls if isinstance(calls, list) else [calls]
        else:
            role = self._role(name)
        if role == "assistant" and (old := message.pop("function_call", None)):  # OpenAI's form of 2023
            calls = [old]
        result: Message = {"role": role, "content": self._content(content, message, role, where)}
        if calls := _calls(calls, f"{where}.tool_calls", parameters):
            result["tool_calls"] = calls
        elif result["content"] is None:
            has = _instead(self.content, message)
            raise RowProblem("content", f"{where}.{self.content}: got nothing, need a string{has}")
        result |= message
        if not _is_trained(flags, role, where):
            result["train"] = False
        return result

    def _role(self, name: str) -> str:
        if name in self.roles:
            return self.roles[name]
        if not self.is_sharegpt:
            return "tool" if name == "function" else name  # OpenAI's name of 2023
        return SHAREGPT_ROLES[name.lower()]

    def _content(self, content: Any, message: Message, role: str, where: str) -> str | None:
        """The text of a message. Thoughts among its parts are put into the message."""
        where = f"{where}.{self.content}"
        if content is None or isinstance(content, str):
            return content
        is_parts = isinstance(content, list) and all(isinstance(part, (str, dict)) for part in content)
        if role == "tool" and (isinstance(content, dict) or (isinstance(content, list) and not _has_types(content))):
            return json.dumps(content, ensure_ascii=False)  # what a tool returned
        if not is_parts:
            raise RowProblem("content", f"{where}: got {shown(content)}, need a string")
        texts, thoughts = list[str](), list[str]()
        for number, part in enumerate(content):
            text = _part(part, f"{where}[{number}]", thoughts)
            texts += [] if text is None else [text]
        if thoughts and not any(key in message for key in ("reasoning_content", "reasoning", "thinking")):
            message["reasoning_content"] = "".join(thoughts)
        return "".join(texts) if texts else None


def _name_in(keys: Sequence[str], name: str, usual: Sequence[str]) -> str | None:
    """The key that is most likely meant by a name."""
    return next((key for key in (name, *usual) if key in keys), None) or closest(name, keys)


def _instead(name: str, message: Mapping[str, Any]) -> str:
    """What a message without the key `name` has, and which of its keys may be a mistyped one."""
    near = closest(name, list(message))
    fix = f"; rename {near} to {name}" if near else ""
    return f"; the message has {', '.join(message)}{fix}" if message else ""


def roles_line(given: Mapping[str, str], unknown: Sequence[str], names: Sequence[str]) -> str:
    """data.roles with the names that are unknown: their usual roles; else the assistant's for the last one that
    speaks, and the user's.

    Args:
        given: data.roles as it is.
        names: all roles of a conversation, in order.
    """
    roles = {name: SHAREGPT_ROLES.get(name.lower()) for name in unknown}
    known = {role for name in names for role in [roles.get(name) or given.get(name) or SHAREGPT_ROLES.get(name)]}
    last = next((name for name in reversed(names) if name in unknown and not roles[name]), None)
    answers = last if "assistant" not in known else None
    roles = {name: role or ("assistant" if name == answers else "user") for name, role in roles.items()}
    both = {name: role for name, role in {**given, **roles}.items() if name != role}
    return f"data.roles: {{{', '.join(f'{name}: {role}' for name, role in both.items())}}}"


def _has_types(parts: list[Any]) -> bool:
    return bool(parts) and all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in parts)


def _part(part: Any, where: str, thoughts: list[str]) -> str | None:
    """The text of a part; a thought goes to `thoughts`."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text")
    if kind in ("thinking", "reasoning"):
        thought = part.get(kind) or part.get("text")
        thoughts += [thought] if isinstance(thought, str) else []
        return None
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    media = _MEDIA.get(kind)
    if media:
        raise RowProblem(media, f"{where}: got {'an' if media[0] in 'ai' else 'a'} {media}; only text is trained")
    fix = "; calls belong into tool_calls, results into messages of role tool" if str(kind).startswith("tool") else ""
    raise RowProblem("part-unsupported", f"{where}: got a part {shown(part)}, need text{fix}")


def _is_trained(flags: Mapping[str, Any], role: str, where: str) -> bool:
    trained = True
    for key, value in flags.items():
        if value is None:
            continue
        if value not in (0, 1):
            need = "0 or 1" if key in _WEIGHTS else "true or false"
            text = f"{where}.{key}: got {shown(value)}, need {need}; a turn is trained or not"
            raise RowProblem("flag-unsupported", text)
        says_yes = bool(value) != (key == "masked")
        if says_yes and key not in (*_WEIGHTS, "masked") and role != "assistant":
            raise RowProblem(
                "flag-ignored",
                f"{where}.{key}: only the assistant's turns are trained; remove the flag, or set "
                f"data.ignore_fields: [{key}]",
            )
        trained = trained and says_yes
    return trained


def says_no(key: str, value: Any) -> bool | None:
    """Whether one of FLAGS on a whole row says that it is not trained; None where the value is none of a flag's: a
    column `loss` may be a number that somebody measured.

    Args:
        value: in CSV, all are text.
    """
    if isinstance(value, str):
        value = {"true": True, "false": False, "0": 0, "1": 1}.get(value.lower())
    if isinstance(value, bool):
        return value == (key == "masked")
    return value == 0 if key in _WEIGHTS and value in (0, 1) else None


def _calls(value: Any, where: str, parameters: Mapping[str, frozenset[str]]) -> list[dict[str, Any]]:
    calls = from_json(value, where, "a list of calls")
    if not calls:
        return []
    if not isinstance(calls, list):
        raise RowProblem("tool-calls", f"{where}: got {shown(value)}, need a list of calls")
    return [_call(call, f"{where}[{number}]", parameters) for number, call in enumerate(calls)]


def _call(value: Any, where: str, parameters: Mapping[str, frozenset[str]]) -> dict[str, Any]:
    """`{type, function: {name, arguments}}`, and its id where it has one. Also of a call without that wrapping."""
    call = from_json(value, where, "a call")
    function = call.get("function", call) if isinstance(call, dict) else None
    function = from_json(function, f"{where}.function", "a function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem("tool-calls", f"{where}: got {shown(value)}, need {{function: {{name, arguments}}}}")
    name = function["name"]
    arguments = function.get("arguments", function.get("parameters") if function is call else None)
    for _ in range(2):  # OpenAI's are JSON text, and some have been written as JSON once more
        arguments = from_json(arguments, f"{where}.function.arguments", "an object")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowProblem("arguments", f"{where}.function.arguments: got {shown(arguments)}, need an object")
    if name in parameters:
        known = parameters[name]
        arguments = {key: value for key, value in arguments.items() if value is not None or key in known}
    wrapped = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return ({"id": call["id"]} if isinstance(call, dict) and call.get("id") else {}) | wrapped


def read_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Tools as a list of `{type: function, function: {name, description, parameters}}`, from a list or its JSON.

    Nulls are removed, but for a default: where rows went through Arrow, all tools of a data set have the parameters of
    each.

    Raises:
        RowProblem: tools.
    """
    tools = from_json(value, where, "a list of tools")
    tools = [tools] if isinstance(tools, dict) else tools
    if not tools:
        return []
    if not isinstance(tools, list):
        raise RowProblem("tools", f"{where}: got {shown(value)}, need a list of tools")
    found = []
    for number, item in enumerate(tools):
        tool = from_json(item, f"{where}[{number}]", "a tool")
        if not isinstance(tool, dict) or not isinstance((tool.get("function") or tool).get("name"), str):
            raise RowProblem("tools", f"{where}[{number}]: got {shown(item)}, need {{function: {{name, …}}}}")
        found.append(_without_nulls(tool if "function" in tool else {"type": "function", "function": tool}))
    return found


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: inner if key in _NULL_IN_SCHEMA else _without_nulls(inner)
            for key, inner in value.items()
            if inner is not None or key in _NULL_IN_SCHEMA
        }
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def parameters_of(tools: list[dict[str, Any]]) -> dict[str, frozenset[str]]:
    """The names of each tool's parameters, for tools whose schema lists them."""
    found = {}
    for tool in tools:
        function = tool["function"]
        schema = function.get("parameters")
        if isinstance(schema, dict) and isinstance(schema.get("properties"), dict):
            found[function["name"]] = frozenset(schema["properties"])
    return found


def strings_in(value: Any) -> Iterator[str]:
    """All strings in a value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings_in(key)
            yield from strings_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_in(inner)
