"""Models whose memory can only be guessed, as on a login node without distft[train]: of all types, whatever sizes their
config.json has."""

from __future__ import annotations

import itertools
import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from distft.config.loading import load_recipe
from distft.errors import DistftError, MissingPartError
from distft.hardware.devices import named_device
from distft.hardware.topology import Topology
from distft.jobs import planned
from distft.planner.limits import limits, would_fit
from distft.planner.plan import plan_json
from distft.planner.search import Where
from distft.views import plan_page
from distft.views.summary import plan_lines

SHAPES = {
    "model.embed_tokens.weight": (480, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 64, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "lm_head.weight": (480, 64),
}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 480,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def weights(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A file of weights that is nothing but its header, and zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * prod(shape)]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe for tmp_path/model, where nothing can be counted."""

    def missing() -> None:
        raise MissingPartError("training needs torch")

    monkeypatch.setattr(planned.extras, "require", missing)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(weights(SHAPES))
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    recipe = {
        "name": "guess",
        "model": {"name_or_path": "model", "attn_implementation": "eager"},
        "data": {"train": "data.jsonl", "max_length": 256, "packing": False},
        "training": {"global_batch_size": 16},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def guess(folder: Path, config: dict[str, Any], *sets: str) -> None:
    """Plan this model, and look for a word that says that it fits. A DistftError is a plan that is refused."""
    (folder / "model" / "config.json").write_text(json.dumps(config))
    where = Where(Topology(1, 2), named_device("H100", 2))
    plan = planned.plan_any(load_recipe(folder / "recipe.yaml", sets), where, compare=True)
    if plan.model.is_known:
        return
    assert plan.guessed and plan.fits is None
    around = limits(plan.search, plan.chosen)
    said = [*plan_lines(plan), *plan_page.lines(plan, around, would_fit(plan.search), 100), *plan.reasons]
    assert any("a guess" in line for line in said)
    assert [line for line in said if " fit" in line and "not known whether it fits" not in line] == []
    assert {one["fits"] for one in plan_json(plan, "")["candidates"]} == {None}


def test_every_type_of_transformers(folder: Path) -> None:
    planned_types = 0
    for model_type in sorted(NAMES):
        try:
            config = CONFIG_MAPPING[model_type]().to_dict()
        except Exception:  # a config class without defaults
            continue
        config.pop("quantization_config", None)
        try:
            guess(folder, json.loads(json.dumps({**config, "model_type": model_type}, default=str)))
            planned_types += 1
        except DistftError:
            continue
        except Exception as error:
            raise AssertionError(f"{model_type}: {error!r}") from error
    assert planned_types > 130


@pytest.mark.parametrize("tuning", ["lora={}", "lora=null", "training.use_liger_kernel=true"])
def test_whatever_sizes_are_missing(folder: Path, tuning: str) -> None:
    for number in (0, 1, 2, len(SIZES)):
        for missing in itertools.combinations(SIZES, number):
            guess(
                folder, {"model_type": "glm4"} | {name: n for name, n in SIZES.items() if name not in missing}, tuning
            )


def test_whatever_weights_there_are(folder: Path) -> None:
    for name in SHAPES:
        shapes = {other: shape for other, shape in SHAPES.items() if other != name}
        (folder / "model" / "model.safetensors").write_bytes(weights(shapes))
        guess(folder, {"model_type": "glm4", **SIZES}, "lora=null")
