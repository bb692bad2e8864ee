"""lora.start_from: the model that peft makes of an adapter, or a refusal."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import launch
from safetensors.torch import load_file, save_file
from tiny import Tiny, make_model, make_tokenizer

from distft.config.loading import load_recipe
from distft.errors import DataError, PlanError
from distft.jobs.target import plan_recipe
from distft.train.model import build_model


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_lora_weights": "pissa"}, 'has init_lora_weights "pissa", with which no training can start'),
        ({"init_lora_weights": "olora"}, 'has init_lora_weights "olora"'),
        ({"rank_pattern": {"q_proj": 8}}, 'has rank_pattern {"q_proj": 8}, and lora.rank_pattern is {}; set it to the'),
        ({"alpha_pattern": {"q_proj": 64}}, 'has alpha_pattern {"q_proj": 64}, and lora.alpha_pattern is {}'),
        (
            {"modules_to_save": ["lm_head"]},
            'has modules_to_save ["lm_head"], and lora.modules_to_save is []',
        ),
        ({"trainable_token_indices": [3, 4]}, "name its tokens in model.add_tokens, or merge it"),
        ({"bias": "lora_only"}, 'has bias "lora_only"'),
        ({"layers_to_transform": [1]}, "it is on the blocks [1]: see lora.layers_to_transform"),
        ({"init_lora_weights": "gaussian"}, None),
    ],
)
def test_an_adapter_that_would_mean_something_else(
    tiny: Tiny, tmp_path: Path, options: dict[str, Any], said: str | None
) -> None:
    """The same tensors with another scale, or beside a base that was changed: refused before anything starts."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.path / "model")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=names, **options)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    recipe = tiny.recipe()
    recipe["lora"]["start_from"] = "adapter"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(PlanError, match=re.escape(said)) if said else contextlib.nullcontext():
        plan_recipe(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({"oft_block_size": 8}, None, "is an adapter of the kind OFT, and this one's is LORA; add lora.oft with its"),
        ({"oft_block_size": 8}, {}, "has oft_block_size 8, and lora.oft.oft_block_size is 32; set it to the adapter's"),
        ({"oft_block_size": 8, "coft": True}, {"oft_block_size": 8}, "has coft true, and lora.oft.coft is false"),
        ({"oft_block_size": 8, "bias": "oft_only"}, {"oft_block_size": 8}, 'has bias "oft_only"'),
        ({"oft_block_size": 8, "module_dropout": 0.5}, {"oft_block_size": 8}, None),
        ({"oft_block_size": 0, "r": 4, "use_cayley_neumann": False}, {"r": 4, "use_cayley_neumann": False}, None),
    ],
)
def test_rotations_that_would_mean_something_else(
    tiny: Tiny, tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any] | None, said: str | None
) -> None:
    from peft import OFTConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.path / "model")
    config = OFTConfig(task_type="CAUSAL_LM", target_modules="all-linear", **theirs)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    recipe = tiny.recipe(lora={"start_from": "adapter", **({} if ours is None else {"oft": ours})})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(PlanError, match=re.escape(said)) if said else contextlib.nullcontext():
        plan_recipe(str(tmp_path / "recipe.yaml"))


def test_starts_as_peft_loads_it(tiny: Tiny, tmp_path: Path) -> None:
    """An adapter of peft's on some blocks: the loss before training is that of the model that peft merges."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny.path / "model")

    options = {"target_modules": ["q_proj", "k_proj", "down_proj"], "layers_to_transform": [1], "use_rslora": True}
    options |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}, "exclude_modules": ["k_proj"]}
    model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(base(), tmp_path / "adapter").merge_and_unload()
    with torch.no_grad():
        rows = torch.arange(64).view(2, 32)
        assert (merged(rows).logits - base()(rows).logits).abs().max() > 0.1
    merged.save_pretrained(tmp_path / "merged")
    make_tokenizer(tmp_path / "merged")
    recipe = tiny.recipe(data__eval=str(tiny.path / "heldout.jsonl"), training__max_steps=1)
    recipe["lora"] |= {"lora_alpha": 32, **options, "start_from": str(tmp_path / "adapter")}
    started = launch(recipe, tmp_path / "started", ranks=1)
    recipe["lora"] = {"r": 4}
    recipe["model"]["name_or_path"] = str(tmp_path / "merged")
    whole = launch(recipe, tmp_path / "whole", ranks=1)
    assert started.status["eval_loss_before"] == pytest.approx(whole.status["eval_loss_before"], abs=1e-5)


def adapter_of(base: Path, folder: Path, vocabulary: int | None = None) -> Any:
    """peft's, on embeddings and the output layer, which it saves with the adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    names = ["q_proj"] if vocabulary else ["embed_tokens", "lm_head", "q_proj"]
    if vocabulary:
        model.resize_token_embeddings(vocabulary)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=names)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def test_embeddings_that_are_saved_beside_an_adapter(tiny: Tiny, tmp_path: Path) -> None:
    """They are the base's, so the adapter is loaded as it is; another base's are refused."""
    theirs = adapter_of(tiny.path / "model", tmp_path / "adapter")
    saved = [name for name in load_file(tmp_path / "adapter/adapter_model.safetensors") if ".base_layer." in name]
    assert len(saved) == 2
    recipe = tiny.recipe()
    recipe["lora"] |= {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "start_from": "adapter"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    plan_recipe(str(tmp_path / "recipe.yaml"))
    ours = build_model(load_recipe(tmp_path / "recipe.yaml"), "ddp").eval()
    rows = torch.arange(64).view(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(rows).logits, theirs(rows).logits)
    make_model(tmp_path / "other", rms_norm_eps=1e-5)
    tensors = load_file(tmp_path / "other/model.safetensors")
    tensors["lm_head.weight"] += 0.01
    save_file(tensors, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    recipe["model"]["name_or_path"] = str(tmp_path / "other")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(DataError, match=r"was trained beside another lm_head\.weight than that of "):
        build_model(load_recipe(tmp_path / "recipe.yaml"), "ddp")


def test_a_resized_vocabulary_is_what_is_wrong(tiny: Tiny, tmp_path: Path) -> None:
    adapter_of(tiny.path / "model", tmp_path / "adapter", vocabulary=330)
    recipe = tiny.recipe()
    recipe["lora"] |= {"target_modules": ["q_proj"], "start_from": "adapter"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(PlanError, match=r"has the whole of [\w.]+\.weight, .* was resized, .*; merge"):
        plan_recipe(str(tmp_path / "recipe.yaml"))
