"""What is allowed and what was got, in words, from a model's JSON schema: for messages and for docs/recipe.md."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel

Steps = tuple[str | int, ...]  # the path to a value: ("data", "train", 0) is data.train[0]

KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
NOUNS = {"integer": "an integer", "array": "a list", "object": "a mapping"}
_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@functools.cache
def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model, every $ref replaced by what it points to."""
    return _inlined(model.model_json_schema())


def documented_schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The same, with the docstring under each field as its description."""
    return _inlined(documented_schema(model))


def documented_schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model's own JSON schema, with the docstring under each field as its description.

    pydantic's use_attribute_docstrings would read the sources for every command.
    """
    schema = model.model_json_schema()
    module = inspect.getmodule(model)
    documented: dict[str, dict[str, str]] = {}
    for group in ast.parse(inspect.getsource(module) if module else "").body:
        if isinstance(group, ast.ClassDef):
            inherited = {k: v for base in group.bases for k, v in documented.get(ast.unparse(base), {}).items()}
            documented[group.name] = inherited | _field_docstrings(group)
    for name, group in {model.__name__: schema, **schema.get("$defs", {})}.items():
        for key, text in documented.get(name, {}).items():
            group["properties"][key]["description"] = text
    return schema


def _field_docstrings(group: ast.ClassDef) -> dict[str, str]:
    found = {}
    for field, below in itertools.pairwise(group.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text)
    return found


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    def inline(value: Any) -> Any:
        if isinstance(value, list):
            return [inline(item) for item in value]
        return inline_group(value) if isinstance(value, dict) else value

    def inline_group(group: dict[str, Any]) -> dict[str, Any]:
        target = inline_group(schema["$defs"][group["$ref"].rpartition("/")[2]]) if "$ref" in group else {}
        return target | {key: inline(item) for key, item in group.items() if key not in ("$ref", "$defs")}

    return inline_group(schema)


def options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The members of a union, or the one type; without null where that is the default."""
    members = schema.get("anyOf", [schema])
    quiet = "default" in schema and schema["default"] is None
    return [member for member in members if not (quiet and member.get("type") == "null")]


def choices(option: dict[str, Any]) -> list[Any]:
    """The values of a type that lists its values."""
    return [option["const"]] if "const" in option else option.get("enum", [])


def field(schema: dict[str, Any], steps: Steps) -> dict[str, Any]:
    """The schema of the value at `steps`; {}, which allows anything, where none is known."""
    for step in steps:
        schema = next(filter(None, (_below(option, step) for option in options(schema))), {})
    return schema


def _below(option: dict[str, Any], step: str | int) -> Any:
    if isinstance(step, int):
        return option.get("items")
    others = option.get("additionalProperties")  # of a dict: a schema; of a model: False
    return option.get("properties", {}).get(step) or (others if isinstance(others, dict) else None)


def fits(schema: dict[str, Any], value: Any) -> bool:
    """Whether the value has one of the types, whatever the choices and bounds are."""
    kind = KINDS.get(type(value))
    types = [option.get("type", kind) for option in options(schema)]
    return kind in types or (kind == "integer" and "number" in types)


def describe(schema: dict[str, Any], literal: Callable[[str], str] = str) -> str:
    """What is allowed: `auto or an integer >= 1`. `literal` marks words that are to be written as they are."""
    words, types, last = [], [], []
    for option in options(schema):
        kind = option.get("type")
        if choices(option) or kind == "boolean":
            values = choices(option) or [True, False]
            words += [literal(value if isinstance(value, str) else show(value)) for value in values]
        elif kind == "null":
            last = [literal("null")]
        else:
            types.append(_describe_type(option, literal))
    if len(words) > 2 and not types:
        return "one of " + ", ".join(words + last)
    *before, final = words + types + last
    return f"{', '.join(before)} or {final}" if before else final


def _describe_type(option: dict[str, Any], literal: Callable[[str], str]) -> str:
    kind = option.get("type")
    if kind == "array":
        return "a list of " + re.sub(r"(^| or )an? (\w+)", r"\1\2s", describe(option.get("items", {}), literal))
    if kind == "object" and "properties" in option:
        names = [literal(name) for name in option["properties"]]
        return f"a group ({', '.join(names[:3] + ['...'] * (len(names) > 3))})"
    if kind == "integer" and "exclusiveMinimum" in option:
        option = {**option, "minimum": option["exclusiveMinimum"] + 1, "exclusiveMinimum": None}
    limits = [f"{sign} {option[key]:g}" for key, sign in _SIGNS.items() if option.get(key) is not None]
    if "pattern" in option:
        limits.append(option.get("x-pattern") or f"matching {literal(option['pattern'])}")
    if "maxLength" in option:
        limits.append(f"at most {option['maxLength']} characters")
    noun = NOUNS.get(kind, f"a {kind}") if kind else "any value"
    return f"{noun} {' and '.join(limits)}".strip()


def dotted(steps: Steps) -> str:
    """`data.train[0]`; a key that is not a plain word is quoted."""
    text = ""
    for step in steps:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += "." * bool(text) + (step if re.fullmatch(r"[\w-]{1,60}", step) else show(step))
    return text


def show(value: Any) -> str:
    """A value on one short line, without control characters or anything that reverses the terminal's text."""
    return clip(clean(json.dumps(value, ensure_ascii=False)))


def clean(text: str) -> str:
    """Text with escapes for what is not printable."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def clip(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 4]}...{text[-1]}"


def keys(schema: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The steps to every field of a model."""
    for option in options(schema):
        for name, below in option.get("properties", {}).items():
            yield (*above, name)
            yield from keys(below, (*above, name))


def closest(word: str, words: Sequence[str], cutoff: float = 0.6) -> str | None:
    folded = {other.casefold(): other for other in words}
    near = difflib.get_close_matches(word.casefold(), folded, 1, cutoff)
    return folded[near[0]] if near else None


def did_you_mean(near: str | None) -> str:
    return f"; did you mean {clean(near)}?" if near else ""
