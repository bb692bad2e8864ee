"""A YAML file and its `--set` overrides, with the place of every value and every problem noted on the way to a model.

Scalars follow YAML 1.2's core schema: `no` and `2024-01-01` are strings and `1e-4` is a number. PyYAML's own loaders
follow YAML 1.1, which reads all three differently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel

from distft.config import paths
from distft.config.schema_text import (
    Steps,
    choices,
    clean,
    clip,
    dotted,
    field,
    fits,
    options,
    schema_of,
    show,
)
from distft.errors import RecipeError

M = TypeVar("M", bound=BaseModel)

MAX_BYTES = 2**18  # PyYAML reads some 100 kB a second
MAX_VALUES = 20_000  # with every alias unfolded: ten lines of nested aliases unfold to billions
MAX_DEPTH = 50

# Name of the tag → pattern, conversion. Digits are bounded: Python refuses int() and str() of more than 4300.
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
    """PyYAML's pure Python: libyaml words its errors differently, and deep nesting can crash it."""

    yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would read as anything but a string, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Escape what is not printable: PyYAML reads a plain U+0085 back as a line feed.
        return self.represent_scalar(f"{_TAG}str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)
for _name, (_pattern, _) in list(_SCALARS.items())[:-1]:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"({_pattern})\Z"), None)
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(rf"({_pattern})\Z"), None)


class Document(Generic[M]):
    """The data of a YAML file and its overrides on the way to a `model`, with places and problems.

    `places` maps the steps to a value to the line of its key, or to the `--set` it came from; a value without an entry
    is where its parent is. With `origin`, everything comes from there (an override).
    """

    def __init__(self, name: str, model: type[M], origin: str | None = None):
        self.name, self.model, self.origin = name, model, origin
        self.data: dict[str, Any] = {}
        self.places: dict[Steps, int | str] = {(): origin or name}
        self.problems: list[tuple[float, str]] = []  # line (infinite for an override), text
        self.wrong: set[Steps] = set()
        self.blank: set[Steps] = set()  # keys with nothing after them, which YAML reads as null
        self._values = 0

    @property
    def schema(self) -> dict[str, Any]:
        return schema_of(self.model)

    def get(self, steps: Steps, default: Any = None) -> Any:
        """The value at `steps`, or `default` where there is none."""
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
        """Note what is wrong with the value at `steps`, and where it is (or that it is on `line`)."""
        place = self.origin or line or self.place(steps)
        path = f"{dotted(steps)}: " if steps else ""
        self.problems.append((place if isinstance(place, int) else math.inf, f"{path}{text} ({self._where(place)})"))
        self.wrong.add(steps)

    def error(self) -> RecipeError:
        """All problems, in the order of the file."""
        return RecipeError([text for _, text in sorted(self.problems, key=lambda problem: problem[0])])

    def read(self, path: str | Path) -> None:
        """Take the data of a file. Raises RecipeError at once if it is not a YAML mapping."""
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            near = paths.near(Path(path)) if isinstance(error, FileNotFoundError) else ""
            raise RecipeError(f"cannot read {self.name}: {reason}{near}") from None
        if text := _other_file(self.name, raw):
            raise RecipeError(f"{self.name}: {text}")
        if len(raw) > MAX_BYTES:
            raise RecipeError(f"cannot read {self.name}: larger than {MAX_BYTES // 1024} KiB")
        self.parse(raw)

    def parse(self, raw: bytes) -> None:
        """Take the data of a file's content. Raises RecipeError at once if it is not a YAML mapping."""
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
        """Lay `dotted.key=value` over the data. The value is YAML; a string field takes a scalar as written."""
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
            if "escape" in problem and mark:
                escape = re.findall(r"\\.", text[: mark.index + 1])[-1]
                reason = f"in double quotes a backslash begins an escape, as in \\n, and {escape} is none; "
                reason += "write the backslash twice, or leave the quotes out"
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            reason = f"character U+{error.character:04X} is not allowed"
        except RecursionError:
            reason = "nested too deeply"
        except (ValueError, OverflowError):  # from chr() and int() in PyYAML: "\UFFFFFFFF"
            reason = "a number in it is too large"
        raise self._fatal(f"not valid YAML: {clip(clean(reason), 200)}", line)

    def _build(self, node: yaml.Node, steps: Steps) -> Any:
        """The data of a node; notes the lines of everything below it."""
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
        """Stop aliases that unfold without end: one inside its own anchor, or each doubling the one before it."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._fatal(f"more than {MAX_VALUES} values with all aliases unfolded", _line(node))
        if len(steps) > MAX_DEPTH:
            raise self._fatal(f"nested more than {MAX_DEPTH} deep, or an alias inside its own anchor", _line(node))

    def _pairs(self, node: yaml.MappingNode, steps: Steps) -> Iterator[tuple[yaml.Node, yaml.Node, bool]]:
        """Key, value, and whether it is the mapping's own. What is merged into it (`<<`) comes first: the last wins."""
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


def _other_file(name: str, raw: bytes) -> str | None:
    """What a file is that is no YAML mapping, by its name and its first character, and which command takes it."""
    if re.search(paths.ROWS_FILE, name) or (name.lower().endswith(".json") and raw.lstrip()[:1] == b"["):
        return f"a file of rows; a recipe names it, as data: {{train: {name}}}, and the commands take the recipe"
    if name.endswith((".py", ".sh")):
        return f"a script; distft launch runs it: distft launch -- {name}" if name.endswith(".py") else "a shell script"
    return None


def load_yaml(path: str | Path, model: type[M], sets: Sequence[str] = ()) -> Document[M]:
    """Read a YAML file for `model` and lay `dotted.key=value` overrides over it, the later over the earlier.

    Raises:
        RecipeError: it is not a YAML mapping. All other problems wait in the document for `validate`.
    """
    document = Document(clean(str(path)), model)
    document.read(path)
    for text in sets:
        document.override(text)
    return document


def dump_yaml(model: BaseModel) -> str:
    """YAML of all fields."""
    return dump_data(model.model_dump())


def dump_data(data: dict[str, Any]) -> str:
    """YAML of plain data, in its order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _tag(node: yaml.Node) -> str:
    return clip(clean(node.tag.replace(_TAG, "!!")))
