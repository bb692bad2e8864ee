"""`distft import` as text: what each option became."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from distft.config.schema_text import clean, clip

MOST_CHARACTERS = 100  # of a value
UNLIMITED = 100_000  # columns
LEFT_COLUMN = 64  # most columns that an option takes beside what became of it
MEANINGS = {  # of values that say little by themselves
    ("data.train_on", "all"): "all answers, and no prompts",
    ("data.train_on", "last"): "the answers after the last question",
    ("data.train_on", "all_with_reasoning"): "all answers with their thoughts, and no prompts",
    ("data.train_on", "everything"): "prompts and answers",
    ("data.long_rows", "drop"): "longer rows are left out",
    ("data.long_rows", "truncate"): "longer rows are cut at their end",
    ("data.long_rows", "split"): "longer texts are cut into rows",
    ("data.long_rows", "error"): "longer rows end the launch",
    ("lora", "None"): "the model's own weights are trained",
}


def lines(found: dict[str, Any], width: int) -> Iterator[str]:
    """The page for what `Draft.to_json` says, `width` columns wide."""
    width = max(40, width)
    if found["mapped"]:
        yield "mapped:"
        yield from _table([(_option(item), _field(item)) for item in found["mapped"]], width)
    for name, title in (("dropped", "dropped, and what that means:"), ("refused", "refused, and why:")):
        if found[name]:
            yield title
            yield from _table([(_option(item), item["why"]) for item in found[name]], width)


def _field(item: dict[str, Any]) -> str:
    if item["field"] is None:
        return "said by the fields of other options"
    meaning = MEANINGS.get((item["field"], str(item["to"])), "")
    return f"{item['field']}: {_short(item['to'])}" + f" ({meaning})" * bool(meaning)


def _option(item: dict[str, Any]) -> str:
    name, value = item["option"], item["value"]
    return name if value is None or "(" in name or " x " in name else f"{name}: {_short(value)}"


def _short(value: Any) -> str:
    """A string as it is, everything else as JSON, on one line."""
    text = clip(clean(json.dumps(value, ensure_ascii=False)), MOST_CHARACTERS)
    return text[1:-1] if isinstance(value, str) else text


def _table(rows: list[tuple[str, str]], width: int) -> Iterator[str]:
    """Two columns; where the left one is too wide, the right one is on lines of its own."""
    left = min(max(len(option) for option, _ in rows), LEFT_COLUMN, width // 2)
    for option, text in rows:
        if len(option) <= left or width == UNLIMITED:
            head, room = f"  {option:<{left}}  ", width - left - 4
            wrapped = wrap(text, room)
            yield (head + wrapped[0]).rstrip()
            yield from (" " * (left + 4) + line for line in wrapped[1:])
        else:
            yield from (f"  {line}" for line in wrap(option, width - 2))
            yield from (" " * (left + 4) + line for line in wrap(text, width - left - 4))


def wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]
