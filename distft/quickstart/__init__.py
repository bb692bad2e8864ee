"""The embedded quickstart: a real fine-tuning job with no network and no download.

Every machine with Python has real text: the sources of the standard library. A small base model is trained on them from
scratch (base.yaml); then a LoRA run (recipe.yaml) teaches it to describe a signature in one line. Whole files are held
out, so that the eval loss means something. This module needs only the standard library; model.py needs torch.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from distft.errors import DataError

# Tests, tables and vendored code: long, repetitive, and they document nothing.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages"}
# Files from whoever built or runs this Python: paths of the machine, not text of the library.
LOCAL_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")

# A byte-level BPE never makes more tokens than there are bytes, so a row of this size with its 4 chat marks fits the
# recipes' max_length of 128 with any tokenizer, and no row has to be tokenized here to know that.
MAX_ROW_BYTES = 120
MIN_WORDS = 3  # "Constructor." and "Internal function." mean nothing
HELDOUT_PERCENT = 10
MIN_ROWS = 100  # of train.jsonl and heldout.jsonl each

RECIPES = ("base.yaml", "recipe.yaml")

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Counts:
    """What write_data wrote."""

    files: int
    heldout_files: int
    base_rows: int
    base_bytes: int
    """UTF-8 bytes of text in base.jsonl."""
    train_rows: int
    heldout_rows: int


def is_heldout(module: str) -> bool:
    """Whether a module's file is held out, by a hash of its name: the same on every machine and Python version."""
    return hashlib.sha256(module.encode()).digest()[0] * 100 // 256 < HELDOUT_PERCENT


def stdlib_files() -> Iterator[tuple[str, Path]]:
    """(module name, file) of the documented part of the standard library, sorted by name."""
    root = sysconfig.get_path("stdlib")
    found = {}
    for folder, folders, names in os.walk(root):
        # Pruned, not filtered: site-packages may hold more files than the library. Folders such as config-3.12-x86_64
        # are not packages.
        folders[:] = [name for name in folders if name.isidentifier() and name not in LEFT_OUT]
        for path in (Path(folder, name) for name in names):
            if path.suffix == ".py" and path.stem.isidentifier() and not path.stem.startswith(LOCAL_PREFIXES):
                found[".".join(path.relative_to(root).with_suffix("").parts)] = path
    yield from sorted(found.items())


def read_source(path: Path) -> tuple[str, ast.Module] | None:
    """Text and syntax tree of a file; None if it cannot be read or parsed (test data, files for other versions)."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old docstrings
            text = file.read()
            return text, ast.parse(text)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


def definitions(node: ast.AST, owner: str = "") -> Iterator[tuple[Definition, str]]:
    """Documented classes, functions and methods in source order, each with the name of its class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            if ast.get_docstring(child):
                yield child, owner
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, child.name)
        elif isinstance(child, (ast.If, ast.Try)):  # defined only on some platforms
            yield from definitions(child, owner)


def signature(node: Definition, owner: str) -> str:
    """The head of a definition, `class Name(Base):` or `def name(x) -> int:`, below the name of its class if it has
    one."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"
    return f"class {owner}:\n    {line}" if owner else line


def summary(node: Definition) -> str | None:
    """The docstring's first line; None if it is not a whole sentence or phrase, or too short to mean anything."""
    first, *rest = (ast.get_docstring(node) or "").split("\n")
    whole = first.endswith(".") or not rest or not rest[0].strip()
    # A lone surrogate from an escape cannot be encoded; isprintable() refuses it.
    return first if whole and first.isprintable() and len(first.split()) >= MIN_WORDS else None


def read_file(text: str, tree: ast.Module) -> tuple[list[str], dict[str, str]]:
    """The texts of a file (its docstring, and heads with docstrings, as they are in the file), and its rows."""
    lines = text.split("\n")
    texts, rows = [], dict[str, str]()
    if ast.get_docstring(tree):
        texts.append("\n".join(lines[tree.body[0].lineno - 1 : tree.body[0].end_lineno]))
    for node, owner in definitions(tree):
        texts.append("\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]))
        prompt, answer = signature(node, owner), summary(node)
        if answer and len((prompt + answer).encode()) <= MAX_ROW_BYTES:
            rows.setdefault(prompt, answer)
    return texts, rows


def write_data(folder: Path) -> Counts:
    """Write base.jsonl, train.jsonl and heldout.jsonl into `folder`/data; doing it twice gives the same bytes.

    Whole files are held out. Because the library copies docstrings from file to file, a held-out row is dropped if its
    answer occurs anywhere in the training text, or its question in train.jsonl.

    Raises:
        DataError: this Python comes without the sources of its library.
    """
    texts: dict[str, None] = {}
    train: dict[str, str] = {}
    candidates: dict[str, str] = {}
    files = heldout_files = 0
    for module, path in stdlib_files():
        source = read_source(path)
        if source is None:
            continue
        files += 1
        file_texts, rows = read_file(*source)
        heldout_files += is_heldout(module)
        if not is_heldout(module):
            texts |= dict.fromkeys(file_texts)
        for prompt, answer in rows.items():
            (candidates if is_heldout(module) else train).setdefault(prompt, answer)
    trained_on = "\n".join([*texts, *train.values()])
    heldout = {p: a for p, a in candidates.items() if p not in train and a not in trained_on}
    if min(len(train), len(heldout)) < MIN_ROWS:
        raise DataError(
            f"{sysconfig.get_path('stdlib')}: {len(train)} + {len(heldout)} documented definitions are too few; the "
            "quickstart needs a Python that has its standard library as .py files"
        )
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    _write(data / "base.jsonl", ({"text": text} for text in texts))
    for name, rows in (("train.jsonl", train), ("heldout.jsonl", heldout)):
        _write(data / name, (_conversation(prompt, answer) for prompt, answer in rows.items()))
    return Counts(
        files=files,
        heldout_files=heldout_files,
        base_rows=len(texts),
        base_bytes=sum(len(text.encode()) for text in texts),
        train_rows=len(train),
        heldout_rows=len(heldout),
    )


def _conversation(prompt: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    # ASCII: people read such files with str.splitlines(), which also cuts at characters that JSON keeps (U+2028).
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


def write_recipes(folder: Path) -> None:
    """Copy base.yaml and recipe.yaml into `folder` unchanged, for people to read and edit."""
    for name in RECIPES:
        (folder / name).write_bytes((resources.files(__package__) / name).read_bytes())
