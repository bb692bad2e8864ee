"""Which files of a folder belong to which split: by README.md, or by their names, as `datasets` finds it.

The patterns and their order are those of datasets.data_files (5.2). Only files that distft can read count here;
`datasets` also counts others, and refuses the folder where those alone have the name of a split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from distft.errors import DataError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
README, YAML = "README.md", ".huggingface.yaml"
IGNORED = ("README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")

_SHARDS = re.compile(r"data/(?P<split>[^/]+)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
KEYWORDS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "dev", "val"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
_SEPARATORS = "[-._ 0-9]"
_IN_FOLDER_NAMES = (
    "**/{word}/**",
    "**/{word}{sep}*/**",
    "**/*{sep}{word}/**",
    "**/*{sep}{word}{sep}*/**",
)
_IN_FILE_NAMES = ("**/{word}{sep}*", "**/*{sep}{word}{sep}*")
_FRONT_MATTER = re.compile(r"^(\s*---[\r\n]+)(?P<yaml>[\S\s]*?)([\r\n]+---(\r\n|\r|\n|$))")  # huggingface_hub's
# What a configuration in README.md says that does not change the rows.
_HARMLESS = frozenset(
    ("config_name", "data_files", "data_dir", "default", "description", "version", "features", "sep", "delimiter")
)


@dataclass(frozen=True)
class Config:
    """A configuration of a README.md. `patterns`: split → patterns, or None where the files' names tell the splits.
    `folder`: what the patterns are relative to. `separator`: of the fields in CSV files."""

    name: str
    patterns: dict[str, list[str]] | None
    folder: str
    separator: str | None
    is_default: bool


@dataclass(frozen=True)
class Splits:
    """split → its files, and what told them apart."""

    files: dict[str, list[str]]
    how: str
    separator: str | None = None


def read_configs(readme: str | None, more: str | None, where: str) -> list[Config]:
    """The configurations in the front matter of README.md and in .huggingface.yaml, which goes first.

    Args:
        where: the folder, for messages.

    Raises:
        DataError: they cannot be understood.
    """
    import yaml

    values: dict[str, Any] = {}
    front = _FRONT_MATTER.match(readme or "")
    for text, name in ((front and front["yaml"], README), (more, YAML)):
        if text:
            try:
                values |= yaml.safe_load(text) or {}
            except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
                reason = str(error).splitlines()[0]
                raise DataError(f"{where}/{name}: its YAML cannot be read ({reason})") from None
    configs = values.get("configs") or []
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        raise DataError(f"{where}/{README}: configs: need a list of mappings with config_name and data_files")
    return [_config(config, f"{where}/{README}: configs[{n}]", len(configs)) for n, config in enumerate(configs)]


def _config(config: dict[str, Any], where: str, count: int) -> Config:
    name = config.get("config_name")
    if not isinstance(name, str):
        raise DataError(f"{where}.config_name: got {name!r}, need a string")
    if unknown := [key for key in config if key not in _HARMLESS and not key.startswith("drop_")]:
        raise DataError(f"{where}.{unknown[0]}: not supported; name the data's files instead of the folder")
    return Config(
        name,
        None if config.get("data_files") is None else _patterns(config["data_files"], f"{where}.data_files"),
        str(config.get("data_dir") or "").strip("/"),
        config.get("sep") or config.get("delimiter"),
        count == 1 or name == "default" or bool(config.get("default")),
    )


def _patterns(value: Any, where: str) -> dict[str, list[str]]:
    """split → patterns, from the forms that data_files may have."""
    entries = [{"split": TRAIN, "path": value}] if isinstance(value, str) else value
    if isinstance(entries, list) and all(isinstance(entry, str) for entry in entries):
        entries = [{"split": TRAIN, "path": entries}]
    found: dict[str, list[str]] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        split, path = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        several = [path] if isinstance(path, str) else path
        if not isinstance(split, str) or not isinstance(several, list) or split in found:
            raise DataError(f"{where}: need a path, a list of paths, or a list of one split and path for each split")
        found[split] = [str(one) for one in several]
    return found


def choose_config(configs: Sequence[Config], wanted: str | None, where: str) -> Config | None:
    """The configuration with this name, else the default one. None where a folder has none.

    Raises:
        DataError: there is none of this name, or none is the default.
    """
    names = ", ".join(config.name for config in configs)
    if wanted is not None:
        found = next((config for config in configs if config.name == wanted), None)
        if found is None:
            raise DataError(f"{where}: no configuration {wanted}; " + (f"it has {names}" if names else "it has none"))
        return found
    default = [config for config in configs if config.is_default]
    if configs and len(default) != 1:
        raise DataError(f"{where}: several configurations; name one of them with @ or config: {names}")
    return default[0] if default else None


def find_splits(names: Iterable[str], config: Config | None, where: str) -> Splits:
    """The splits of the data files `names`, paths relative to the folder; each split's files in the order of the
    patterns.

    Raises:
        DataError: a file that README.md names is not there, or a split's name cannot be one.
    """
    folder = f"{config.folder}/" if config and config.folder else ""
    below = sorted(name.removeprefix(folder) for name in names if name.startswith(folder))
    separator = config.separator if config else None
    if config and config.patterns is not None:
        files = {split: _select(below, patterns) for split, patterns in config.patterns.items()}
        for pattern in (pattern for patterns in config.patterns.values() for pattern in patterns):
            if not re.search(r"[*?[]", pattern) and not _select(below, [pattern]):
                raise DataError(f"{where}/{README}: {folder}{pattern} is not there, or no data file")
        how = f"{README}, configuration {config.name}"
    else:
        files, how = _by_name(below, where)
    return Splits({split: [folder + name for name in found] for split, found in files.items()}, how, separator)


def _by_name(names: list[str], where: str) -> tuple[dict[str, list[str]], str]:
    shards: dict[str, list[str]] = {}
    for name in names:
        if (match := _SHARDS.fullmatch(name)) and not is_unusual(name):
            shards.setdefault(match["split"], []).append(name)
    if shards:
        for split in shards:
            if not _SPLIT_NAME.fullmatch(split):
                raise DataError(f"{where}: data/{split}-…: {split!r} cannot be the name of a split; rename the files")
        first = [split for split in (TRAIN, VALIDATION, TEST) if split in shards]
        return {split: shards[split] for split in (*first, *sorted(shards.keys() - first))}, "names of shards"
    if found := _by_keyword(names):
        return found
    lower = _by_keyword([name.lower() for name in names])  # to `datasets`, Train.jsonl and Test.jsonl are one split
    how = "no split in the names" + ", which count in lower case only" * bool(lower)
    return {TRAIN: _select(names, ["**"])}, how


def _by_keyword(names: list[str]) -> tuple[dict[str, list[str]], str] | None:
    for forms, how in ((_IN_FOLDER_NAMES, "names of folders"), (_IN_FILE_NAMES, "names of files")):
        found = {
            split: _select(names, [form.format(word=word, sep=_SEPARATORS) for word in words for form in forms])
            for split, words in KEYWORDS.items()
        }
        if any(found.values()):
            return {split: files for split, files in found.items() if files}, how
    return None


def _select(names: list[str], patterns: list[str]) -> list[str]:
    """The names that match, in the order of the patterns; each once."""
    found: dict[str, None] = {}
    for pattern in patterns:
        regex, hidden, special = _compile(pattern)
        last = pattern.rpartition("/")[2]
        for name in names:
            if name in found or not regex.fullmatch(name) or (hidden, special) != _unusual(name):
                continue
            if PurePosixPath(name).name in IGNORED and PurePosixPath(name).name != last:
                continue
            found[name] = None
    return list(found)


def _unusual(name: str) -> tuple[int, int]:
    """How many parts of a path are hidden, and how many of its folders are special (`__pycache__`). Files there count
    only where a pattern names just as many."""
    parts = name.split("/")
    hidden = sum(part.startswith(".") and set(part) != {"."} for part in parts)
    return hidden, sum(part.startswith("__") for part in parts[:-1])


def is_unusual(name: str) -> bool:
    """Whether a file is hidden, or in a folder that is hidden or special."""
    return _unusual(name) != (0, 0)


@lru_cache(maxsize=256)
def _compile(pattern: str) -> tuple[re.Pattern[str], int, int]:
    """A pattern as fsspec reads it: `**` is any folders, or, as the last part, anything below."""
    *folders, last = pattern.removeprefix("./").split("/")
    text = "".join("(?:.+/)?" if part == "**" else _translate(part) + "/" for part in folders)
    return (re.compile(text + (".*" if last == "**" else _translate(last)), re.DOTALL), *_unusual(pattern))


def _translate(part: str) -> str:
    signs: dict[str, Callable[[], str]] = {"*": lambda: "[^/]*", "?": lambda: "[^/]"}
    pieces = re.split(r"(\*+|\?|\[!?\]?[^\]]*\])", part)
    return "".join(
        re.escape(piece) if n % 2 == 0 else signs[piece[0]]() if piece[0] in signs else _translate_set(piece[1:-1])
        for n, piece in enumerate(pieces)
    )


def _translate_set(inside: str) -> str:
    negated, inside = inside.startswith("!"), inside.removeprefix("!")
    escaped = re.sub(r"([\\\[\]^&~|])", r"\\\1", inside)
    return f"(?!/)[{'^' * negated}{escaped}]"
