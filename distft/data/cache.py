"""The cache of prepared data: its key, which digests all that goes into it, and its counts. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distft.config.recipe import Recipe, Source
from distft.data.hub import model_commit, pinned
from distft.data.sources import as_sources, find_data

# Increase it when train/data.py starts to make different rows or counts from the same input.
PREPARATION_VERSION = 7
COUNTS = "counts.json"
PROGRESS_FD = "DISTFT_PROGRESS_FD"  # the descriptor of the terminal where a preparation shows how far it is


def cache_root() -> Path:
    """distft's cache: DISTFT_CACHE, or a folder in the user's cache."""
    own = os.environ.get("DISTFT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distft"


def cache_folder(recipe: Recipe, root: str | None = None) -> Path:
    """The folder of a recipe's prepared data, under `root` or cache_root(). Its name digests all that goes into it."""
    versions = (_version(package) for package in ("transformers", "tokenizers", "trl"))
    name = digest(PREPARATION_VERSION, content_digest(recipe), *versions)
    return (Path(root) if root else cache_root()) / "data" / name


def content_digest(recipe: Recipe) -> str:
    """A digest of what a recipe's prepared data depends on: the content of its files, the tokenizer, the settings.

    Raises:
        DataError: a file is not here, or the commit of a hub data set cannot be found out.
    """
    data, model = recipe.data, recipe.model
    words: list[object] = [data.format, data.max_length, data.packs, data.long_rows, recipe.training.seed]
    words += [sorted(data.columns.items()), sorted(data.roles.items()), data.train_on, sorted(data.ignore_fields)]
    words += [model.eos_token, *model.add_tokens]
    words += [model.pad_token, model.trust_remote_code, data.eval if isinstance(data.eval, float) else None]
    for use, several in find_data(data, lambda source: Path(source.path).is_absolute()).items():
        words.append(use)
        for found in several:
            words += _share(found.source)
            words += [part for file in found.files for part in (file.kind, file.separator, file_digest(file.local()))]
    for source in (*as_sources(data.train), None, *as_sources(data.eval)):
        if source and not Path(source.path).is_absolute():
            words += [*_share(source), source.config, pinned(source.path)]
    folder = Path(model.name_or_path)
    if folder.is_dir():
        # All files but weights and model cards: any of them may be part of the tokenizer.
        files = (p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix not in (".safetensors", ".bin", ".md"))
        words += [part for path in files for part in (path.name, file_digest(path))]
    else:
        words += [model.name_or_path, model_commit(model.name_or_path, model.revision) or model.revision]
    if data.chat_template:
        template = Path(data.chat_template)
        words.append(template.read_bytes() if template.is_absolute() else data.chat_template)
    return digest(*words)


def _share(source: Source) -> list[object]:
    return [source.weight, source.rows, source.epochs]


def digest(*words: object) -> str:
    """A name for what these words say."""
    import hashlib  # only here: it loads OpenSSL, which takes longer than a plan

    digest = hashlib.sha256()
    for word in words:
        data = word if isinstance(word, bytes) else str(word).encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:32]


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file."""
    import hashlib

    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def is_prepared(folder: Path) -> bool:
    """Whether a cache folder is complete: it appears by a rename, with its counts in it."""
    return (folder / COUNTS).is_file()


def write_counts(folder: Path, counts: Mapping[str, dict[str, Any]], recipe: Recipe) -> None:
    """What the preparation counted, per split (Counts in train/encoding.py). Files are named by their number: those of
    another recipe may have the same content, and other names."""
    numbers = {name: number for number, name in _names(recipe).items()}
    text = json.dumps({split: _renamed(count, numbers) for split, count in counts.items()})
    (folder / COUNTS).write_text(text)


def read_counts(folder: Path, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The same, with the names that sources and files have in this recipe."""
    names = _names(recipe)
    counts: dict[str, dict[str, Any]] = json.loads((folder / COUNTS).read_text())
    for split, count in counts.items():
        sources = as_sources(getattr(recipe.data, split))
        mix = [[source.path, have, taken] for source, (_, have, taken) in zip(sources, count["mix"], strict=False)]
        counts[split] = _renamed(count, names) | {"mix": mix}
    return counts


def _names(recipe: Recipe) -> dict[str, str]:
    """The names of a recipe's files on this machine, by their number. Those on the hub are the same in all recipes."""
    return {
        f"{use}/{number}": file.name
        for use, several in find_data(recipe.data, lambda source: Path(source.path).is_absolute()).items()
        for number, file in enumerate(file for found in several for file in found.files)
    }


def _renamed(count: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """One split's counts with other names for its files."""

    def name(old: str) -> str:
        return names.get(old, old)

    def place(old: str) -> str:
        file, _, row = old.rpartition(":")
        return f"{name(file)}:{row}"

    return count | {
        "examples": [(place(where), tokens) for where, tokens in count["examples"]],
        "cut_examples": [place(where) for where in count["cut_examples"]],
        **{
            name: {kind: (rows, place(where), text) for kind, (rows, where, text) in count[name].items()}
            for name in ("untrained", "odd")
        },
        "empty": [name(file) for file in count["empty"]],
    }
