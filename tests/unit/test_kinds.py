"""What is no causal language model is refused for what it is: by plan and validate, with and without weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from image_models import small_model

from distft import extras
from distft.config.recipe import Recipe
from distft.models import kinds
from tests.tiny import Tiny

ENCODER = "is an encoder, which sees the tokens that it would predict"
WHAT = {
    "bert": ({"model_type": "bert"}, f"bert {ENCODER} (no is_decoder in its config.json)"),
    "xlm-roberta": ({"model_type": "xlm-roberta", "is_decoder": False}, f"xlm-roberta {ENCODER} (no is_decoder"),
    "modernbert": ({"model_type": "modernbert"}, f"modernbert {ENCODER}"),
    "whisper": ({"model_type": "whisper", "is_encoder_decoder": True}, "whisper is a speech model"),
    "bart": ({"model_type": "bart"}, "bart is an encoder-decoder"),
    "t5": ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder"),
    "without a type": ({"is_encoder_decoder": True}, "it is an encoder-decoder"),
    "images": ({"model_type": "paligemma"}, "paligemma is a model of images and text"),
    "ocr": ({"model_type": "got_ocr2"}, "got_ocr2 is no language model: it reads images"),
    "audio": ({"model_type": "qwen2_audio"}, "qwen2_audio is a model of audio or images and text"),
    "another task": ({"model_type": "clip"}, "the installed transformers has no causal language model of type clip"),
    "original": ({"d_model": 2560}, "its config.json has no model_type, so it is not in the format of transformers"),
}


@pytest.mark.parametrize("case", WHAT)
def test_what_it_is(case: str) -> None:
    config, text = WHAT[case]
    assert (kinds.not_causal(config) or "").startswith(text)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "mamba"},
        {"model_type": "bert", "is_decoder": True},
        {"model_type": "bart", "is_encoder_decoder": False},
        {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}},
        {"model_type": "llama9"},
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_what_may_be_one(config: dict[str, Any]) -> None:
    assert kinds.not_causal(config) is None


def test_a_type_that_transformers_does_not_know() -> None:
    new: dict[str, Any] = {"model_type": "llama9"}
    assert kinds.unknown_type(new) == "llama9"
    assert kinds.unknown_type(new | {"auto_map": {"AutoModelForCausalLM": "mine.Mine"}}) is None
    assert not any(kinds.unknown_type({"model_type": known}) for known in ("llama", "mamba", "clip", "t5"))


def test_without_transformers_the_config_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "source", lambda package, path: None)
    kinds._table.cache_clear()
    kinds._types.cache_clear()
    try:
        for case in ("bert", "xlm-roberta", "t5", "without a type", "ocr", "original"):
            config, text = WHAT[case]
            assert (kinds.not_causal(config) or "").startswith(text), case
        masked = {"model_type": "fancy", "architectures": ["FancyForMaskedLM"]}
        assert kinds.not_causal(masked) == "fancy is an encoder (FancyForMaskedLM)"
        assert kinds.not_causal({"model_type": "fancy", "architectures": ["FancyForCausalLM"]}) is None
        assert kinds.unknown_type({"model_type": "fancy"}) is None
    finally:
        kinds._table.cache_clear()
        kinds._types.cache_clear()


@pytest.mark.parametrize("command", ["plan", "plan --simulate", "validate", "launch"])
@pytest.mark.parametrize("weights", [False, True], ids=["config", "weights"])
def test_every_command_refuses_it(tiny: Tiny, tmp_path: Path, command: str, weights: bool) -> None:
    model = tmp_path / "model"
    model.mkdir()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    (model / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    if weights:
        (model / "model.safetensors").write_bytes((tiny.path / "model" / "model.safetensors").read_bytes())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny.recipe(model__name_or_path=str(model))))
    words = [command.split()[0], str(recipe), *command.split()[1:]]
    done = subprocess.run([sys.executable, "-m", "distft", *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"model.name_or_path: bert {ENCODER}" in done.stderr
    assert "[model-must-be-a-causal-lm]" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["bert", "camembert", "electra", "ernie", "rembert", "xlm-roberta"])
def test_encoders_see_the_future(kind: str) -> None:
    """Why they are refused: what comes later changes the outputs before it, and is_decoder ends that."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ids = torch.arange(5, 21)[None]
    other = ids.clone()
    other[0, -1] = 50
    for decoder in (False, True):
        config = AutoConfig.for_model(kind, **sizes, vocab_size=99, pad_token_id=0, is_decoder=decoder)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            change = (model(input_ids=ids).logits - model(input_ids=other).logits)[:, :-1].abs().max()
        assert (change.item() < 1e-6) is decoder


@pytest.mark.parametrize("kind", sorted(kinds.IMAGES_AND_TEXT))
def test_images_and_text_write_text_alone(kind: str) -> None:
    """No token sees those after it, and all that is trained without images gets a gradient."""
    import torch

    from distft.train.model import freeze

    assert kinds.not_causal({"model_type": kind}) is None
    assert kinds.is_causal_type(kind)
    model, ids = small_model(kind), torch.arange(5, 21)[None]
    other = ids.clone()
    other[0, -1] = 50
    with torch.no_grad():
        change = (model.eval()(input_ids=ids).logits - model(input_ids=other).logits)[:, :-1].abs().max()
    assert change.item() < 1e-6
    model_and_data = {"model": {"name_or_path": kind}, "data": {"train": "owner/name"}}
    freeze(model, Recipe(name="t", **model_and_data, lora=None, training={"mixed_precision": "no"}))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    without = [name for name in trained if model.get_parameter(name).grad is None]
    assert trained and not without
    assert not any("vis" in name or "image" in name for name in trained)
