"""The files beside a model's weights, as the base's publisher wrote them.

transformers 5 writes config.json and tokenizer_config.json in a form of its own. Programs that have transformers 4
refuse that tokenizer, and read a base of rotary embeddings 10000 where theta is another: they compute something else
and say nothing. So what training did not change is written with the base's words, which both understand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from distft.config.recipe import Recipe
from distft.train.base_files import base_config, base_file
from distft.train.special_tokens import new_tokens, read_tokenizer, set_special_tokens

# In config.json: what a base says that transformers 5 has under one new name, and what is of the trained class.
NEW_NAMES = {"rope_parameters": ("rope_theta", "rope_scaling"), "dtype": ("torch_dtype",)}
OF_THE_CLASS = ("architectures", "id2label", "label2id", "problem_type", "pad_token_id")
# In tokenizer_config.json: how this machine loaded it.
OF_THE_LOADING = ("backend", "is_local", "local_files_only")


def write_as_published(recipe: Recipe, folder: Path) -> None:
    """Rewrite what transformers saved in `folder`: the tokenizer's files, and the config of a whole model.

    Raises:
        DataError: the base's files cannot be read.
    """
    if (folder / "config.json").is_file():
        _write_config(recipe, folder)
        set_tokens(recipe, folder)
    write_tokenizer(recipe, folder)


def _write_config(recipe: Recipe, folder: Path) -> None:
    """config.json with the values of the base's; of a part of the base that is a model by itself, with that part's."""
    path = folder / "config.json"
    own, base = json.loads(path.read_text()), json.loads(base_config(recipe).read_text())
    parts = [part for part in (base, base.get("text_config")) if isinstance(part, dict)]
    published = next((part for part in parts if part.get("model_type") == own["model_type"]), None)
    if published is None:
        return
    renamed = {new for new, old in NEW_NAMES.items() if new not in published and not published.keys().isdisjoint(old)}
    config = {name: value for name, value in own.items() if name not in renamed} | published
    config |= {name: own[name] for name in OF_THE_CLASS if name in own}
    config.pop("quantization_config", None)  # the trained weights are plain
    dtype = "torch_dtype" if "dtype" in renamed else "dtype"
    config |= {dtype: own["dtype"]} if "dtype" in own else {}
    path.write_text(json.dumps(config, indent=2) + "\n")


def set_tokens(recipe: Recipe, folder: Path) -> None:
    """Write the recipe's special tokens into config.json and generation_config.json."""
    if not recipe.model.add_tokens and recipe.model.eos_token is None:
        return
    rows, eos = new_tokens(recipe).rows, None
    if recipe.model.eos_token is not None:
        tokenizer = read_tokenizer(recipe)
        set_special_tokens(tokenizer, recipe)
        eos = tokenizer.eos_token_id
    for path in (folder / "config.json", folder / "generation_config.json"):
        if not path.is_file():
            continue
        config = json.loads(path.read_text())
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part |= {"vocab_size": rows} if rows and "vocab_size" in part else {}
                part |= {"eos_token_id": eos} if eos is not None and (part is config or "eos_token_id" in part) else {}
        path.write_text(json.dumps(config, indent=2) + "\n")


def write_tokenizer(recipe: Recipe, folder: Path) -> None:
    """The tokenizer that transformers saved in `folder`, under the base's class, with the base's tokenizer.model."""
    path, fast = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not path.is_file():  # a tokenizer of the model's own code
        return
    config: dict[str, Any] = json.loads(path.read_text())
    config = {name: value for name, value in config.items() if name not in OF_THE_LOADING}
    base = base_file(recipe, "tokenizer_config.json")
    named = json.loads(base.read_text()).get("tokenizer_class") if base else None
    if named is not None and named != "TokenizersBackend":
        config["tokenizer_class"] = named
    elif config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if fast.is_file():
        tokens = json.loads(fast.read_text()).get("added_tokens", [])
        config["added_tokens_decoder"] = {str(token.pop("id")): token for token in tokens}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if pieces := base_file(recipe, "tokenizer.model"):
        shutil.copyfile(pieces, folder / "tokenizer.model")
