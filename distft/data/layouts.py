"""Which format rows are in, and in which of their columns: by data.format and data.columns, or by their fields."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from distft.config.recipe import CHAT_COLUMNS, FORMAT_COLUMNS
from distft.config.schema_text import closest, did_you_mean
from distft.data.problems import RowProblem

SAMPLE = 100  # rows of a file by which its format is told
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
ROLES, CONTENTS = ("role", "from"), ("content", "value", "text")  # keys of a message
# What people call the two sides of an instruction, in the order in which they are looked for.
PAIRS = (
    *[("instruction", answer) for answer in ("output", "response", "answer", "completion")],
    *[("question", answer) for answer in ("answer", "response", "output")],
    *[("query", answer) for answer in ("response", "answer", "output")],
    *[("prompt", answer) for answer in ("response", "answer", "output")],
    ("problem", "solution"),
    ("inputs", "targets"),
    ("input", "output"),
)
# Fields with one name in all formats: variables of templates, what is refused, and masks of trl's.
OPTIONS = ("enable_thinking", "preserve_thinking", "reasoning_effort")
MASKS = ("completion_mask", "assistant_masks", "assistant_mask")
MEDIA = {"images": "image", "image": "image", "videos": "video", "video": "video", "audios": "audio", "audio": "audio"}
_NEEDED = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "alpaca_prompt": ("instruction", "output"),
    "alpaca_chat": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("input_ids",),
}


@dataclass(frozen=True)
class Layout:
    """A format, and the row's column for each of its names (FORMAT_COLUMNS). sharegpt is the format messages, with
    the role names of ShareGPT. `seen_at` is the place of a row that has the fields it needs, where there is one."""

    format: str
    columns: Mapping[str, str]
    has_sharegpt_roles: bool = False
    seen_at: str = ""

    def column(self, name: str) -> str:
        return self.columns.get(name, name)

    def fields(self) -> set[str]:
        """The fields of a row that something is made of, as far as the row has them."""
        more: set[str] = {*MEDIA, *(MASKS if self.format == "tokens" else ())}
        if self.format not in ("text", "tokens"):
            more |= {"label", *OPTIONS}
        return {self.column(name) for name in FORMAT_COLUMNS[self.format]} | more

    def has_needed(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has the fields without which no row of the format can be read."""
        return all(row.get(self.column(name)) is not None for name in _NEEDED[self.format])

    def missing(self, row: Mapping[str, Any], name: str, need: str) -> RowProblem:
        """For a row without the field `name`: what it has instead, and what may have been meant.

        Args:
            row: without nulls.
        """
        column = self.column(name)
        text = f"{column}: got nothing, need {need}; the row has {', '.join(row) or 'nothing'}"
        try:
            other = _format_of_fields(list(row), row)
        except RowProblem as preferred:
            return preferred
        if other and self.seen_at and not self.format.startswith(other):
            fix = "a file is read in one format, so put these rows into a file of their own"
            return RowProblem("other-format", f"{text}, which is {other}, and {self.seen_at} is {self.format}; {fix}")
        near = closest(column, list(row))
        return RowProblem("missing", text + (f"; rename {near} to {column}" if near else ""))

    def __str__(self) -> str:
        """`alpaca (instruction: question, output: answer)`, to be printed."""
        more = [name for name in self.columns if name not in ("role", "content") or self.column(name) != name]
        shown = dict.fromkeys((*_NEEDED[self.format], *more))
        words = [name if self.column(name) == name else f"{name}: {self.column(name)}" for name in shown]
        return f"{self.format} ({', '.join(words)})"


def find_layout(rows: Sequence[Mapping[str, Any]], data_format: str, columns: Mapping[str, str]) -> Layout:
    """The layout of rows of one file.

    Args:
        rows: the first ones.
        data_format, columns: data.format and data.columns.

    Raises:
        RowProblem: preference, or format-unknown.
    """
    samples: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if samples.get(name) is None:
                samples[name] = value
    fields = [name for name, value in samples.items() if value is not None]
    asked = data_format
    if data_format == "auto":
        found_format = _format_of_columns(columns) or _format_of_fields(fields, samples)
        data_format = found_format or _format_of_fields(list(samples), samples) or _unknown(samples)
    found = dict(_guessed("messages" if data_format == "sharegpt" else data_format, fields, samples)) | dict(columns)
    layout = Layout(data_format, found)
    if data_format in ("messages", "sharegpt"):
        layout = Layout("messages", found, data_format == "sharegpt" or found.get("role") == "from")
    if asked != "auto" or columns:
        _check_given(layout, asked, fields, samples)
    return layout


def _check_given(layout: Layout, asked: str, fields: Sequence[str], samples: Mapping[str, Any]) -> None:
    """Raises RowProblem for preference data, and where no row has a field that data.format or data.columns makes it
    need: once, for the setting may be wrong and not the rows."""
    needed = [name for name in _NEEDED[layout.format] if name != "instruction" or layout.column("input") not in fields]
    missing = [layout.column(name) for name in needed if layout.column(name) not in fields]
    if not missing:
        return
    other = _format_of_fields(fields, samples)
    setting, fix = f"data.format: {asked}", f"set data.format: {other}, or auto"
    if asked == "auto" or not {*missing} <= {*_NEEDED[layout.format]}:
        setting, fix = "data.columns", "remove data.columns, or name columns that the rows have"
    near = next(filter(None, (closest(column, fields) for column in missing)), None)
    is_other = other is not None and other != layout.format
    raise RowProblem(
        "missing",
        f"{setting}: no row has {' or '.join(missing)}; they have {', '.join(samples) or 'nothing'}"
        + (f", which is {other}; {fix}" if is_other else did_you_mean(near)),
    )


def _format_of_columns(columns: Mapping[str, str]) -> str | None:
    """The format that the names mapped by data.columns belong to; None where any format has them."""
    return next((name for name, own in FORMAT_COLUMNS.items() if set(columns) & (set(own) - set(CHAT_COLUMNS))), None)


def _format_of_fields(fields: Sequence[str], samples: Mapping[str, Any]) -> str | None:
    if "input_ids" in fields:
        return "tokens"
    if any(name in fields and _is_conversation(samples[name]) for name in CONVERSATIONS):
        return "messages"
    if "chosen" in fields and "rejected" in fields:
        raise preference(samples)
    if "prompt" in fields and "completion" in fields:
        return "prompt_completion"
    if any(question in fields and answer in fields for question, answer in PAIRS):
        return "alpaca"
    if any(name in fields for name in CONVERSATIONS):  # to say what is wrong with it
        return "messages"
    return "text" if "text" in fields else None


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def _unknown(samples: Mapping[str, Any]) -> NoReturn:
    rows = next((name for name, value in samples.items() if value and isinstance(value, list)), None)
    if rows and isinstance(samples[rows][0], dict):
        raise RowProblem(
            "format-unknown",
            f"got the fields {', '.join(samples)}; "
            + (
                f"{rows} holds the rows: save that list as a file"
                if _is_list_of_rows(samples[rows])
                else f"if {rows} is a conversation, set data.columns: {{messages: {rows}}}, and if it holds the rows, "
                "save that list as a file"
            ),
        )
    # Text and Question are not text and question.
    known = {name for names in (CONVERSATIONS, *PAIRS, ("prompt", "completion", "text", "input_ids")) for name in names}
    meant = {name.strip().lower(): name for name in samples if name.strip().lower() in known - samples.keys()}
    example = "data.columns gives them other names, such as {messages: dialog} or {text: content}"
    if meant:
        example = f"rename {', '.join(f'{json.dumps(name)} to {known}' for known, name in meant.items())}"
    raise RowProblem(
        "format-unknown",
        f"got the fields {', '.join(samples) or '(none)'}; need messages, prompt + completion, instruction + output, "
        f"text or input_ids; {example}",
    )


def _is_list_of_rows(values: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are rows in a format that is known."""
    try:
        return _format_of_fields(list(values[0]), values[0]) is not None
    except RowProblem:  # preference data
        return True


def preference(row: Mapping[str, Any]) -> RowProblem:
    """For a row with a chosen and a rejected answer."""
    chosen = row.get("chosen")
    name = "messages" if isinstance(chosen, list) and len(chosen) > 1 else "completion" if "prompt" in row else "text"
    return RowProblem(
        "preference",
        "got preference data (chosen, rejected), and distft does supervised fine-tuning, which has no use for rejected "
        f"answers; to train on the chosen ones alone, set data.columns: {{{name}: chosen}}",
    )


def _guessed(data_format: str, fields: Sequence[str], samples: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The columns of a format that have another name in these rows."""
    if data_format.startswith("alpaca"):
        question, answer = next((pair for pair in PAIRS if set(pair) <= set(fields)), PAIRS[0])
        yield from (("instruction", question), ("output", answer))
        more = [name for name in ("input", "context") if name in fields and name != question]
        yield from (("input", name) for name in more[:1])
    if data_format == "messages":
        name = next((name for name in CONVERSATIONS if name in fields), CONVERSATIONS[0])
        keys = (
            _keys_of_messages(samples.get(name))
            or ("from value" if name == "conversations" else "role content").split()
        )
        yield from (
            ("messages", name),
            ("role", next((key for key in ROLES if key in keys), ROLES[0])),
            ("content", next((key for key in CONTENTS if key in keys), CONTENTS[0])),
        )
    if data_format in ("messages", "prompt_completion") or data_format.startswith("alpaca"):
        for name, others in (("system", ("system", "system_prompt")), ("tools", ("tools", "functions"))):
            yield from [(name, other) for other in others if other in fields][:1]


def _keys_of_messages(messages: Any) -> list[str]:
    """The keys of the first message."""
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            return []
    first = messages[0] if isinstance(messages, list) and messages else None
    return list(first) if isinstance(first, dict) else []
