"""Training data on disk: rows with their place, the check of every row, and the cache's key. No torch.

A row that does not fit is named by file, line and field before anything starts.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from distft.config.recipe import Recipe, Source
from distft.data.hub import pinned
from distft.data.reading import is_absent
from distft.data.sources import Use, as_sources, find_data
from distft.errors import DataError, MissingPartError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SHOWN_PROBLEMS = 5
# Increase it when train/data.py starts to make different rows from the same input.
PREPARATION_VERSION = 2
COUNTS = "counts.json"

Row = tuple[str, Mapping[str, Any]]  # its place ("train.jsonl:7"), and its fields


def as_list(sources: str | float | Sequence[str | Source] | None) -> list[str]:
    """The paths of data.train or data.eval; none for a fraction."""
    return [source.path for source in as_sources(sources)]


def to_read(recipe: Recipe, use: Use) -> list[str]:
    """The local files that data.train or data.eval stands for, and the names of its hub data sets."""
    found = find_data(recipe.data, lambda source: Path(source.path).is_absolute())[use]
    of_hub = [name for name in as_list(getattr(recipe.data, use)) if not Path(name).is_absolute()]
    return [*(str(file.local()) for source in found for file in source.files), *of_hub]


def local_files(source: str) -> list[Path] | None:
    """The files of a source of a loaded recipe. None for a hub id; local paths are absolute there.

    Raises:
        DataError: no such file, a folder without data files, or a file of another kind.
    """
    path = Path(source)
    if not path.is_absolute():
        return None
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise DataError(f"{source}: no data file in this folder; need {', '.join(SUFFIXES)}")
        return files
    if not path.is_file():
        raise DataError(f"{source}: no such file")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{source}: got a {path.suffix or 'suffix-less'} file, need {', '.join(SUFFIXES)}")
    return [path]


def read_rows(sources: Iterable[str]) -> Iterator[Row]:
    """All rows, in order.

    Raises:
        DataError: a file that is not what its suffix says; it names the line.
    """
    for source in sources:
        files = local_files(source)
        if files is None:
            yield from _read_hub(source)
        else:
            for path in files:
                yield from _READERS[path.suffix](path)


def _read_jsonl(path: Path) -> Iterator[Row]:
    name = str(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield _object(f"{name}:{number}", line)


def _object(place: str, text: bytes | str) -> Row:
    try:
        row = json.loads(text if isinstance(text, str) else text.decode())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{place}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: got a JSON {type(row).__name__}, need an object with fields")
    return place, row


def _read_json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); a file with one object per line is .jsonl") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: need a list of objects")
    for number, row in enumerate(rows, 1):
        yield f"{path}:[{number}]", row


def _read_csv(path: Path) -> Iterator[Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path}:{reader.line_num}: the number of fields differs from the header's")
                yield f"{path}:{reader.line_num}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not CSV in UTF-8 ({error})") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPartError(f'{path}: reading parquet needs pip install "distft[train]"') from None
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:[{number}]", row
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not parquet ({error})") from None


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _read_hub(source: str) -> Iterator[Row]:
    """Rows of a hub data set, `owner/name` or `owner/name:split`."""
    try:
        import datasets
    except ImportError:
        raise MissingPartError(f'{source}: a hub data set needs pip install "distft[train]"') from None
    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        # datasets raises its own errors, the hub client's and OSError; the user can fix the name or the network.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{source}: cannot read this hub data set ({reason[0]})") from None
    for number, row in enumerate(rows, 1):
        yield f"{source}[{number}]", row


def detect_format(row: Row) -> str:
    """messages, prompt_completion or text, by the fields of a row.

    Raises:
        DataError: it has the fields of none of them.
    """
    place, fields = row
    if "messages" in fields:
        return "messages"
    if "prompt" in fields and "completion" in fields:
        return "prompt_completion"
    if "text" in fields:
        return "text"
    raise DataError(
        f"{place}: got the fields {', '.join(fields) or '(none)'}; need messages, prompt + completion or text"
    )


def problem(row: Mapping[str, Any], data_format: str) -> str | None:
    """What is wrong with a row, with the field's name; None if nothing is."""
    if data_format == "messages":
        return _messages_problem(row.get("messages"))
    names = ("prompt", "completion") if data_format == "prompt_completion" else ("text",)
    for name in names:
        if name not in row:
            return f"{name}: missing; the row has {', '.join(row) or 'nothing'}"
        if not isinstance(row[name], str):
            return f"{name}: got {_shown(row[name])}, need a string"
    if not row[names[-1]].strip():
        return f"{names[-1]}: empty"
    return None


def _messages_problem(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"messages: got {_shown(messages)}, need a list of {{role, content}}"
    for index, message in enumerate(messages):
        for field in ("role", "content"):
            value = message.get(field) if isinstance(message, dict) else None
            if not isinstance(value, str):
                return f"messages[{index}].{field}: got {_shown(value)}, need a string"
    if not any(message["role"] == "assistant" for message in messages):
        return "messages: no assistant turn, so nothing to train on"
    return None


def _shown(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def check_rows(rows: Iterable[Row], data_format: str, what: str) -> Iterator[Row]:
    """Pass on the rows that fit; at the end, report those that do not.

    Raises:
        DataError: the first problems and how many there are, or that there is no row at all.
    """
    rows, problems, total = iter(rows), [], 0
    first = next(rows, None)
    if first is None:
        raise DataError(f"{what}: no rows")
    if data_format == "auto":
        data_format = detect_format(first)
    for place, row in (pair for part in ((first,), rows) for pair in part):
        total += 1
        if found := problem(row, data_format):
            problems.append(f"{place}: {found}")
        else:
            yield place, row
    if problems:
        more = [f"... and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise DataError("\n".join([*problems[:SHOWN_PROBLEMS], *more, f"{len(problems)} of {total} rows do not fit"]))


def are_here(recipe: Recipe) -> bool:
    """Whether all local data of a recipe is on this machine."""
    return not any(is_absent(source) for source in (*as_list(recipe.data.train), *as_list(recipe.data.eval)))


def first_format(sources: list[str]) -> str:
    """The format that `auto` stands for."""
    row = next(islice(read_rows(sources), 1), None)
    return detect_format(row) if row else "text"


def cache_root() -> Path:
    """distft's cache: DISTFT_CACHE, or a folder in the user's cache."""
    own = os.environ.get("DISTFT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distft"


def cache_folder(recipe: Recipe, root: str | None = None) -> Path:
    """The folder of a recipe's prepared data, under `root` or cache_root(). Its name digests all that goes into it."""
    versions = (_version(package) for package in ("transformers", "tokenizers", "trl"))
    name = _digest(PREPARATION_VERSION, content_digest(recipe), *versions)
    return (Path(root) if root else cache_root()) / "data" / name


def content_digest(recipe: Recipe) -> str:
    """A digest of what a recipe's prepared data depends on: the content of its files, the tokenizer, the settings.

    Raises:
        DataError: a file is not here, or the commit of a hub data set cannot be found out.
    """
    data, model = recipe.data, recipe.model
    words: list[object] = [data.format, data.max_length, data.packing, data.long_rows, recipe.training.seed]
    words += [sorted(data.columns.items()), sorted(data.roles.items()), data.train_on, sorted(data.ignore_fields)]
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
        words += [model.name_or_path, model.revision]
    if data.chat_template:
        template = Path(data.chat_template)
        words.append(template.read_bytes() if template.is_absolute() else data.chat_template)
    return _digest(*words)


def _share(source: Source) -> list[object]:
    return [source.weight, source.rows, source.epochs]


def _digest(*words: object) -> str:
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


def read_counts(folder: Path) -> dict[str, dict[str, Any]]:
    """What the preparation counted, per split (Counts in train/data.py)."""
    counts: dict[str, dict[str, Any]] = json.loads((folder / COUNTS).read_text())
    return counts
