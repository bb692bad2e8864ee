"""Prepared data: the same tokens whatever kind of file the rows are in, and which of them are trained on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import Tiny, write_jsonl

from distft.config.loading import load_recipe
from distft.data.cache import cache_folder
from distft.train.data import Prepared, load_prepared

PAIRS = [
    {"prompt": f"read file {word} ", "completion": f'open, "path"\n{word} ünï'} for word in ("list", "dict", "node")
]


def prepared(tiny: Tiny, folder: Path, **changes: Any) -> Prepared:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(data__packing=False, **changes)))
    return load_prepared(load_recipe(folder / "recipe.yaml"))


def write_as(kind: str, folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, PAIRS)
    elif kind == "json":
        path.write_text(json.dumps(PAIRS))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(PAIRS)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
    else:  # a folder of one file a row, the kinds mixed
        path.mkdir()
        write_jsonl(path / "a.jsonl", PAIRS[:1])
        (path / "b").mkdir()
        (path / "b" / "b.json").write_text(json.dumps(PAIRS[1:2]))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS[2:]), path / "c.parquet")
        (path / "README.md").write_text("not data")
    return path


@pytest.fixture(scope="module")
def from_jsonl(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("jsonl")
    return list(prepared(tiny, folder, data__train=str(write_as("jsonl", folder / "data"))).train)


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "folder"])
def test_every_kind_of_file_gives_the_same(tiny: Tiny, tmp_path: Path, from_jsonl: list, kind: str) -> None:
    path = write_as(kind, tmp_path / "data")
    assert list(prepared(tiny, tmp_path, data__train=str(path)).train) == from_jsonl


def test_loss_is_on_the_completion(tiny: Tiny, from_jsonl: list) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.path / "model")
    trained = [[label for label in row["labels"] if label != -100] for row in from_jsonl]
    expected = [row["completion"] + tokenizer.eos_token for row in PAIRS]
    assert sorted(tokenizer.decode(ids) for ids in trained) == sorted(expected)


def test_the_cache_goes_by_content(tiny: Tiny, tmp_path: Path) -> None:
    folders = []
    for name, rows in (("a", PAIRS), ("b", PAIRS), ("c", PAIRS[:2])):
        path = tmp_path / name / "rows.jsonl"
        path.parent.mkdir()
        write_jsonl(path, rows)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(data__train=str(path))))
        folders.append(cache_folder(load_recipe(tmp_path / "recipe.yaml")))
    assert folders[0] == folders[1] != folders[2]


def test_only_the_split_is_trained_on(tiny: Tiny, tmp_path: Path, from_jsonl: list) -> None:
    """Of a folder with several, and the evaluation data is the folder's too."""
    data = tmp_path / "data"
    (data / ".ipynb_checkpoints").mkdir(parents=True)
    write_jsonl(data / "train.jsonl", PAIRS)
    write_jsonl(data / "test.jsonl", PAIRS[:1])
    write_jsonl(data / ".ipynb_checkpoints" / "train.jsonl", PAIRS)
    found = prepared(tiny, tmp_path, data__train=str(data), data__eval=str(data))
    assert list(found.train) == from_jsonl
    assert found.eval is not None
    assert len(found.eval) == 1
