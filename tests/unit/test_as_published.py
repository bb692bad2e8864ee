"""config.json and the tokenizer's files of final/ are worded as the base's: older transformers understand them too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import Tiny

from distft.config.recipe import Recipe
from distft.train.as_published import write_as_published
from distft.train.tokens import load_tokenizer

# As transformers 4 writes it.
OLD = {"rope_theta": 500000.0, "rope_scaling": None, "torch_dtype": "float32", "use_cache": True}


@pytest.fixture
def base(tiny: Tiny, tmp_path: Path) -> Path:
    """The tiny model as a publisher with transformers 4 has it."""
    folder = shutil.copytree(tiny.path / "model", tmp_path / "base")
    edit(folder / "config.json", drop=("rope_parameters", "dtype"), **OLD)
    edit(
        folder / "tokenizer_config.json",
        drop=("backend", "extra_special_tokens"),
        tokenizer_class="PreTrainedTokenizerFast",
        additional_special_tokens=["<|user|>", "<|go|>"],
    )
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return folder


def edit(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in drop} | changes))


def saved(tiny: Tiny, base: Path, folder: Path, kind: str = "AutoModelForCausalLM", **model: Any) -> Recipe:
    """What save_trained leaves of a whole model that was trained."""
    import transformers

    tree = tiny.recipe(lora=None)
    tree["model"] |= {"name_or_path": str(base)} | model
    recipe = Recipe.model_validate(tree)
    trained = getattr(transformers, kind).from_pretrained(base)
    trained.config.use_cache = False
    tokenizer = load_tokenizer(recipe)
    trained.resize_token_embeddings(max(320, len(tokenizer)))
    trained.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert "rope_theta" not in json.loads((folder / "config.json").read_text())  # else as_published is not needed
    write_as_published(recipe, folder)
    return recipe


def test_config_and_tokenizer(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    final = tmp_path / "final"
    recipe = saved(tiny, base, final)
    config, published = (json.loads((folder / "config.json").read_text()) for folder in (final, base))
    assert {name: config[name] for name in published} == published
    assert not config.keys() & {"rope_parameters", "dtype"}
    have, want = (AutoConfig.from_pretrained(folder).to_dict() for folder in (final, base))
    assert have | {"_name_or_path": ""} == want | {"_name_or_path": ""}

    tokens = json.loads((final / "tokenizer_config.json").read_text())
    assert tokens["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert sorted(tokens["additional_special_tokens"]) == [
        "<|go|>",
        "<|user|>",
    ]  # a list under the other name is an error
    assert not tokens.keys() & {"extra_special_tokens", "backend", "is_local", "local_files_only"}
    assert tokens["added_tokens_decoder"]["4"]["content"] == "<|go|>"
    assert (final / "tokenizer.model").read_bytes() == b"pieces"
    text = "<|user|>list of dict<|go|>"
    again, trained = AutoTokenizer.from_pretrained(final), load_tokenizer(recipe)
    assert again(text).input_ids == trained(text).input_ids
    assert again.decode(again(text).input_ids, skip_special_tokens=True) == "list of dict"
    assert (again.eos_token, again.pad_token, again.chat_template) == ("<eos>", "<pad>", trained.chat_template)


def test_new_tokens(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    final = tmp_path / "final"
    saved(tiny, base, final, add_tokens=["<|a|>", "<|b|>"], eos_token="<|b|>")
    config = json.loads((final / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["rope_theta"]) == (322, 321, 500000.0)
    tokens = json.loads((final / "tokenizer_config.json").read_text())
    assert (
        tokens["added_tokens_decoder"]["320"] | {"content": "<|a|>", "special": True}
        == (tokens["added_tokens_decoder"]["320"])
    )
    assert AutoTokenizer.from_pretrained(final)("<|a|><|b|>").input_ids == [320, 321]


def test_another_class_of_the_same_type(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    """A reward model keeps its own architecture, labels and padding token."""
    final = tmp_path / "final"
    saved(tiny, base, final, kind="AutoModelForSequenceClassification")
    config = json.loads((final / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["rope_theta"] == 500000.0


def test_a_base_of_transformers_5(tiny: Tiny, tmp_path: Path) -> None:
    """Nothing is renamed back that the base has under its new name."""
    base = shutil.copytree(tiny.path / "model", tmp_path / "base")
    final = tmp_path / "final"
    saved(tiny, base, final)
    config, published = (json.loads((folder / "config.json").read_text()) for folder in (final, base))
    assert config == published
    tokens = json.loads((final / "tokenizer_config.json").read_text())
    assert tokens["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 and 5 have
    assert not (final / "tokenizer.model").exists()
