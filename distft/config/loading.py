"""A document → a pydantic model, or all its problems at once: dotted path, what was got, what is needed, where.

The words of a message come from the model's JSON schema, so a new field needs nothing here. `validate` serves any
model; `load_recipe` adds what only a recipe has.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distft.config import paths, schema_text
from distft.config.document import Document, M, dump_yaml, load_yaml
from distft.config.paths import PATH_FIELDS
from distft.config.recipe import EXCLUSIVE_FIELDS, EXCLUSIVE_IN_SOURCE, FORMAT_COLUMNS, OF_LORA, Oft, Recipe
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
    fits,
    keys,
    options,
    show,
)
from distft.errors import NoModelError, PlanError, RecipeError

# Lists in which something that is there twice was meant to be something else.
LISTS_OF_NAMES = (
    ("lora", "target_modules"),
    ("lora", "exclude_modules"),
    ("lora", "layers_to_transform"),
    ("lora", "modules_to_save"),
    ("model", "add_tokens"),
    ("training", "train_only"),
)
DATA_FILES = ("data.train", "data.eval", "data.chat_template")


def validate(document: Document[M]) -> M:
    """The model that a document describes.

    Raises:
        RecipeError: all problems: those the document has noted, and the model's.
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
    """A recipe, and what the user should know about how it was read.

    `model_hint` is what may have been meant by the model's name, to be put after an error: a hub id may be a folder's
    name that is misspelt, and only the hub knows. `places` is where the recipe's values are, by their dotted names.
    """

    recipe: Recipe
    notes: tuple[str, ...]
    model_hint: str = ""
    places: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def placing_errors(self) -> Iterator[None]:
        """Puts after a PlanError what only this knows: the places of the values that it is about."""
        try:
            yield
        except PlanError as error:
            hint = self.model_hint if isinstance(error, NoModelError) else ""
            lines = [self._placed(line) for line in f"{error}{hint}".splitlines()]
            raise type(error)("\n".join(lines)) from None

    def _placed(self, line: str) -> str:
        name = re.match(r"[a-z_]+(\.[a-z_]+)*(?=: )", line)
        place = self.places.get(name[0]) if name else None
        return f"{line} ({place})" if place else line


def read_recipe(path: str | Path, sets: Sequence[str] = (), needed: Collection[str] = ()) -> LoadedRecipe:
    """Read a recipe and lay `dotted.key=value` overrides over it. Local paths (relative to its folder) become absolute.

    Args:
        needed: those of DATA_FILES whose files must be on this machine; others that are not are noted.

    Raises:
        RecipeError: all problems at once.
    """
    document = load_yaml(path, Recipe, sets)
    try:
        return read_document(document, Path(path).parent, needed)
    except RecipeError as error:
        error.read = (document.name, document.data)
        raise


def read_document(document: Document[Recipe], folder: Path, needed: Collection[str] = ()) -> LoadedRecipe:
    """The same of a document that is or will be in `folder`. Raises RecipeError for all problems at once."""
    notes = [*_replace_exclusive(document), *_resolve_paths(document, folder, needed)]
    _check_together(document)
    wrong_data: RecipeError | None = None
    try:
        recipe = validate(document)
    except RecipeError as error:
        if any(steps[:1] != ("data",) for steps in document.wrong):
            raise
        try:
            recipe = document.model.model_validate(document.data)
        except ValidationError:
            raise error from None
        wrong_data = error
    name = Path(recipe.model.name_or_path)
    hint = "" if name.is_absolute() else paths.near(paths.locate(folder, str(name)))
    places = {dotted(steps): document.where(steps) for steps in document.places if steps}
    loaded = LoadedRecipe(recipe, tuple(notes), hint, places)
    if wrong_data is not None:
        wrong_data.loaded = loaded
        raise wrong_data
    return loaded


def load_recipe(path: str | Path, sets: Sequence[str] = (), needed: Collection[str] = ()) -> Recipe:
    """The recipe alone: see read_recipe."""
    return read_recipe(path, sets, needed).recipe


def dump_recipe(recipe: Recipe) -> str:
    """YAML with all fields; `load_recipe` reads an equal recipe from it, whatever folder it is in."""
    return dump_yaml(recipe)


def _explain(document: Document[Any], error: ValidationError) -> None:
    """Note pydantic's errors in our words: one per value, where each member of a union has a complaint of its own."""
    found: dict[Steps, Any] = {}
    for item in error.errors(include_url=False):
        steps: Steps = ()
        for n, step in enumerate(item["loc"], 1):
            # A step that is neither in the data nor missing from it is pydantic's name for a member of a union.
            missing = item["type"] == "missing" and n == len(item["loc"])
            if missing or document.get((*steps, step), found) is not found:
                steps += (step,)
        found.setdefault(steps, item)
    outer = {steps[:n] for steps in found for n in range(len(steps))}  # another member of the union got further here
    for steps, item in found.items():
        if steps in outer or steps in document.wrong:
            continue
        kind, schema = item["type"], schema_text.field(document.schema, steps)
        if kind == "extra_forbidden":
            text = _unknown(document.schema, steps)
        elif kind == "missing":
            text = f"missing, need {describe(schema)}"
        elif kind in ("value_error", "assertion_error"):  # the words of a validator
            text = str(item["ctx"]["error"])
        else:
            text = _got(schema, document.get(steps))
        document.problem(steps, text)


def _unknown(schema: dict[str, Any], steps: Steps) -> str:
    """An unknown key: where it belongs, else what may have been meant, else what is allowed."""
    name = str(steps[-1])
    for known_steps in keys(schema):
        if known_steps[-1] == name:
            return f"unknown key; it belongs in {dotted(known_steps[:-1]) or 'the top level'}"
    known = [key for option in options(schema_text.field(schema, steps[:-1])) for key in option.get("properties", ())]
    return "unknown key" + (did_you_mean(closest(name, known)) or f"; allowed: {', '.join(known)}")


def _got(schema: dict[str, Any], value: Any) -> str:
    """`got 0, need >= 1`; types are named where the value has none of those allowed."""
    need, right_type = describe(schema), fits(schema, value)
    if right_type and isinstance(value, (int, float)) and len(options(schema)) == 1:
        need = re.sub(r"^an? \w+ ", "", need)
    kind = KINDS.get(type(value))
    noun = (
        "" if kind is None else " (empty)" * (value in ("", [])) if right_type else f" ({NOUNS.get(kind, f'a {kind}')})"
    )
    words = [word for option in options(schema) for word in choices(option)]
    near = closest(value, [word for word in words if isinstance(word, str)], 0.5) if isinstance(value, str) else None
    return f"got {show(value)}{noun}, need {need}{did_you_mean(near)}"


def _resolve_paths(document: Document[Recipe], folder: Path, needed: Collection[str]) -> list[str]:
    """Make local paths absolute. Returns a note on each that is not here, unless it is `needed`, and so a problem."""
    notes = []
    for path_field in PATH_FIELDS:
        value = document.get(path_field.steps)
        several = [(*path_field.steps, n) for n in range(len(value))] if isinstance(value, list) else [path_field.steps]
        for steps in [(*steps, "path") if isinstance(document.get(steps), dict) else steps for steps in several]:
            text = document.get(steps)
            if not isinstance(text, str) or not text:
                continue
            if path_field.cuts is paths.data_cuts and re.fullmatch(r"[@:][^/]+", text) and not (folder / text).exists():
                text_of = "after the folder or hub id that has it, as in owner/name"
                document.problem(steps, f"got {show(text)}, which names nothing; write it {text_of}{text}")
                continue
            path, after = paths.find(folder, text, path_field)
            shown = clip(clean(str(path)), 300)
            if not paths.holds(path_field.is_there, path):
                is_file_of_another_kind = path_field.kind == "file" and paths.holds(Path.exists, path)
                if paths.is_allowed_instead(text, path_field) and not is_file_of_another_kind:
                    if dotted(path_field.steps) in needed and paths.is_in_a_folder_here(path, text, path_field):
                        at_hub = f"; the hub's data set is hf://datasets/{text}"
                        hint = paths.hint(path, text, path_field)
                        document.problem(steps, f"no such {path_field.kind}: {shown}{hint}{at_hub}")
                    continue
                if paths.is_url(text):
                    document.problem(steps, f"got {show(text)}, URLs are not supported: download it and give its path")
                    continue
                hint = paths.hint(path, text, path_field)
                if path_field.absent is None or dotted(path_field.steps) in needed or paths.holds(Path.exists, path):
                    document.problem(steps, f"{paths.missing(path, path_field.kind)}: {shown}{hint}")
                    continue
                notes.append(f"{dotted(steps)}: {shown} is not here{path_field.absent}{hint}")
            elif after and not path.is_dir():
                document.problem(steps, _no_split(str(steps[1]), text, shown, after))
            document.get(steps[:-1])[steps[-1]] = f"{path}{after}"
    return notes


def _no_split(use: str, text: str, path: str, after: str) -> str:
    """What is wrong with a split or configuration of what is no folder."""
    what = f"split {after[1:]}" if after.startswith(":") else f"configuration {after[1:].partition(':')[0]}"
    fix = "name another file, or hold rows out with a fraction such as 0.05" if use == "eval" else f"leave {after} out"
    return (
        f"got {show(text)}, but {path} is no folder or hub id, so it has no {what}; {fix}, or name the folder with all "
        f"splits, as in {Path(text).parent if Path(text).parent != Path() else 'data'}{after}"
    )


def _replace_exclusive(document: Document[Recipe]) -> list[str]:
    """Where an override sets one of several exclusive fields, drop what the file has for the others.

    Returns a note on each that was dropped. Two from the same source are a problem.
    """
    notes = []
    for names in EXCLUSIVE_FIELDS:
        fields: list[Steps] = [tuple(name.split(".")) for name in names]
        given = [steps for steps in fields if document.get(steps) not in (None, "auto")]
        overrides = [steps for steps in given if isinstance(document.place(steps), str)]
        if len(overrides) == 1:
            for steps in given:
                if steps not in overrides:
                    had = f"{dotted(steps)}: {show(document.get(steps))} ({document.where(steps)})"
                    notes.append(f"{had} is replaced by {document.where(overrides[0])}")
                    del document.get(steps[:-1])[steps[-1]]
        elif len(given) > 1:
            document.problem(given[-1], f"cannot be given with {dotted(given[0])}; set one of them to null")
    return notes


def _check_together(document: Document[Recipe]) -> None:
    """Check what concerns two fields at once. On the data, so that these problems are listed with all others."""
    if ("lora",) in document.blank and document.get(("lora",)) is None:
        # With all lines below it commented out, all weights would be trained without a word.
        document.problem(("lora",), "has nothing below it; write null to train all weights, or leave the key out")
    kind = document.get(("data", "format"), "auto")
    if document.get(("data", "long_rows")) == "split" and kind in FORMAT_COLUMNS and kind != "text":
        document.problem(("data", "long_rows"), f"split needs format text, got {kind}; use error, truncate or drop")
    _check_columns(document, kind)
    _check_targets(document)
    _check_loraplus(document)
    _check_initial(document)
    _check_oft(document)
    _check_train_only(document)
    for name in ("train", "eval"):
        _check_sources(document, ("data", name))


def _check_columns(document: Document[Recipe], kind: Any) -> None:
    """Check that one format has all the columns that data.columns maps."""
    columns = document.get(("data", "columns"))
    if not isinstance(columns, dict):
        return
    known = FORMAT_COLUMNS.get(kind) or tuple(dict.fromkeys(itertools.chain(*FORMAT_COLUMNS.values())))
    for name in columns:
        if name not in known:
            of = "" if kind == "auto" else f" of format {kind}"
            hint = did_you_mean(closest(name, known)) or f"; those{of} are {', '.join(known)}"
            document.problem(("data", "columns", name), f"not a column{of} that can be given another name{hint}")
    if (
        kind == "auto"
        and set(columns) <= set(known)
        and not any(set(columns) <= set(v) for v in FORMAT_COLUMNS.values())
    ):
        document.problem(("data", "columns"), f"no format has all of {', '.join(columns)}")


def _check_targets(document: Document[Recipe]) -> None:
    """Check the regular expressions of lora, and that a string is one, and no name: it must match whole names."""
    for steps, need in ((("lora", "target_modules"), ["all-linear"]), (("lora", "exclude_modules"), [])):
        value = document.get(steps)
        if not isinstance(value, str) or value in ("", *need):
            continue
        if re.fullmatch(r"[\w-]+", value):
            hint = did_you_mean(closest(value, need, 0.5)) or f"; for layers of that name, write [{value}]"
            allowed = " or a ".join([", ".join([*need, "a list"]), "regular expression"])
            document.problem(steps, f"got {show(value)}, need {allowed}{hint}")
        else:
            _check_pattern(document, steps, value)
    for steps in (("lora", "rank_pattern"), ("lora", "alpha_pattern")):
        patterns = document.get(steps)
        for pattern in patterns if isinstance(patterns, dict) else ():
            _check_pattern(document, (*steps, pattern), str(pattern))
    for steps in LISTS_OF_NAMES:
        values = document.get(steps)
        for n, value in enumerate(values if isinstance(values, list) else ()):
            if value in values[:n]:
                document.problem((*steps, n), f"got {show(value)}, which is in the list already")
    targets, blocks = ("lora", "target_modules"), ("lora", "layers_to_transform")
    if isinstance(value := document.get(targets), str) and value != "all-linear" and document.get(blocks) is not None:
        text = "cannot be given with a regular expression in lora.target_modules, which can name the blocks itself"
        document.problem(blocks, text)


def _check_train_only(document: Document[Recipe]) -> None:
    steps: Steps = ("training", "train_only")
    value = document.get(steps)
    for n, pattern in enumerate(value if isinstance(value, list) else ()):
        if isinstance(pattern, str):
            _check_pattern(document, (*steps, n), pattern, f"(?:{pattern})")


def _check_loraplus(document: Document[Recipe]) -> None:
    steps: Steps = ("lora", "loraplus_lr_embedding")
    if document.get(steps) is not None and document.get(("lora", "loraplus_lr_ratio")) is None:
        document.problem(steps, "needs lora.loraplus_lr_ratio, without which it has no effect")


def _check_initial(document: Document[Recipe]) -> None:
    steps: Steps = ("lora", "init_lora_weights")
    if document.get(steps) not in (None, True) and document.get(("lora", "start_from")) is not None:
        document.problem(steps, "cannot be given with lora.start_from, whose weights the adapter starts with")


def _check_oft(document: Document[Recipe]) -> None:
    steps: Steps = ("lora", "oft")
    if steps in document.blank and document.get(steps) is None:
        document.problem(steps, "has nothing below it; write {} for peft's defaults, or leave the key out for LoRA")
    if not isinstance(oft := document.get(steps), dict):
        return
    for name in OF_LORA:
        if document.get(("lora", name)) is not None:
            hint = "; the number of blocks is lora.oft.r" if name == "r" else ""
            document.problem(("lora", name), f"is of LoRA, and cannot be given with lora.oft{hint}")
    for name, switch in (("eps", "coft"), ("num_cayley_neumann_terms", "use_cayley_neumann")):
        defaults = {field: Oft.model_fields[field].default for field in (name, switch)}
        if oft.get(name) not in (None, defaults[name]) and oft.get(switch, defaults[switch]) is False:
            document.problem((*steps, name), f"needs lora.oft.{switch}: true, without which it has no effect")


def _check_pattern(document: Document[Recipe], steps: Steps, value: str, used: str | None = None) -> None:
    """Check that a value, as it is `used`, is a regular expression."""
    try:
        re.compile(used or value)
    except (re.error, RecursionError, OverflowError) as error:
        document.problem(steps, f"got {show(value)}, which is no regular expression ({error})")


def _check_sources(document: Document[Recipe], steps: Steps) -> None:
    """Check what the sources of a mix say of their share."""
    sources = document.get(steps)
    if not isinstance(sources, list):
        return
    for n, source in enumerate(sources):
        given = [name for name in EXCLUSIVE_IN_SOURCE if isinstance(source, dict) and source.get(name) is not None]
        if len(given) > 1:
            document.problem((*steps, n, given[1]), f"cannot be given with {given[0]}; set one of them to null")
    weighted = [isinstance(source, dict) and source.get("weight") is not None for source in sources]
    if any(weighted) and not all(weighted):
        document.problem((*steps, weighted.index(False)), "has no weight, and others have; give it to all or to none")
