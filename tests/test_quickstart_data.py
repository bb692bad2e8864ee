"""The quickstart's data and untrained model, made from the library of the Python that runs the tests."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distft import data_files, quickstart
from distft.errors import DataError
from distft.loading import load_recipe

FILES = ("base.jsonl", "heldout.jsonl", "train.jsonl")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, quickstart.Counts]:
    folder = tmp_path_factory.mktemp("data")
    return folder, quickstart.write_data(folder)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "data" / name).read_text().splitlines()]


def pairs(folder: Path, name: str) -> list[tuple[str, str]]:
    return [tuple(turn["content"] for turn in row["messages"]) for row in rows(folder, name)]


def test_sizes_and_counts(made: tuple[Path, quickstart.Counts]) -> None:
    folder, counts = made
    assert sorted(path.name for path in (folder / "data").iterdir()) == list(FILES)
    base, train, heldout = (rows(folder, name) for name in ("base.jsonl", "train.jsonl", "heldout.jsonl"))
    assert (counts.base_rows, counts.train_rows, counts.heldout_rows) == (len(base), len(train), len(heldout))
    assert counts.base_bytes == sum(len(row["text"].encode()) for row in base)
    assert 1_000_000 < counts.base_bytes < 4_000_000
    assert counts.train_rows > 2000
    assert 300 < counts.heldout_rows < counts.train_rows / 4
    assert 0.05 < counts.heldout_files / counts.files < 0.2


def test_rows_are_valid_and_short(made: tuple[Path, quickstart.Counts]) -> None:
    folder, _ = made
    for name, data_format in (("base.jsonl", "text"), ("train.jsonl", "messages"), ("heldout.jsonl", "messages")):
        found = rows(folder, name)
        assert len({json.dumps(row) for row in found}) == len(found), "a row stands twice"
        for row in found:
            assert data_files.problem(row, data_format) is None, row
    for prompt, answer in pairs(folder, "train.jsonl") + pairs(folder, "heldout.jsonl"):
        assert len((prompt + answer).encode()) <= quickstart.MAX_ROW_BYTES
        assert "\n" not in answer
        body = "pass" if prompt.lstrip().startswith("class") and "\n" not in prompt else " pass"
        ast.parse(f"{prompt}{body}")  # the head of a definition, as Python reads it


def test_nothing_of_a_heldout_file_is_trained_on(made: tuple[Path, quickstart.Counts]) -> None:
    folder, _ = made
    train, heldout = pairs(folder, "train.jsonl"), pairs(folder, "heldout.jsonl")
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in heldout}
    text = "\n".join([*(row["text"] for row in rows(folder, "base.jsonl")), *(answer for _, answer in train)])
    assert [answer for _, answer in heldout if answer in text] == []
    # The other way round, from the files: a whole file is on one side, with all that it says.
    held_texts = {
        text
        for module, path in quickstart.stdlib_files()
        if quickstart.is_heldout(module) and (source := quickstart.read_source(path))
        for text in quickstart.read_file(*source)[0]
    }
    shared = held_texts & {row["text"] for row in rows(folder, "base.jsonl")}
    # What the library itself has word for word in two files; a leaking file would bring hundreds.
    assert len(shared) < 0.03 * len(held_texts)


def test_two_processes_write_the_same_bytes(made: tuple[Path, quickstart.Counts], tmp_path: Path) -> None:
    folder, _ = made
    code = "import sys, pathlib; from distft.quickstart import write_data; write_data(pathlib.Path(sys.argv[1]))\n"
    code += "print(*{'torch', 'transformers', 'tokenizers', 'pydantic'} & set(sys.modules))"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "", "write_data needs the standard library only"
    for name in FILES:
        assert (tmp_path / "data" / name).read_bytes() == (folder / "data" / name).read_bytes(), name


def test_a_small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out, read over and refused, on a library of our own."""
    library = tmp_path / "lib"
    for name, text in {
        "good.py": 'class A:\n    def f(self, x: int = 1) -> str:\n        """Say x in words."""\n',
        "latin.py": '# coding: latin-1\ndef g():\n    """Gr\xfc\xdfe an alle."""\n',
        "broken.py": "def f(:\n",
        "test/test_good.py": 'def t():\n    """Test of the good."""\n',
        "site-packages/other.py": 'def o():\n    """Not of the library."""\n',
        "config-x86/tool.py": 'def c():\n    """Not a module either."""\n',
        "_sysconfigdata__linux.py": '"""Paths of this machine."""\n',
    }.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(quickstart.sysconfig, "get_path", lambda name: str(library))
    found = dict(quickstart.stdlib_files())
    assert list(found) == ["broken", "good", "latin"]
    assert quickstart.read_source(found["broken"]) is None
    assert quickstart.read_file(*quickstart.read_source(found["latin"]))[1] == {"def g():": "Gr\xfc\xdfe an alle."}
    assert quickstart.read_file(*quickstart.read_source(found["good"])) == (
        ['    def f(self, x: int = 1) -> str:\n        """Say x in words."""'],
        {"class A:\n    def f(self, x: int=1) -> str:": "Say x in words."},
    )
    with pytest.raises(DataError, match="too few"):
        quickstart.write_data(tmp_path)
    assert not (tmp_path / "data").exists()


@pytest.fixture(scope="module")
def untrained(made: tuple[Path, quickstart.Counts]) -> Path:
    from distft.quickstart import model

    folder, _ = made
    model.make_untrained(folder / "base-untrained", model.read_texts(folder / "data"))
    return folder / "base-untrained"


@pytest.fixture(scope="module")
def tokenizer(untrained: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(untrained)


def test_recipes_are_copied_and_load(made: tuple[Path, quickstart.Counts], untrained: Path) -> None:
    folder, _ = made
    quickstart.write_recipes(folder)
    (folder / "base").symlink_to(untrained)
    base, recipe = (load_recipe(str(folder / name)) for name in ("base.yaml", "recipe.yaml"))
    assert (base.name, base.lora, base.data.eval) == ("quickstart-base", None, None)
    assert recipe.name == "quickstart"
    assert recipe.lora is not None
    assert recipe.data.eval is not None
    for each in (base, recipe):
        assert each.data.max_length >= quickstart.MAX_ROW_BYTES + 4
        assert each.training.mixed_precision == "no"


def test_model_loads_and_is_deterministic(
    made: tuple[Path, quickstart.Counts], untrained: Path, tokenizer: Any, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from distft.quickstart.model import make_untrained, read_texts

    model = AutoModelForCausalLM.from_pretrained(untrained)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 5e5 < model.num_parameters() < 3e6
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.head_dim % 8 == 0
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    make_untrained(tmp_path, read_texts(made[0] / "data"))
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random numbers are left alone"
    for path in untrained.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_assistant_mask_covers_the_assistants_turns(made: tuple[Path, quickstart.Counts], tokenizer: Any) -> None:
    for row in rows(made[0], "heldout.jsonl") + rows(made[0], "train.jsonl")[:500]:
        turns = row["messages"]
        result = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = result["input_ids"], result["assistant_masks"]
        start = mask.index(1)
        assert mask == [0] * start + [1] * (len(ids) - start)
        assert tokenizer.decode(ids[start:]) == turns[1]["content"] + tokenizer.eos_token
        assert ids[:start] == tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
        assert tokenizer.decode(ids[:start]) == f"<|bos|><|user|>{turns[0]['content']}<|assistant|>"
        assert len(ids) <= quickstart.MAX_ROW_BYTES + 4
    two = tokenizer.apply_chat_template([*turns, *turns], return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, flag in zip(two["input_ids"], two["assistant_masks"], strict=True) if flag]
    assert tokenizer.decode(trained) == 2 * (turns[1]["content"] + tokenizer.eos_token)


def test_tokenizer_round_trip(made: tuple[Path, quickstart.Counts], tokenizer: Any) -> None:
    texts = ["", " ", "  a\t\u00df\n\n x , y .  don't", "\U0001f600\x00\u2028", "def f(x): return 'x'  # !"]
    for text in texts + [row["text"] for row in rows(made[0], "base.jsonl")[::20]]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    ids = tokenizer("x")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, None)
