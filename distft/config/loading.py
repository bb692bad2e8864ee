"""YAML and `--set` → a pydantic model, with all problems at once: dotted path, what was got, what is needed, where.

Scalars follow YAML 1.2's core schema: `no` and `2024-01-01` are strings and `1e-4` is a number, all of which PyYAML's
own loaders (YAML 1.1) read otherwise. The words of a message come from the model's JSON schema, so a new field needs
nothing here. `load_yaml` and `validate` serve any model; `load_recipe` adds what only a recipe has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from distft.config import paths
from distft.config.paths import PATH_FIELDS
from distft.config.recipe import EXCLUSIVE_FIELDS, Recipe
from distft.config.schema_text import (
    KINDS,
    NOUNS,
    Steps,
    choices,
    clean,
    clip,
    closest,
    describe,
    did_you_mean,
    dotted,
    field,
    fits,
    keys,
    options,
    schema_of,
    show,
)
from distft.errors import RecipeError

M = TypeVar("M", bound=BaseModel)

DATA_FILES = ("data.train", "data.eval", "data.chat_template")

MAX_BYTES = 2**18  # PyYAML reads some 100 kB a second
MAX_VALUES = 20_000  # with every alias unfolded: ten lines of nested aliases unfold to billions
MAX_DEPTH = 50

# name of the tag: pattern, conversion. Digits are bounded: Python refuses int() and str() of more than 4300.
_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text[0] in "tT"),
    "int": (
        r"[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}",
        lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    ),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=[iInN])", "", text)),
    ),
    "merge": (r"<<", str),
    "str": (r"(?s:.*)", str),
}
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """PyYAML's pure Python: libyaml has other words for its errors, and deep nesting can end the process there."""

    yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for something else than a string, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Escapes for what is not printable: PyYAML reads a plain U+0085 back as a line feed.
        return self.represent_scalar(f"{_TAG}str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)
for _name, (_pattern, _) in list(_SCALARS.items())[:-1]:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"({_pattern})\Z"), None)
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(rf"({_pattern})\Z"), None)


class Document(Generic[M]):
    """What a YAML file and its overrides say, on the way to a `model`: data, places and problems.

    `places` has, by the steps to a value, the line of its key or the `--set` it came from; a value without a place of
    its own is where the one around it is. With `origin`, everything comes from there (an override).
    """

    def __init__(self, name: str, model: type[M], origin: str | None = None):
        self.name, self.model, self.origin = name, model, origin
        self.data: dict[str, Any] = {}
        self.places: dict[Steps, int | str] = {(): origin or name}
        self.problems: list[tuple[float, str]] = []  # line (infinite for an override), text
        self.wrong: set[Steps] = set()
        self.blank: set[Steps] = set()  # a key with nothing after it, which YAML reads as null
        self._values = 0

    @property
    def schema(self) -> dict[str, Any]:
        return schema_of(self.model)

    def get(self, steps: Steps, default: Any = None) -> Any:
        """The value at `steps`, where there is one."""
        value: Any = self.data
        for step in steps:
            if not (isinstance(value, list) if isinstance(step, int) else isinstance(value, dict) and step in value):
                return default
            value = value[step]
        return value

    def place(self, steps: Steps) -> int | str:
        """Where the value at `steps` comes from: a line of the file, or the override."""
        known = steps
        while known not in self.places:
            known = known[:-1]
        return self.origin or self.places[known]

    def where(self, steps: Steps) -> str:
        """The same for people: `recipe.yaml:12`, `--set lora.r=8`."""
        return self._where(self.place(steps))

    def problem(self, steps: Steps, text: str, line: int | None = None) -> None:
        """Note what is wrong with the value at `steps`, and where it or `line` is."""
        place = self.origin or line or self.place(steps)
        path = f"{dotted(steps)}: " if steps else ""
        self.problems.append((place if isinstance(place, int) else math.inf, f"{path}{text} ({self._where(place)})"))
        self.wrong.add(steps)

    def error(self) -> RecipeError:
        """All problems, in the order of the file."""
        return RecipeError([text for _, text in sorted(self.problems, key=lambda problem: problem[0])])

    def read(self, path: str | Path) -> None:
        """Take the data of a file; RecipeError at once where it is no YAML mapping."""
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            near = paths.nearby(Path(path)) if isinstance(error, FileNotFoundError) else None
            raise RecipeError(f"cannot read {self.name}: {reason}{did_you_mean(near)}") from None
        if len(raw) > MAX_BYTES:
            raise RecipeError(f"cannot read {self.name}: larger than {MAX_BYTES // 1024} KiB")
        try:
            node = self._compose(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise self._fatal("not a text file in UTF-8", raw.count(b"\n", 0, error.start) + 1) from None
        if node is None:
            raise self._fatal("empty, need a mapping of keys to values")
        self.places[()] = line = _line(node)
        if not isinstance(node, yaml.MappingNode):
            got = show(node.value) if isinstance(node, yaml.ScalarNode) else "a list"
            raise self._fatal(f"got {got}, need a mapping of keys to values", line)
        self.data = self._build(node, ())

    def override(self, text: str, origin: str | None = None) -> None:
        """Lay `dotted.key=value` over the data. The value is YAML; a string field takes a scalar as it is written."""
        origin = clip(clean(origin)) if origin else f"--set {clip(clean(text))}"
        given = Document(self.name, self.model, origin)
        key, equals, raw = text.partition("=")
        steps = tuple(step.strip() for step in key.split("."))
        if not equals or not all(steps):
            given.problem((), f"{'empty key' if equals else 'no = in it'}, need dotted.key=value")
        try:
            node = given._compose(raw)
            value = given._build(node, steps) if node else None
        except RecipeError as error:
            given.problems.append((math.inf, str(error)))
        self.problems += given.problems
        if given.problems:
            self.wrong |= given.wrong
            return
        schema = field(self.schema, steps)
        text_field = any(option.get("type") == "string" and not choices(option) for option in options(schema))
        if text_field and isinstance(node, yaml.ScalarNode) and value is not None and not fits(schema, value):
            value = node.value
        group = self.data
        for n, step in enumerate(steps[:-1], 1):
            if not isinstance(group.get(step), dict):
                group[step] = {}
                self._move(steps[:n], origin)
            group = group[step]
        group[steps[-1]] = value
        self._move(steps, origin)

    def _move(self, steps: Steps, origin: str) -> None:
        self.places = {key: place for key, place in self.places.items() if key[: len(steps)] != steps}
        self.places[steps] = origin

    def _where(self, place: int | str) -> str:
        return self.origin or (f"{self.name}:{place}" if isinstance(place, int) else place)

    def _fatal(self, text: str, line: int = 1) -> RecipeError:
        return RecipeError(f"{text} ({self._where(line)})")

    def _compose(self, text: str) -> yaml.Node | None:
        """The nodes of a YAML document; None for an empty one."""
        line = 1
        try:
            return yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            since = f" in line {error.context_mark.line + 1}" if error.context_mark else ""
            context = f"{error.context}{since}, " if error.context else ""
            problem = error.problem or ""
            reason = context + problem + "; indent with spaces" * (repr("\t") in problem)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            reason = f"character U+{error.character:04X} is not allowed"
        except RecursionError:
            reason = "nested too deeply"
        except (ValueError, OverflowError):  # from PyYAML's own chr() and int(): "\UFFFFFFFF"
            reason = "a number in it is too large"
        raise self._fatal(f"not valid YAML: {clip(clean(reason), 200)}", line)

    def _build(self, node: yaml.Node, steps: Steps) -> Any:
        """The data of a node. Lines are noted of what is below it."""
        self._count(node, steps)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, steps)
        if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            self.problem(steps, f"tag {_tag(node)} is not supported", _line(node))
        if isinstance(node, yaml.SequenceNode):
            self._note({(*steps, n): _line(item) for n, item in enumerate(node.value)})
            return [self._build(item, (*steps, n)) for n, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        below: dict[str, yaml.Node] = {}
        lines: dict[str, int] = {}
        own_lines: dict[str, int] = {}
        for key, value, own in self._pairs(node, steps):
            self._count(key, steps)
            name, line = self._key(key, steps), _line(key)
            if name is None:
                continue
            if own and name in own_lines:
                self.problem((*steps, name), f"given twice, first in line {own_lines[name]}", line)
            if own:
                own_lines.setdefault(name, line)
            below[name], lines[name] = value, line
        self._note({(*steps, name): line for name, line in lines.items()})
        return {name: self._build(value, (*steps, name)) for name, value in below.items()}

    def _note(self, lines: dict[Steps, int]) -> None:
        if self.origin is None:
            self.places |= lines

    def _count(self, node: yaml.Node, steps: Steps) -> None:
        """Stop at aliases that unfold without end: one inside its own anchor, or each doubling the one before."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._fatal(f"more than {MAX_VALUES} values with all aliases unfolded", _line(node))
        if len(steps) > MAX_DEPTH:
            raise self._fatal(f"nested more than {MAX_DEPTH} deep, or an alias inside its own anchor", _line(node))

    def _pairs(self, node: yaml.MappingNode, steps: Steps) -> Iterator[tuple[yaml.Node, yaml.Node, bool]]:
        """Key, value and whether it is the mapping's own: first what is merged into it (`<<`), for the last wins."""
        for key, value in node.value:
            if key.tag != f"{_TAG}merge":
                continue
            for source in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
                self._count(source, (*steps, "<<"))
                if isinstance(source, yaml.MappingNode):
                    yield from ((k, v, False) for k, v, _ in self._pairs(source, (*steps, "<<")))
                else:
                    self.problem(steps, "<< needs a mapping or a list of mappings", _line(key))
        yield from ((key, value, True) for key, value in node.value if key.tag != f"{_TAG}merge")

    def _key(self, node: yaml.Node, steps: Steps) -> str | None:
        key = self._scalar(node, steps) if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(key, str):
            return key
        what = "a list or mapping" if isinstance(key, list) else show(key)
        self.problem(steps, f"got {what} for a key, need a string (in quotes)", _line(node))
        return None

    def _scalar(self, node: yaml.ScalarNode, steps: Steps) -> Any:
        pattern, convert = _SCALARS.get(node.tag.removeprefix(_TAG), (None, str))
        if pattern is None or not re.fullmatch(pattern, node.value):  # a tag in the file: !!int x, !mine x
            self.problem(steps, f"cannot read {show(node.value)} as {_tag(node)}", _line(node))
            return node.value
        value = convert(node.value)
        if not node.value and node.style is None:
            self.blank.add(steps)
        if isinstance(value, float) and not math.isfinite(value):
            self.problem(steps, f"got {clip(node.value)}, need a finite number", _line(node))
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):  # an escape, "\ud800": no file can hold it
            self.problem(steps, f"got {show(value)}, which has half a character", _line(node))
            return value.encode(errors="replace").decode()
        return value


def load_yaml(path: str | Path, model: type[M], sets: Sequence[str] = ()) -> Document[M]:
    """Read a YAML file for `model` and lay `dotted.key=value` overrides over it, the later over the earlier.

    Raises:
        RecipeError: it is no YAML mapping. Any other problem waits in the document for `validate`.
    """
    document = Document(clean(str(path)), model)
    document.read(path)
    for text in sets:
        document.override(text)
    return document


def validate(document: Document[M]) -> M:
    """The model that a document describes.

    Raises:
        RecipeError: all problems: those noted in the document before, and the model's.
    """
    try:
        model = document.model.model_validate(document.data)
    except ValidationError as error:
        _explain(document, error)
        raise document.error() from None
    if document.problems:
        raise document.error()
    return model


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, and sentences on what the user should know of how it was read."""

    recipe: Recipe
    notes: tuple[str, ...]


def read_recipe(path: str | Path, sets: Sequence[str] = (), needed: Collection[str] = ()) -> LoadedRecipe:
    """Read a recipe and lay `dotted.key=value` overrides over it. Local paths (relative to its folder) become absolute.

    Args:
        needed: fields among DATA_FILES whose files must be here; without it one that is not is a note.

    Raises:
        RecipeError: all problems at once.
    """
    document = load_yaml(path, Recipe, sets)
    notes = [*_replace_exclusive(document), *_resolve_paths(document, Path(path).parent, needed)]
    _check_together(document)
    return LoadedRecipe(validate(document), tuple(notes))


def load_recipe(path: str | Path, sets: Sequence[str] = (), needed: Collection[str] = ()) -> Recipe:
    """The recipe alone: see read_recipe."""
    return read_recipe(path, sets, needed).recipe


def dump_recipe(recipe: Recipe) -> str:
    """YAML of all fields; `load_recipe` makes an equal recipe of it, whatever folder it lies in."""
    return dump_yaml(recipe)


def dump_yaml(model: BaseModel) -> str:
    """YAML of all fields."""
    return yaml.dump(model.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def _explain(document: Document[Any], error: ValidationError) -> None:
    """Note pydantic's errors in our words, and one per value where each member of a union has its own complaint."""
    found: dict[Steps, Any] = {}
    for item in error.errors(include_url=False):
        steps: Steps = ()
        for n, step in enumerate(item["loc"], 1):
            # What is neither in the data nor missing from it is pydantic's name for a member of a union.
            missing = item["type"] == "missing" and n == len(item["loc"])
            if missing or document.get((*steps, step), found) is not found:
                steps += (step,)
        found.setdefault(steps, item)
    outer = {steps[:n] for steps in found for n in range(len(steps))}  # there, another member of the union got further
    for steps, item in found.items():
        if steps in outer or steps in document.wrong:
            continue
        kind, schema = item["type"], field(document.schema, steps)
        if kind == "extra_forbidden":
            text = _unknown(document.schema, steps)
        elif kind == "missing":
            text = f"missing, need {describe(schema)}"
        elif kind in ("value_error", "assertion_error"):  # a validator's own words
            text = str(item["ctx"]["error"])
        else:
            text = _got(schema, document.get(steps))
        document.problem(steps, text)


def _unknown(schema: dict[str, Any], steps: Steps) -> str:
    """An unknown key: where it belongs, else what it may have been, else what there is."""
    name = str(steps[-1])
    for known_steps in keys(schema):
        if known_steps[-1] == name:
            return f"unknown key; it belongs in {dotted(known_steps[:-1]) or 'the top level'}"
    known = [key for option in options(field(schema, steps[:-1])) for key in option.get("properties", ())]
    return "unknown key" + (did_you_mean(closest(name, known)) or f"; allowed: {', '.join(known)}")


def _got(schema: dict[str, Any], value: Any) -> str:
    """`got 0, need >= 1`: types are named where the value's is none of them."""
    need, right = describe(schema), fits(schema, value)
    if right and isinstance(value, (int, float)) and len(options(schema)) == 1:
        need = re.sub(r"^an? \w+ ", "", need)
    kind = KINDS.get(type(value))
    noun = "" if kind is None else " (empty)" * (value in ("", [])) if right else f" ({NOUNS.get(kind, f'a {kind}')})"
    words = [word for option in options(schema) for word in choices(option)]
    near = closest(value, words, 0.5) if isinstance(value, str) else None
    return f"got {show(value)}{noun}, need {need}{did_you_mean(near)}"


def _resolve_paths(document: Document[Recipe], folder: Path, needed: Collection[str]) -> list[str]:
    """Make local paths absolute. Returns a note on each that is not here; it is a problem where it is `needed`."""
    notes = []
    for path_field in PATH_FIELDS:
        value = document.get(path_field.steps)
        several = isinstance(value, list)
        for steps in [(*path_field.steps, n) for n in range(len(value))] if several else [path_field.steps]:
            text = document.get(steps)
            if not isinstance(text, str) or not text:
                continue
            path = paths.locate(folder, text)
            if not paths.holds(path_field.is_there, path):
                if paths.is_url(text):
                    document.problem(steps, f"got {show(text)}, URLs are not supported: download it and give its path")
                    continue
                if paths.is_hub_id(text, path_field):
                    continue
                shown, hint = clip(clean(str(path)), 300), paths.hint(path, text, path_field)
                if path_field.absent is None or dotted(path_field.steps) in needed or paths.holds(Path.exists, path):
                    document.problem(steps, f"no such {path_field.kind}: {shown}{hint}")
                    continue
                notes.append(f"{dotted(steps)}: {shown} is not here{path_field.absent}{hint}")
            document.get(steps[:-1])[steps[-1]] = str(path)
    return notes


def _replace_exclusive(document: Document[Recipe]) -> list[str]:
    """Where an override sets one of several exclusive fields, take away what the file has for the others.

    Returns a note on each that was replaced. Two from the same source stay, as a problem.
    """
    notes = []
    for names in EXCLUSIVE_FIELDS:
        fields: list[Steps] = [tuple(name.split(".")) for name in names]
        given = [steps for steps in fields if document.get(steps) is not None]
        overrides = [steps for steps in given if isinstance(document.place(steps), str)]
        if len(overrides) == 1:
            for steps in given:
                if steps not in overrides:
                    had = f"{dotted(steps)}: {show(document.get(steps))} ({document.where(steps)})"
                    notes.append(f"{had} is replaced by {document.where(overrides[0])}")
                    document.get(steps[:-1])[steps[-1]] = None
        elif len(given) > 1:
            document.problem(given[-1], f"cannot be given with {dotted(given[0])}; set one of them to null")
    return notes


def _check_together(document: Document[Recipe]) -> None:
    """What two fields say together. On the data, so that these problems come with all others."""
    if ("lora",) in document.blank and document.get(("lora",)) is None:
        # All lines below it commented out would quietly train all weights.
        document.problem(("lora",), "nothing is below it; write null to train all weights, or leave the key out")
    kind = document.get(("data", "format"))
    if document.get(("data", "long_rows")) == "split" and kind in ("messages", "prompt_completion"):
        document.problem(("data", "long_rows"), f"split needs format text, got {kind}; use error, truncate or drop")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _tag(node: yaml.Node) -> str:
    return clip(clean(node.tag.replace(_TAG, "!!")))
