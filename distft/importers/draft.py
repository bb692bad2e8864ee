"""The recipe while it is put together, and what became of each option."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from distft.config import paths
from distft.config.document import Document, dump_data
from distft.config.loading import read_document
from distft.config.paths import PATH_FIELDS, PathField
from distft.config.recipe import Recipe
from distft.config.schema_text import show

ANCESTORS = 4  # how many folders above a file are searched for what it names
# Without these there is no recipe, and what stands for them while the rest is checked.
_NEEDED = {"name": "part", "model.name_or_path": "a-model", "data.train": "owner/name"}
_DATA_FIELD = next(field for field in PATH_FIELDS if field.steps == ("data", "train"))
_MODEL_FIELD = next(field for field in PATH_FIELDS if field.steps == ("model", "name_or_path"))


@dataclass(frozen=True)
class Mapped:
    """An option, or several together, and the field that says the same; None for one that decides about the fields of
    others. `line` is None for a default."""

    option: str
    value: Any
    field: str | None
    to: Any
    line: int | None = None


@dataclass(frozen=True)
class Left:
    """An option that the recipe does not have, and why, or with what effect."""

    option: str
    value: Any
    why: str
    line: int | None = None


@dataclass
class Draft:
    """What is imported so far.

    Args:
        kind: name of the tool, as people write it.
        file: the file that is read; what it names is looked for from its folder.
        target: the folder that the recipe is for.
        gpus: --gpus.
        stem: the recipe's file name without its suffix, after which its chat template is named.
    """

    kind: str
    file: Path
    target: Path
    gpus: int | None = None
    stem: str = "recipe"
    fields: dict[str, Any] = field(default_factory=dict)  # dotted name → value
    mapped: list[Mapped] = field(default_factory=list)
    dropped: list[Left] = field(default_factory=list)
    refused: list[Left] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # what is wrong with the file itself
    cluster: dict[str, Any] | None = None
    is_part: bool = False  # of a recipe: there is no model and no data
    template: str | None = None  # text of a chat template that is written beside the recipe

    def set(self, name: str, to: Any, option: str, value: Any = None, line: int | None = None) -> None:
        """Give a field of the recipe its value, in place of an earlier one."""
        self.fields[name] = to
        self.mapped = [item for item in self.mapped if item.field != name]
        self.mapped.append(Mapped(option, value, name, to, line))

    def set_template(self, text: str, option: str, value: Any = None, line: int | None = None) -> None:
        """A chat template that is written beside the recipe, under its name: imports into one folder keep their own."""
        self.template = text
        self.set("data.chat_template", self.template_file, option, value, line)

    @property
    def template_file(self) -> str:
        return f"{self.stem}.jinja"

    def change(self, name: str, to: Any) -> None:
        """Another value for a field that has one, from the same option."""
        self.fields[name] = to
        self.mapped = [replace(item, to=to) if item.field == name else item for item in self.mapped]

    def default(self, name: str, to: Any, option: str) -> None:
        """Give a field the value that the tool takes where its file says nothing."""
        if name not in self.fields:
            self.set(name, to, f"{option} ({self.kind}'s default)", to)

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def global_batch_size(
        self, parts: Mapping[str, int], shared: Mapping[str, int], why: str = "", alone: str = ""
    ) -> None:
        """training.global_batch_size from its factors per GPU, and --gpus, without which that is a problem.

        Args:
            shared: numbers of GPUs that work on the same rows.
            why: what to say of the factors.
            alone: what says that they were used on one GPU, whatever --gpus is.
        """
        product, sharing = prod(parts.values()), prod(shared.values())
        text = " x ".join(f"{name} {factor}" for name, factor in parts.items())
        if alone:
            self.set("training.global_batch_size", product, f"{text} x 1 GPU")
            if self.gpus not in (None, 1):
                self.warn(f"training.global_batch_size: {product}, without --gpus {self.gpus}: {alone}")
            return
        if self.gpus is None:
            self.problems.append(
                f"--gpus is missing: {self.file.name} says {text} for each GPU{why}, and not on how many it was used; "
                f"with --gpus N, training.global_batch_size is {product} x N"
            )
            return
        if not self.needs_gpus(shared):
            return
        division = f" / {' / '.join(f'{name} {factor}' for name, factor in shared.items())}" if shared else ""
        self.set("training.global_batch_size", product * self.gpus // sharing, f"{text} x --gpus {self.gpus}{division}")

    def needs_gpus(self, sizes: Mapping[str, int]) -> bool:
        """Whether --gpus is a multiple of the sizes of groups of GPUs; a problem where it is not."""
        product = prod(sizes.values())
        if self.gpus is None or self.gpus % product == 0:
            return True
        names = " x ".join(f"{name} {size}" for name, size in sizes.items())
        self.problems = [text for text in self.problems if not text.startswith("--gpus: got")]
        self.problems.append(f"--gpus: got {self.gpus}, need a multiple of {product} ({names})")
        return False

    # ---- paths

    def locate(self, text: str) -> Path | None:
        """A local path in the file: from its folder, from those above it (where a checkout's root is), or from here."""
        path = Path(text).expanduser()
        if path.is_absolute():
            return path if paths.holds(Path.exists, path) else None
        folder = self.file.parent.resolve()
        for above in [folder, *list(folder.parents)[:ANCESTORS], Path.cwd()]:
            if paths.holds(Path.exists, above / path):
                return above / path
        return None

    def near(self, text: str) -> str:
        """What may have been meant by a path that locate() does not find, to be put after an error."""
        return paths.near(self.file.parent / Path(text).expanduser())

    def relative(self, path: Path) -> str:
        """A path as it is written into the recipe: relative to its folder."""
        return os.path.relpath(path, self.target)

    def model_path(self, text: str) -> str:
        """A model: a hub id as it is, or a folder, whether it is here or not."""
        return self._path(text, _MODEL_FIELD, "model.name_or_path", "; `plan` and `launch` need it")

    def data_path(self, text: str) -> str:
        """A data set without a split: a hub id as it is, or a file or folder."""
        return self._path(text, _DATA_FIELD, "data.train")

    def _path(self, text: str, path_field: PathField, name: str, then: str = "") -> str:
        found = self.locate(text)
        if found is not None:
            return str(found) if Path(text).is_absolute() else self.relative(found)
        if paths.is_allowed_instead(text, path_field):
            return text
        if Path(text).expanduser().is_absolute():
            self.warn(f"{name}: {text} is not on this machine{then}{self.near(text)}")
            return text
        looked = f"; looked in {self.file.parent} and the folders above it"
        self.warn(f"{name}: {text} is not on this machine{then}{looked}{self.near(text)}")
        return self.relative(self.file.parent.resolve() / text)

    # ---- the result

    def lacks(self) -> list[str]:
        """The fields that the recipe needs and does not have."""
        return [name for name in _NEEDED if name not in self.fields]

    def recipe(self, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The recipe as nested groups, in the order of the recipe's fields. `more`: further fields."""
        fields = self.fields | dict(more or {})
        result: dict[str, Any] = {}
        for name in sorted(fields, key=_order):
            *groups, last = name.split(".")
            group = result
            for step in groups:
                if not isinstance(group.get(step), dict):
                    group[step] = {}
                group = group[step]
            group[last] = fields[name]
        return result

    def check(self, partial: bool = False) -> None:
        """Load the recipe as `validate` would. `partial`: it may lack the fields that it needs.

        Raises:
            RecipeError: it is not one. Models that are not on this machine are warnings here.
        """
        document = Document("recipe.yaml", Recipe)
        rest = {name: _NEEDED[name] for name in self.lacks()} if self.is_part or partial else {}
        document.parse(dump_data(self.recipe(rest)).encode())
        for steps in (("model", "name_or_path"), ("lora", "start_from")):
            text = document.get(steps)
            if isinstance(text, str) and not (self.target / Path(text).expanduser()).exists():
                if steps[0] == "model":
                    document.data["model"]["name_or_path"] = "a-model-of-the-hub"
                else:
                    document.data["lora"].pop("start_from")
        if self.template is not None:
            del document.data["data"]["chat_template"]  # it is written with the recipe
        for text in read_document(document, self.target).notes:
            self.warn(text)

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        lists = {name: [asdict(item) for item in getattr(self, name)] for name in ("mapped", "dropped", "refused")}
        cluster = {} if self.cluster is None else {"cluster": self.cluster}
        return {"kind": self.kind, "recipe": self.recipe(), **lists, "warnings": self.warnings, **cluster}


def _order(name: str) -> list[int]:
    """The place of a field among those of the recipe's schema."""
    model: Any = Recipe
    order = []
    for step in name.split("."):
        names = list(getattr(model, "model_fields", {}))
        order.append(names.index(step) if step in names else len(names))
        annotation = model.model_fields[step].annotation if step in names else None
        model = next(
            (a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")), None
        )
    return order


def in_words(option: str, value: Any) -> str:
    """`learning_rate: 0.0002`; the option alone where the value is part of its name."""
    return option if value is None or "(" in option or " x " in option else f"{option}: {show(value)}"
