"""Data sets of the hub, from a server on this machine that answers as the hub does. The client is the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import FIRST, SECOND, Hub, served

from distft.data.hub import HubData, parse_hub
from distft.errors import DataError


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def hub() -> Iterator[Hub]:
    old = {"README.md": b"# old", "train.jsonl": lines("old")}
    new = {
        "README.md": b"# new",
        ".gitattributes": b"",
        "data/train-00000-of-00002.jsonl": lines("a"),
        "data/train-00001-of-00002.jsonl": lines("b"),
        "data/test-00000-of-00001.jsonl": lines("c"),
        "extra/more.jsonl": lines("d"),
        "notes.txt": b"",
    }
    with served({FIRST: old, SECOND: new}) as made:
        yield made


CODE = """
import json, sys
from distft.config.recipe import Data, Recipe, Source
from distft.data.reading import pinned, read_examples
from distft.data.cache import content_digest
from distft.data.sources import find, find_data
from distft.errors import DataError
answers = []
for path in sys.argv[1:]:
    use, _, path = path.rpartition("=")
    try:
        recipe = Recipe.model_validate({"name": "r", "model": {"name_or_path": "m"}, "data": {"train": path}})
        found = find(Source(path=path), use or "train")
        rows = [(place, one.fields["text"]) for place, one in read_examples([found], Data(train=path), "data.train")]
        answers.append({
            "rows": rows,
            "left_out": {left.name: left.why for left in found.left_out},
            "pinned": pinned(recipe).data.train,
            "digest": content_digest(recipe),
            "pinned_digest": content_digest(pinned(recipe)),
        })
    except DataError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def ask(hub: Hub, cache: Path, *paths: str, offline: bool = False) -> list[Any]:
    """In a process of its own: the hub's client reads its variables once."""
    env = os.environ | hub.environment(cache, offline)
    done = subprocess.run([sys.executable, "-c", CODE, *paths], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout)
    return answers


def test_a_data_set(hub: Hub, tmp_path: Path) -> None:
    plain, evaluated, old, folder, file, page = ask(
        hub,
        tmp_path,
        "owner/name",
        "eval=owner/name",
        f"owner/name@{FIRST}",
        "hf://datasets/owner/name/extra",
        "hf://datasets/owner/name@main/extra/more.jsonl",
        "https://huggingface.co/datasets/owner/name/blob/main/extra/more.jsonl",
    )
    at = f"owner/name@{SECOND[:7]}"
    assert plain["rows"] == [
        [f"{at}/data/train-00000-of-00002.jsonl:1", "a"],
        [f"{at}/data/train-00001-of-00002.jsonl:1", "b"],
    ]
    assert plain["left_out"] == {
        f"{at}/data/test-00000-of-00001.jsonl": "split test",
        f"{at}/extra/more.jsonl": "in no split",
        f"{at}/notes.txt": "not a data file (.txt)",
    }
    assert [text for _, text in evaluated["rows"]] == ["c"]
    assert [text for _, text in old["rows"]] == ["old"]
    for answer in (folder, file, page):
        assert [text for _, text in answer["rows"]] == ["d"]
    assert plain["pinned"] == f"owner/name@{SECOND}"
    assert file["pinned"] == page["pinned"] == f"hf://datasets/owner/name@{SECOND}/extra/more.jsonl"
    digests = {answer["digest"] for answer in (plain, old, folder, file)}
    assert len(digests) == 4
    assert page["digest"] == file["digest"]
    for answer in (plain, old, folder, file):
        assert answer["pinned_digest"] == answer["digest"]
    assert not [path for path in hub.asked if "notes.txt" in path]  # only what is read is downloaded


def test_a_later_commit_is_other_data(hub: Hub, tmp_path: Path) -> None:
    (before,) = ask(hub, tmp_path, "owner/name")
    hub.branches["main"] = FIRST
    (after,) = ask(hub, tmp_path, "owner/name")
    assert before["digest"] != after["digest"]
    assert [text for _, text in after["rows"]] == ["old"]
    (pinned,) = ask(hub, tmp_path, before["pinned"])
    assert pinned["rows"] == before["rows"]
    assert pinned["digest"] == before["digest"]


MODEL = """
import sys
from distft.config.recipe import Recipe
from distft.data.cache import content_digest
from distft.data.reading import pinned
data = {"train": sys.argv[1]}
recipe = Recipe.model_validate({"name": "r", "model": {"name_or_path": "owner/model"}, "data": data})
print(pinned(recipe).model.revision, content_digest(recipe), content_digest(pinned(recipe)))
"""


def test_a_model_at_its_commit(hub: Hub, tmp_path: Path) -> None:
    """Its tokenizer or chat template may change: the run names the commit, and so does the key of its prepared data."""
    (tmp_path / "rows.jsonl").write_bytes(lines("a"))

    def answer(offline: bool = False) -> list[str]:
        env = os.environ | hub.environment(tmp_path / "cache", offline)
        command = [sys.executable, "-c", MODEL, str(tmp_path / "rows.jsonl")]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout.split()

    now = answer()
    assert (now[0], now[1]) == (SECOND, now[2])
    hub.branches["main"] = FIRST
    later = answer()
    assert (later[0], later[1]) == (FIRST, later[2])
    assert later[1] != now[1]
    assert answer(offline=True)[0] == "None"
    ref = tmp_path / "cache" / "hub" / "models--owner--model" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text(SECOND)
    assert answer(offline=True) == now


STORED = """
from distft.config.recipe import Recipe
from distft.models.shapes import read_config
recipe = Recipe.model_validate({"name": "r", "model": {"name_or_path": "owner/model"}, "data": {"train": "a.jsonl"}})
print(read_config(recipe).get("quantization_config"))
"""


@pytest.mark.parametrize("beside", ["hf_quant_config.json", "quantize_config.json", None])
def test_how_weights_are_stored_is_asked_for(beside: str | None, tmp_path: Path) -> None:
    """What says it beside config.json is downloaded with it, and found in the cache."""
    files = {"config.json": b'{"model_type": "llama"}'}
    if beside:
        files[beside] = b'{"bits": 4, "quantization": {"quant_algo": "FP8"}}'
    with served({SECOND: files}) as hub:
        for offline in (False, True):
            env = os.environ | hub.environment(tmp_path / "cache", offline)
            done = subprocess.run([sys.executable, "-c", STORED], capture_output=True, text=True, env=env, check=True)
            assert ("quant_method" in done.stdout) == bool(beside)


def test_offline(hub: Hub, tmp_path: Path) -> None:
    """The commit and the files are those that were downloaded."""
    online = ask(hub, tmp_path, "owner/name")
    hub.asked.clear()
    assert ask(hub, tmp_path, "owner/name", offline=True)[0]["rows"] == online[0]["rows"]
    assert ask(hub, tmp_path, f"owner/name@{SECOND}", offline=True)[0]["digest"] == online[0]["digest"]
    missing = ask(hub, tmp_path, "owner/name:test", "owner/other", f"owner/name@{FIRST}", offline=True)
    assert missing == [
        "owner/name:test: no split test; it has train: name one after a colon, as in owner/name:train",
        "owner/other@main: no such file here, and not in the hub's cache; HF_HUB_OFFLINE is set: name the commit, or "
        "unset it",
        f"owner/name@{FIRST[:7]}: not in the hub's cache, and HF_HUB_OFFLINE is set",
    ]
    assert not hub.asked
    next(tmp_path.rglob("train-00001-of-00002.jsonl")).unlink()
    (partial,) = ask(hub, tmp_path, "owner/name", offline=True)
    assert partial == (
        f"owner/name@{SECOND[:7]}: data/train-00001-of-00002 is not in the hub's cache, and HF_HUB_OFFLINE is set"
    )


def test_what_is_not_there(hub: Hub, tmp_path: Path) -> None:
    answers = ask(
        hub,
        tmp_path,
        "owner/nothing",
        "owner/secret",
        "owner/name@gone",
        "owner/name:gone",
        "hf://datasets/owner/name/gone.jsonl",
        "hf://datasets/owner/name/notes.txt",
    )
    at = f"owner/name@{SECOND[:7]}"
    assert [answer.partition(";")[0] for answer in answers] == [
        "owner/nothing: no such data set on the hub, and no such file here",
        "owner/secret: access must be asked for on its page, https://huggingface.co/datasets/owner/secret",
        "owner/name: no revision gone",
        "owner/name:gone: no split gone",
        f"hf://datasets/owner/name/gone.jsonl: no such file or folder in {at}",
        "hf://datasets/owner/name/notes.txt: no data file",
    ]


@pytest.mark.parametrize(
    ("text", "data", "after"),
    [
        ("o/n", HubData("o/n"), ""),
        ("o/n:train[:10]", HubData("o/n"), ":train[:10]"),
        ("o/n@v1.0:test", HubData("o/n", "v1.0"), ":test"),
        ("o/n@refs/convert/parquet", HubData("o/n", "refs/convert/parquet"), ""),
        ("hf://datasets/o/n", HubData("o/n"), ""),
        ("hf://datasets/o/n@abc/a/b.jsonl", HubData("o/n", "abc", "a/b.jsonl"), ""),
        ("hf://datasets/o/n@refs/pr/1/a", HubData("o/n", "refs/pr/1", "a"), ""),
        ("hf://datasets/o/n@refs%2Fpr%2F1/a", HubData("o/n", "refs/pr/1", "a"), ""),
        ("hf://datasets/o/n/a:test", HubData("o/n", "main", "a"), ":test"),
        ("https://huggingface.co/datasets/o/n", HubData("o/n"), ""),
        ("https://huggingface.co/datasets/o/n/tree/main/a", HubData("o/n", "main", "a"), ""),
        ("https://huggingface.co/datasets/o/n/resolve/v1/a.csv?download=true", HubData("o/n", "v1", "a.csv"), ""),
        ("https://huggingface.co/datasets/o/n/blob/refs%2Fpr%2F1/x.csv", HubData("o/n", "refs/pr/1", "x.csv"), ""),
    ],
)
def test_forms(text: str, data: HubData, after: str) -> None:
    assert parse_hub(text) == (data, after)


@pytest.mark.parametrize("text", ["name", "a/b/c", "hf://datasets/o", "hf://models/o/n", "o/n@"])
def test_what_is_no_form(text: str) -> None:
    with pytest.raises(DataError, match="need owner/name, owner/name@revision, or hf://"):
        parse_hub(text)
