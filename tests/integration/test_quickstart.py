"""The quickstart: its data, recipes and untrained model, from this Python's own library; and `make demo` end to end."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from running import distft

from distft import quickstart
from distft.config.loading import load_recipe
from distft.config.recipe import Data
from distft.data.formats import Formatter
from distft.data.layouts import find_layout
from distft.errors import DataError

FILES = ("base.jsonl", "heldout.jsonl", "train.jsonl")


@dataclass(frozen=True)
class Made:
    """Folder with data/, base.yaml, recipe.yaml and base-untrained/, which stands in as base/ too."""

    path: Path
    counts: quickstart.Counts
    tokenizer: Any

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "data" / name).read_text().splitlines()]

    def pairs(self, name: str) -> list[tuple[str, str]]:
        return [tuple(turn["content"] for turn in row["messages"]) for row in self.rows(name)]


@pytest.fixture(scope="module")
def made(once: Callable[..., Path]) -> Made:
    from transformers import AutoTokenizer

    def make(folder: Path) -> None:
        counts = quickstart.write_data(folder)
        (folder / "counts.json").write_text(json.dumps(asdict(counts)))
        quickstart.write_recipes(folder)
        subprocess.run([sys.executable, "-m", "distft.quickstart.model", str(folder)], check=True)
        (folder / "base").symlink_to("base-untrained")

    path = once("quickstart", make)
    counts = quickstart.Counts(**json.loads((path / "counts.json").read_text()))
    return Made(path, counts, AutoTokenizer.from_pretrained(path / "base-untrained"))


def test_sizes_and_counts(made: Made) -> None:
    counts = made.counts
    assert sorted(path.name for path in (made.path / "data").iterdir()) == list(FILES)
    base, train, heldout = (made.rows(name) for name in ("base.jsonl", "train.jsonl", "heldout.jsonl"))
    assert (counts.base_rows, counts.train_rows, counts.heldout_rows) == (len(base), len(train), len(heldout))
    assert counts.base_bytes == sum(len(row["text"].encode()) for row in base)
    assert 1_000_000 < counts.base_bytes < 4_000_000
    assert counts.train_rows > 2000
    assert 300 < counts.heldout_rows < counts.train_rows / 4
    assert 0.05 < counts.heldout_files / counts.files < 0.2


def test_rows_are_valid_and_short(made: Made) -> None:
    for name, data_format in (("base.jsonl", "text"), ("train.jsonl", "messages"), ("heldout.jsonl", "messages")):
        found = made.rows(name)
        assert len({json.dumps(row) for row in found}) == len(found), "a row stands twice"
        for row in found:
            assert Formatter.of(Data(train="x")).example(row, find_layout([row], "auto", {})).kind == data_format
    for prompt, answer in made.pairs("train.jsonl") + made.pairs("heldout.jsonl"):
        assert len((prompt + answer).encode()) <= quickstart.MAX_ROW_BYTES
        assert "\n" not in answer
        body = "pass" if prompt.lstrip().startswith("class") and "\n" not in prompt else " pass"
        ast.parse(f"{prompt}{body}")  # the head of a definition, as Python reads it


def test_nothing_of_a_heldout_file_is_trained_on(made: Made) -> None:
    train, heldout = made.pairs("train.jsonl"), made.pairs("heldout.jsonl")
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in heldout}
    base = [row["text"] for row in made.rows("base.jsonl")]
    text = "\n".join([*base, *(answer for _, answer in train)])
    assert [answer for _, answer in heldout if answer in text] == []
    # Two files may well define the same `def close():`.
    assert sum(prompt in text for prompt, _ in heldout) < 0.05 * len(heldout)
    # The other way round, from the files: a whole file is on one side, with all that it says.
    held_texts = {
        text
        for module, path in quickstart.stdlib_files()
        if quickstart.is_heldout(module) and (source := quickstart.read_source(path))
        for text in quickstart.read_file(*source)[0]
    }
    shared = held_texts.intersection(base)
    # What the library itself has word for word in two files; a leaking file would bring hundreds.
    assert len(shared) < 0.03 * len(held_texts)


def test_two_processes_write_the_same_bytes(made: Made, tmp_path: Path) -> None:
    code = "import sys, pathlib; from distft.quickstart import write_data; write_data(pathlib.Path(sys.argv[1]))\n"
    code += "print(*{'torch', 'transformers', 'tokenizers', 'pydantic'} & set(sys.modules))"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "", "write_data needs the standard library only"
    for name in FILES:
        assert (tmp_path / "data" / name).read_bytes() == (made.path / "data" / name).read_bytes(), name


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


def test_recipes_are_copied_and_load(made: Made) -> None:
    base, recipe = (load_recipe(str(made.path / name)) for name in ("base.yaml", "recipe.yaml"))
    assert (base.name, base.lora, base.data.eval) == ("quickstart-base", None, None)
    assert recipe.name == "quickstart"
    assert recipe.lora is not None
    assert recipe.data.eval is not None
    for each in (base, recipe):
        assert each.data.max_length >= quickstart.MAX_ROW_BYTES + 4
        assert each.training.mixed_precision == "no"
    done = distft("validate", "base.yaml", "--gpus-per-node", "2", cwd=made.path)
    assert done.stdout.endswith("\nbase.yaml: valid on 1 x 2 cpu\n"), done.stderr


def test_model_loads_and_is_deterministic(made: Made, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from distft.quickstart.model import make_untrained, read_texts

    untrained = made.path / "base-untrained"
    model = AutoModelForCausalLM.from_pretrained(untrained)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 5e5 < model.num_parameters() < 3e6
    assert model.config.vocab_size == len(made.tokenizer)
    assert model.config.head_dim % 8 == 0
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    make_untrained(tmp_path, read_texts(made.path / "data"))
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random numbers are left alone"
    for path in untrained.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_assistant_mask_covers_the_assistants_turns(made: Made) -> None:
    tokenizer = made.tokenizer
    for row in made.rows("heldout.jsonl") + made.rows("train.jsonl")[:500]:
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


def test_tokenizer_round_trip(made: Made) -> None:
    tokenizer = made.tokenizer
    texts = ["", " ", "  a\t\u00df\n\n x , y .  don't", "\U0001f600\x00\u2028", "def f(x): return 'x'  # !"]
    for text in texts + [row["text"] for row in made.rows("base.jsonl")[::20]]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    ids = tokenizer("x")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, None)


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("ten years")
    done = distft("quickstart", "mine", cwd=tmp_path)
    assert done.returncode == 2
    assert "exists and is not a quickstart" in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.real_ranks
def test_demo_end_to_end_on_fewer_steps(tmp_path: Path) -> None:
    """`make demo` with its steps cut: the base is trained, LoRA lowers the eval loss, a sample is shown."""
    target = tmp_path / "demo"
    code = (
        "import sys, pathlib\n"
        "from distft import quickstart\n"
        "write = quickstart.write_recipes\n"
        "def fewer(folder):\n"
        "    write(folder)\n"
        "    for name, old, new in (('base.yaml', 'max_steps: 1000', 'max_steps: 30'),\n"
        "                           ('recipe.yaml', 'num_train_epochs: 4', 'max_steps: 24')):\n"
        "        path = folder / name\n"
        "        assert old in path.read_text()\n"
        "        path.write_text(path.read_text().replace(old, new))\n"
        "quickstart.write_recipes = fewer\n"
        "from distft.cli.demo import demo\n"
        "demo([sys.argv[1], '--gpus-per-node', '2'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    status = json.loads((target / "runs" / "quickstart" / "status.json").read_text())
    assert status["eval_loss_after"] < status["eval_loss_before"] - 0.2
    assert f"{status['eval_loss_before']:.4f} -> {status['eval_loss_after']:.4f}" in done.stdout
    for part in ("base model in ", "fine-tuned:", "written by people:", "PeftModel.from_pretrained"):
        assert part in done.stdout
    again = distft("quickstart", str(target), cwd=tmp_path)
    assert (again.returncode, "already holds a quickstart" in again.stderr) == (2, True)


def test_a_folder_that_cannot_be_written() -> None:
    done = distft("quickstart", "/proc/quickstart", cwd=Path("/"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: /proc/quickstart: cannot be written") and "Traceback" not in done.stderr
