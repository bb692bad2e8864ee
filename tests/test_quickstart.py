"""The quickstart's parts: honest data, a real tokenizer, a base model made anew. The whole of it is `make demo`."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import distft

from distft import quickstart


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quickstart")
    quickstart.write_data(path)
    quickstart.write_recipes(path)
    subprocess.run([sys.executable, "-m", "distft.quickstart.model", str(path)], check=True, capture_output=True)
    return path


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "data" / name).read_text().splitlines()]


def test_held_out_files_are_in_no_other_data(folder: Path, tmp_path: Path) -> None:
    train, heldout = rows(folder, "train.jsonl"), rows(folder, "heldout.jsonl")
    assert len(train) > 2000
    assert len(heldout) > 200
    assert not {json.dumps(row) for row in train} & {json.dumps(row) for row in heldout}
    text = " ".join(row["text"] for row in rows(folder, "base.jsonl"))
    signatures = [row["messages"][0]["content"] for row in heldout]
    assert sum(signature in text for signature in signatures) < 0.05 * len(
        signatures
    )  # `def close(self)` is everywhere
    quickstart.write_data(tmp_path)
    for name in ("base.jsonl", "train.jsonl", "heldout.jsonl"):
        assert filecmp.cmp(folder / "data" / name, tmp_path / "data" / name, shallow=False)


def test_tokenizer_and_model(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base-untrained")
    model = AutoModelForCausalLM.from_pretrained(folder / "base-untrained")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 5e5 < model.num_parameters() < 5e6
    turns = rows(folder, "train.jsonl")[0]["messages"]
    result = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, flag in zip(result["input_ids"], result["assistant_masks"], strict=True) if flag]
    assert tokenizer.decode(trained, skip_special_tokens=True).strip() == turns[1]["content"]
    assert trained[-1] == tokenizer.eos_token_id
    text = "def f(x):\n\treturn 'ümläut' # 1\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_recipes_are_valid(folder: Path) -> None:
    assert yaml.safe_load((folder / "base.yaml").read_text())["lora"] is None
    done = distft("validate", "base.yaml", "--gpus-per-node", "2", cwd=folder)
    assert done.stdout == "base.yaml: valid\n", done.stderr


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("ten years")
    done = distft("quickstart", "mine", cwd=tmp_path)
    assert done.returncode == 2
    assert "exists and is no quickstart" in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_demo_end_to_end_on_fewer_steps(folder: Path, tmp_path: Path) -> None:
    """`make demo` with its steps cut: the base is trained, LoRA lowers the held-out loss, a sample is shown."""
    target = tmp_path / "demo"
    code = (
        "import sys, pathlib\n"
        "from distft import quickstart\n"
        "write = quickstart.write_recipes\n"
        "def fewer(folder):\n"
        "    write(folder)\n"
        "    for name, old, new in (('base.yaml', 'max_steps: 1000', 'max_steps: 60'),\n"
        "                           ('recipe.yaml', 'num_train_epochs: 4', 'max_steps: 40')):\n"
        "        path = folder / name\n"
        "        assert old in path.read_text()\n"
        "        path.write_text(path.read_text().replace(old, new))\n"
        "quickstart.write_recipes = fewer\n"
        "from distft.quickstart.demo import demo\n"
        "demo([sys.argv[1], '--gpus-per-node', '2'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    status = json.loads((target / "runs" / "quickstart" / "status.json").read_text())
    assert status["heldout_loss_after"] < status["heldout_loss_before"] - 0.2
    assert f"{status['heldout_loss_before']:.4f} -> {status['heldout_loss_after']:.4f}" in done.stdout
    for part in ("base model: loss", "fine-tuned:", "written by people:", "PeftModel.from_pretrained"):
        assert part in done.stdout
    again = distft("quickstart", str(target), cwd=tmp_path)
    assert (again.returncode, "holds a quickstart already" in again.stderr) == (2, True)
