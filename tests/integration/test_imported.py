"""What `distft import` makes of another tool's file is what is trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from running import launch
from tiny import Tiny

from distft.config.loading import load_recipe
from distft.data import cache
from distft.importers.draft import Draft
from distft.importers.kinds import read_file

AXOLOTL = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": r"model\.layers\.1\.self_attn\.[qv]_proj",
    "sequence_len": 64,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "learning_rate": 0.01,
    "warmup_steps": 1,
    "cosine_min_lr_ratio": 0.5,
    "adam_beta2": 0.9,
    "bf16": False,
    "optimizer": "adamw_torch",
    "train_on_inputs": True,
}


def imported(tiny: Tiny, folder: Path) -> Draft:
    data_set = {"path": str(tiny.path / "chat.jsonl"), "type": "chat_template"}
    file = folder / "axolotl.yml"
    file.write_text(yaml.safe_dump({**AXOLOTL, "base_model": str(tiny.path / "model"), "datasets": [data_set]}))
    draft = read_file(file, folder, gpus=2)
    assert (draft.problems, draft.refused) == ([], [])
    draft.check()
    return draft


def test_what_was_imported_is_trained(tiny: Tiny, tmp_path: Path) -> None:
    """The layers of a regular expression, every token, axolotl's schedule with a lowest rate, its batch on two GPUs."""
    result = launch(imported(tiny, tmp_path).recipe(), tmp_path, ranks=2)
    cosines = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    rates = [0.005, *(0.01 * (0.5 + 0.5 * part) for part in cosines)]
    assert result.column("learning_rate") == pytest.approx(rates)
    plan = json.loads((result.run_dir / "plan.json").read_text())
    assert plan["batch"]["global_batch_size"] == 8
    adapter = json.loads((result.run_dir / "final" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == AXOLOTL["lora_target_modules"]
    from safetensors import safe_open

    with safe_open(result.run_dir / "final" / "adapter_model.safetensors", "pt") as file:
        names = {name.partition(".lora_")[0].rpartition("base_model.model.")[2] for name in file.keys()}  # noqa: SIM118
        count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert names == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}
    assert plan["model"]["trainable_parameters"] == count
    recipe = load_recipe(result.run_dir / "recipe.yaml")
    counts = cache.read_counts(cache.cache_folder(recipe), recipe)["train"]
    assert counts["trained_tokens"] == counts["tokens"] - counts["documents"]  # nothing predicts a first token
