"""The options of a file, each taken once: those that are left in the end are known to have been overlooked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from distft.config.document import Document
from distft.config.recipe import Recipe
from distft.config.schema_text import KINDS, NOUNS, Steps, closest, did_you_mean, dotted, show
from distft.importers.draft import Draft, Left, Mapped

T = TypeVar("T")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")  # YAML 1.1's, which all these tools read


def read_yaml(path: Path) -> Document[Recipe]:
    """A YAML file, which may be any tool's, with the line of every value.

    Raises:
        RecipeError: it cannot be read.
    """
    document = Document(str(path), Recipe)
    document.read(path)
    if document.problems:
        raise document.error()
    return document


class Options:
    """Options of one mapping of a file.

    A null is an option that is not given, as in all these tools. A value of a wrong type is a problem of the file, and
    reads as not given.

    Args:
        lines: the steps to each value → its line.
        steps: those to this mapping.
    """

    def __init__(
        self, draft: Draft, data: Mapping[str, Any], lines: Mapping[Steps, Any] | None = None, steps: Steps = ()
    ):
        self.draft, self.data, self.lines, self.steps = draft, dict(data), lines or {}, steps
        self.taken: set[str] = set()
        self.spelling: dict[str, str] = {}  # names that the file has in a longer form

    def line(self, name: str) -> int | None:
        line = self.lines.get((*self.steps, self.spelling.get(name, name)))
        return line if isinstance(line, int) else None

    def path(self, name: str) -> str:
        return dotted((*self.steps, self.spelling.get(name, name)))

    def has(self, name: str) -> bool:
        """Whether the option is given. It counts as looked at."""
        self.taken.add(name)
        return self.data.get(name) is not None

    def take(self, name: str) -> Any:
        self.taken.add(name)
        return self.data.get(name)

    # ---- typed

    def flag(self, name: str) -> bool | None:
        value = self.take(name)
        if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
            return value.lower() in _TRUE
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        return self._typed(name, value, bool, "true or false")

    def flag_or_auto(self, name: str) -> bool | None:
        """A flag; None for `auto`, which others decide."""
        return None if self.data.get(name) == "auto" else self.flag(name)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        return self._typed(name, value or None, str, "a string")

    def number(self, name: str) -> float | None:
        value = self.take(name)
        if isinstance(value, bool) or (value is not None and not isinstance(value, (int, float))):
            self._wrong(name, value, "a number")
            return None
        return value

    def integer(self, name: str) -> int | None:
        value = self.take(name)
        if isinstance(value, str) and re.fullmatch(r"[0-9][0-9_]{0,20}", value):
            value = int(value)  # YAML 1.1's 500_000
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool):
            self._wrong(name, value, "an integer")
            return None
        return self._typed(name, value, int, "an integer")

    def texts(self, name: str) -> list[str]:
        """A list of strings; a string alone is a list of one."""
        value = self.take(name)
        value = [value] if isinstance(value, str) else value
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            self._wrong(name, value, "a list of strings")
            return []
        return value or []

    def group(self, name: str) -> Options:
        """A mapping; empty where it is not given."""
        value = self.take(name)
        return Options(self.draft, self._typed(name, value, dict, "a mapping") or {}, self.lines, (*self.steps, name))

    def groups(self, name: str) -> list[Options]:
        """A list of mappings."""
        value = self.take(name)
        if value is None:
            return []
        if not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            self._wrong(name, value, "a list of mappings")
            return []
        return [Options(self.draft, item, self.lines, (*self.steps, name, n)) for n, item in enumerate(value)]

    def _typed(self, name: str, value: Any, kind: type[T], need: str) -> T | None:
        if value is None or isinstance(value, kind):
            return value
        self._wrong(name, value, need)
        return None

    def _wrong(self, name: str, value: Any, need: str) -> None:
        kind = KINDS.get(type(value))
        noun = f" ({NOUNS.get(kind, f'a {kind}')})" if kind else ""
        self.draft.problems.append(f"{self.path(name)}: got {show(value)}{noun}, need {need} ({self.where(name)})")

    def where(self, name: str) -> str:
        line = self.line(name)
        return f"{self.draft.file.name}:{line}" if line else self.draft.file.name

    # ---- what becomes of them

    def set(self, field: str, name: str, to: Any) -> None:
        """A field of the recipe from one option."""
        self.draft.set(field, to, self.path(name), self.data.get(name), self.line(name))

    def drop(self, name: str, effect: str) -> None:
        self.taken.add(name)
        self.draft.dropped.append(Left(self.path(name), self.data.get(name), effect, self.line(name)))

    def refuse(self, name: str, why: str) -> None:
        self.taken.add(name)
        self.draft.refused.append(Left(self.path(name), self.data.get(name), why, self.line(name)))

    def drop_all(self, effects: Mapping[str, str]) -> None:
        """Drop those of the options that are given."""
        for name, effect in effects.items():
            if self.data.get(name) is not None and name not in self.taken:
                self.drop(name, effect)
            self.taken.add(name)

    def refuse_all(self, reasons: Mapping[str, str]) -> None:
        """Refuse those that are given and not turned off."""
        for name, why in reasons.items():
            if self.is_on(name) and name not in self.taken:
                self.refuse(name, why)
            self.taken.add(name)

    def is_on(self, name: str) -> bool:
        """Whether an option has a value that is not null, false or empty."""
        value = self.data.get(name)
        return value not in (None, False, "", [], {}) and not (isinstance(value, str) and value.lower() in _FALSE)

    def without_prefix(self, prefix: str) -> None:
        """Read names that begin with the prefix as those without it."""
        short = {name.removeprefix(prefix): name for name in self.data}
        self.data = {name: self.data[full] for name, full in short.items()}
        self.spelling = {name: full for name, full in short.items() if name != full}

    def finish(self, known: Iterable[str], what: str) -> None:
        """Refuse all options that nothing has looked at. Call it last: it lists those that were only looked at, too.

        Args:
            known: names of other options of the tool.
            what: what they are options of.
        """
        names = {*known}
        for name, value in self.data.items():
            if name in self.taken:
                continue
            if name in names:
                if self.is_on(name):
                    self.refuse(name, "distft has nothing like it")
                continue
            near = did_you_mean(closest(name, sorted(names | self.taken)))
            why = f"not an option of {what}{near}"
            if value is None:
                self.drop(name, f"{why}; it is not set")
            else:
                self.refuse(name, why)
        self._list_unlisted()

    def _list_unlisted(self) -> None:
        """Options that decide about others, and have no field themselves."""
        draft = self.draft
        left = draft.dropped + draft.refused
        listed = "\n".join([*(item.option for item in draft.mapped), *(item.option for item in left)])
        for name in self.data:
            shown = self.path(name)
            if self.is_on(name) and not re.search(rf"(^|[ .]){re.escape(shown)}($|[ .\[])", listed, re.MULTILINE):
                draft.mapped.append(Mapped(shown, self.data[name], None, None, self.line(name)))
