"""Rows of any format → examples in one of four kinds, or what is wrong with them.

    kind               fields
    messages           messages, and where the row has them: tools, documents, chat_template_kwargs
    prompt_completion  prompt, completion: the text of the one goes on in the other, which is trained
    text               text: all of it is trained
    tokens             input_ids, labels: those to be trained, and -100 elsewhere

A message has role, content (text, or None beside tool_calls), tool_calls with arguments as an object, `train: false`
where it is not to be trained, and whatever else the row gives it. An instruction with its input becomes a conversation,
or, for a tokenizer without a chat template, the prompt of Stanford's Alpaca.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from distft.config.recipe import Data
from distft.data.conversations import (
    FLAGS,
    Messages,
    from_json,
    parameters_of,
    read_tools,
    roles_line,
    says_no,
    shown,
    strings_in,
)
from distft.data.layouts import CONTENTS, MASKS, MEDIA, OPTIONS, ROLES, Layout
from distft.data.problems import RowProblem, Untrained

Kind = Literal["messages", "prompt_completion", "text", "tokens"]
IGNORE = -100  # the label that the loss leaves out (torch.nn.CrossEntropyLoss)
_SAID = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # what a turn may be beside its content
_OTHER_ROLES = ("system", "developer", "user", "tool")
# Stanford's texts, as in the column `text` of its data set; a system prompt replaces the first sentence.
_INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
)


@dataclass(frozen=True)
class Example:
    """What a row is trained as."""

    kind: Kind
    fields: dict[str, Any]

    @property
    def can_split(self) -> bool:
        """Whether parts of it can be trained as documents of their own: data.long_rows: split."""
        return self.kind == "text"

    def key(self) -> int:
        """64 bits that are the same for the same content, wherever it comes from."""
        import hashlib

        digest = hashlib.sha256(json.dumps([self.kind, self.fields], sort_keys=True).encode()).digest()
        return int.from_bytes(digest[:8], "big")

    def is_held_out(self, fraction: float) -> bool:
        """Whether it belongs to the evaluation data where data.eval is a fraction: decided by its content alone, so the
        same for all its copies, and whatever other rows there are."""
        return self.key() < fraction * 2**64


@dataclass(frozen=True)
class Formatter:
    """Reads rows as a recipe's `data` says.

    Args:
        roles, ignored: data.roles and data.ignore_fields.
        trains_all: whether data.train_on is everything.
        has_chat_template: whether an instruction can become a conversation.
        control: matches the tokenizer's control tokens, where it is known.
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    trains_all: bool = False
    has_chat_template: bool = True
    control: re.Pattern[str] | None = None

    @classmethod
    def of(cls, data: Data, has_chat_template: bool = True, control: re.Pattern[str] | None = None) -> Formatter:
        ignored = frozenset(data.ignore_fields)
        return cls(data.roles, ignored, data.train_on == "everything", has_chat_template, control)

    def example(self, row: Mapping[str, Any] | RowProblem, layout: Layout) -> Example:
        """What a row is trained as.

        Raises:
            Untrained: the row says that it is not to be trained.
            RowProblem: it does not fit the layout, or would lose something.
        """
        if isinstance(row, RowProblem):
            raise row
        row = {name: value for name, value in row.items() if value is not None and name not in self.ignored}
        _check_whole(row, layout)
        try:
            example = _KINDS[layout.format](self, row, layout)
            if not all(map(_is_whole, strings_in(example.fields))):
                text = "got half of a surrogate pair (such as \\ud83d), which is no character; remove it"
                raise RowProblem("lone-surrogate", f"{_place_of_half(example.fields)}: {text}")
        except RecursionError:
            raise RowProblem("nested-too-deeply", "nested too deeply") from None
        return example

    def control_token(self, example: Example) -> str | None:
        """The first control token that stands in what a message says: templates do not escape it, so it is one."""
        if self.control is None or example.kind != "messages":
            return None
        texts = (message["content"] for message in example.fields["messages"])
        found = next((match for text in texts if text and (match := self.control.search(text))), None)
        return found[0] if found else None

    # ---- conversations

    def _messages(self, row: dict[str, Any], layout: Layout) -> Example:
        column = layout.column("messages")
        if column not in row:
            need = f"a list of {{{layout.column('role')}, {layout.column('content')}}}"
            raise layout.missing(row, "messages", need)
        shared = self._shared(row, layout)
        messages = self._read_messages(row.get(column), column, layout, shared)
        return self._conversation(row, layout, messages, shared, column)

    def _read_messages(self, value: Any, where: str, layout: Layout, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
        role, content = layout.columns.get("role", ROLES[0]), layout.columns.get("content", CONTENTS[0])
        reader = Messages(role, content, self.roles, layout.has_sharegpt_roles, self.ignored)
        messages = reader.read(value, where, parameters_of(shared.get("tools", [])))
        if (
            self.trains_all
            and (marked := next((n for n, one in enumerate(messages) if "train" in one), None)) is not None
        ):
            raise RowProblem(
                "flag-ignored",
                f"{where}[{marked}]: is marked not to be trained, and data.train_on: everything trains every token; "
                "set data.train_on: all, or name the mark in data.ignore_fields",
            )
        return messages

    def _shared(self, row: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
        """What a template prints beside the messages."""
        found: dict[str, Any] = {}
        column = layout.column("tools")
        if tools := read_tools(row.get(column), column):
            found["tools"] = tools
        column = layout.column("documents")
        if documents := from_json(row.get(column), column, "a list of documents"):
            if not isinstance(documents, list) or not all(isinstance(document, dict) for document in documents):
                raise RowProblem("documents", f"{column}: got {shown(documents)}, need a list of objects")
            found["documents"] = documents
        column = layout.column("chat_template_kwargs")
        options = from_json(row.get(column), column, "an object") or {}
        if not isinstance(options, dict):
            raise RowProblem("chat-template-kwargs", f"{column}: got {shown(options)}, need an object")
        if options := {key: row[key] for key in OPTIONS if key in row} | options:
            found["chat_template_kwargs"] = options
        return found

    def _conversation(
        self, row: Mapping[str, Any], layout: Layout, messages: list[dict[str, Any]], shared: dict[str, Any], where: str
    ) -> Example:
        if system := self._system(row, layout):
            if messages[0]["role"] != "system":
                messages = [{"role": "system", "content": system}, *messages]
            elif messages[0]["content"] != system:
                column = layout.column("system")
                raise RowProblem(
                    "system-twice",
                    f"{column}: {where}[0] is another system prompt; remove one, or leave this one out with "
                    f"data.ignore_fields: [{column}]",
                )
        answers = [message for message in messages if message["role"] == "assistant"]
        if not answers:
            raise self._no_answer(where, messages)
        self._check_label(row, layout)
        trained = [number for number, message in enumerate(answers, 1) if message.get("train", True)]
        if not trained:
            raise Untrained("no-turn-to-train", f"{where}: all assistant turns are marked not to be trained")
        for number in trained:
            if _is_empty(answers[number - 1]):
                turn = f"assistant turn {number} of {len(answers)}" if len(answers) > 1 else "the assistant's turn"
                fix = 'write its answer, mark the turn "train": false, or remove the row'
                raise RowProblem("empty", f"{where}: {turn} is empty; {fix}")
        return Example("messages", {"messages": messages, **shared})

    def _no_answer(self, where: str, messages: Sequence[Mapping[str, Any]]) -> RowProblem:
        """For messages without one of the assistant's: whose they are, and how a role gets its name."""
        roles = list(dict.fromkeys(str(message["role"]) for message in messages))
        own = {role: name for name, role in self.roles.items()}  # as the rows have them
        names = [own.get(message["role"], message["role"]) for message in messages]
        unknown = [own.get(role, role) for role in roles if role not in _OTHER_ROLES]
        fix = f"; if that is who they are, set {roles_line(self.roles, unknown, names)}" if unknown else ""
        text = f"no assistant turn, so nothing to train on; got the role{'s' * (len(roles) > 1)} {', '.join(roles)}"
        return RowProblem("no-assistant-turn", f"{where}: {text}{fix}")

    def _system(self, row: Mapping[str, Any], layout: Layout) -> str | None:
        column = layout.column("system")
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise RowProblem("system", f"{column}: got {shown(value)}, need a string")
        return value if value and value.strip() else None

    def _check_label(self, row: Mapping[str, Any], layout: Layout) -> None:
        """Raises Untrained for KTO's `label: false`: an answer that is not wanted."""
        column = layout.column("label")
        value = row.get(column)
        if isinstance(value, str):  # of CSV
            value = {"true": True, "false": False}.get(value.lower())
        if value is False:
            raise Untrained(
                "label-false",
                f"{column}: false marks an answer that is not wanted; data.ignore_fields: [{column}] trains it",
            )
        if value is not True and value in (0, 1):
            raise RowProblem(
                "label-unclear",
                f"{column}: got {value}; write true or false (false is not trained, as in KTO), or leave it out with "
                f"data.ignore_fields: [{column}]",
            )

    # ---- instructions

    def _alpaca(self, row: dict[str, Any], layout: Layout) -> Example:
        has_input = layout.column("input") != layout.column("instruction")
        more = _text(row, layout, "input", needed=False) if has_input else ""
        instruction = _text(row, layout, "instruction", needed=not more)
        if not (instruction.strip() or more.strip()):
            raise RowProblem("empty", f"{layout.column('instruction')}: empty")
        answer = _text(row, layout, "output")
        if not answer.strip():
            raise RowProblem("empty", f"{layout.column('output')}: empty")
        shared, system = self._shared(row, layout), self._system(row, layout)
        turns = _history(row, layout)
        if self.has_chat_template and layout.format == "alpaca":
            question = "\n".join(part for part in (instruction, more) if part.strip())
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return self._conversation(row, layout, [*turns, *messages], shared, layout.column("instruction"))
        if turns or shared:
            name = layout.column("history") if turns else next(iter(shared))
            fix = "set data.chat_template" if layout.format == "alpaca" else "use data.format: alpaca"
            raise RowProblem("no-chat-template", f"{name}: needs a chat template; {fix}")
        self._check_label(row, layout)
        is_chat = layout.format == "alpaca_chat"
        head = (None if is_chat else system) or (_WITH_INPUT if more.strip() else _INSTRUCTION)
        parts = [head, f"### Instruction:\n{instruction}"]
        parts += [f"### Input:\n{more}"] if more.strip() else []
        prompt = "\n\n".join([*parts, "### Response:\n"])
        if is_chat:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            return self._conversation(row, layout, messages, {}, layout.column("instruction"))
        return Example("prompt_completion", {"prompt": prompt, "completion": answer})

    # ---- texts

    def _prompt_completion(self, row: dict[str, Any], layout: Layout) -> Example:
        prompt, completion = row.get(layout.column("prompt")), row.get(layout.column("completion"))
        if isinstance(prompt, list) or isinstance(completion, list):
            return self._conversational(row, layout)
        prompt, completion = _text(row, layout, "prompt"), _text(row, layout, "completion")
        if not completion.strip():
            raise RowProblem("empty", f"{layout.column('completion')}: empty")
        for name in ("tools", "documents", "system", "chat_template_kwargs", *OPTIONS):
            if row.get(column := layout.column(name)):
                raise RowProblem(
                    "field-ignored",
                    f"{column}: a prompt that is text has no place for it; leave it out with data.ignore_fields: "
                    f"[{column}], or make the prompt a list of messages",
                )
        self._check_label(row, layout)
        return Example("prompt_completion", {"prompt": prompt, "completion": completion})

    def _conversational(self, row: dict[str, Any], layout: Layout) -> Example:
        """A prompt and a completion of messages: of the assistant's turns, those of the completion are trained."""
        shared = self._shared(row, layout)
        sides = []
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            column = layout.column(name)
            value = row.get(column)
            if value is None:
                raise layout.missing(row, name, "a list of messages")
            if isinstance(value, str):
                value = [{"role": role, "content": value}]
            sides.append(self._read_messages(value, column, layout, shared))
        prompt, completion = sides
        if not any(message["role"] == "assistant" for message in completion):
            raise self._no_answer(layout.column("completion"), completion)
        prompt = [message | ({"train": False} if message["role"] == "assistant" else {}) for message in prompt]
        return self._conversation(row, layout, [*prompt, *completion], shared, layout.column("prompt"))

    def _plain_text(self, row: dict[str, Any], layout: Layout) -> Example:
        text = _text(row, layout, "text")
        if not text.strip():
            raise RowProblem("empty", f"{layout.column('text')}: empty")
        return Example("text", {"text": text})

    # ---- tokens

    def _tokens(self, row: dict[str, Any], layout: Layout) -> Example:
        if layout.column("input_ids") not in row:
            raise layout.missing(row, "input_ids", "a list of integers")
        ids = _integers(row, layout.column("input_ids"), None)
        labels = _integers(row, layout.column("labels"), len(ids)) if layout.column("labels") in row else list(ids)
        negative = next((n for n, token in enumerate(ids) if token < 0), None)
        if negative is not None:
            raise RowProblem("tokens", f"{layout.column('input_ids')}[{negative}]: got {ids[negative]}, need >= 0")
        for n, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in (token, IGNORE):
                raise RowProblem(
                    "labels",
                    f"{layout.column('labels')}[{n}]: got {label}, need {token}, which is the token there, or {IGNORE} "
                    "(labels are not shifted)",
                )
        for name in MASKS:
            if name in row:
                mask = _integers(row, name, len(ids))
                labels = [label if flag else IGNORE for label, flag in zip(labels, mask, strict=True)]
        if (column := layout.column("attention_mask")) in row:  # 0: padding
            mask = _integers(row, column, len(ids))
            ids, labels = ([value for value, flag in zip(side, mask, strict=True) if flag] for side in (ids, labels))
        if all(label == IGNORE for label in labels[1:]):
            raise RowProblem("no-trained-token", f"{layout.column('labels')}: no token to train on")
        return Example("tokens", {"input_ids": ids, "labels": labels})


_KINDS = {
    "messages": Formatter._messages,
    "alpaca": Formatter._alpaca,
    "alpaca_prompt": Formatter._alpaca,
    "alpaca_chat": Formatter._alpaca,
    "prompt_completion": Formatter._prompt_completion,
    "text": Formatter._plain_text,
    "tokens": Formatter._tokens,
}


def _check_whole(row: Mapping[str, Any], layout: Layout) -> None:
    """What a row says whatever its format.

    Raises:
        Untrained: it is marked not to be trained.
        RowProblem: it has more than text.
    """
    for name in FLAGS:
        if name in row and name not in layout.columns.values() and says_no(name, row[name]):
            raise Untrained(
                "marked",
                f"{name}: got {shown(row[name])}, so it is not trained; data.ignore_fields: [{name}] trains it",
            )
    for name, media in MEDIA.items():
        if row.get(name) and name not in layout.columns.values():
            raise RowProblem(
                media,
                f"{name}: got {'an' if media[0] in 'ai' else 'a'} {media}; only text is trained. Where the text alone "
                f"is meant: data.ignore_fields: [{name}]",
            )


def _is_empty(turn: Mapping[str, Any]) -> bool:
    return not any(turn.get(key) for key in _SAID) and not (turn["content"] or "").strip()


def _text(row: Mapping[str, Any], layout: Layout, name: str, needed: bool = True) -> str:
    column = layout.column(name)
    value = row.get(column)
    if value is None and not needed:
        return ""
    if value is None:
        raise layout.missing(row, name, "a string")
    if not isinstance(value, str):
        raise RowProblem("not-a-string", f"{column}: got {shown(value)}, need a string")
    return value


def _history(row: Mapping[str, Any], layout: Layout) -> list[dict[str, Any]]:
    """The turns before an instruction: pairs of a question and its answer."""
    column = layout.column("history")
    pairs = from_json(row.get(column), column, "a list of pairs") or []
    turns = []
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
            raise RowProblem("history", f"{column}[{number}]: got {shown(pair)}, need [question, answer]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _integers(row: Mapping[str, Any], column: str, count: int | None) -> list[int]:
    """A list of integers, as many as `count` where it is given, else at least two."""
    values = from_json(row.get(column), column, "a list of integers")
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise RowProblem("tokens", f"{column}: got {shown(values)}, need a list of integers")
    if count is None and len(values) < 2:
        raise RowProblem("tokens", f"{column}: got {len(values)} tokens, need at least 2")
    if count is not None and len(values) != count:
        raise RowProblem("tokens", f"{column}: got {len(values)} values, need {count} as in input_ids")
    return [int(value) for value in values]


def _is_whole(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _place_of_half(fields: Mapping[str, Any]) -> str:
    """The first field, or message, with half of a character."""
    for name, value in fields.items():
        for where, part in (
            [(f"{name}[{n}]", one) for n, one in enumerate(value)] if name == "messages" else [(name, value)]
        ):
            if not all(map(_is_whole, strings_in(part))):
                return where
    return ""
