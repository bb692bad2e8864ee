"""Weights that are read while the model is sharded (train/streaming.py): the same model as from_pretrained makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Tiny, make_tokenizer

from distft.config.recipe import Recipe
from distft.errors import DataError, RunError
from distft.train.model import build_model
from distft.train.streaming import Stream

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
EXPERTS |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # Conv1D, tied, stored without its prefix
    "gemma2": {"tie_word_embeddings": True},
    "qwen3_moe": EXPERTS,  # experts are stored one by one
    "glm4_moe": EXPERTS | {"topk_group": 1, "n_shared_experts": 1},  # a persistent buffer, float32 in its router
    "minimax_m2": EXPERTS,
    "mamba2": {"num_heads": 8, "state_size": 8, "head_dim": 8, "n_groups": 1},  # A_log is initialized by a formula
}


def recipe(folder: Path, tiny: Tiny, **changes: Any) -> Recipe:
    where = {"model__name_or_path": str(folder), "model__attn_implementation": "eager"}
    return Recipe.model_validate(tiny.recipe(**where, **changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small random model of a kind, saved as it is published."""

    def made(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **SIZES | KINDS[kind] | more)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.25)
        model.save_pretrained(folder)
        make_tokenizer(folder)
        return folder

    return made


def state(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def filled(recipe: Recipe) -> Any:
    stream = Stream(recipe)
    model = build_model(recipe, "fsdp", 1, stream=stream)
    assert stream.waiting  # all but adapters
    stream.fill(stream.places(model), [model])
    return model


@pytest.mark.parametrize("tuning", ["full", "lora", "bf16", "nf4", "whole layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_what_from_pretrained_makes(saved: Any, tiny: Tiny, kind: str, tuning: str) -> None:
    changes: dict[str, Any] = {
        "full": {"lora": None},
        "lora": {},
        "bf16": {"training__mixed_precision": "bf16"},
        "nf4": {"model__quantization": "nf4"},
        "whole layers": {"lora": {"r": 4, "target_modules": "all-linear", "modules_to_save": ["lm_head"]}},
    }[tuning]
    loaded = recipe(saved(kind), tiny, **changes)
    want, got = build_model(loaded, "fsdp", 1), filled(loaded)
    assert got.__class__ is want.__class__
    expected, found = state(want), state(got)
    assert found.keys() == expected.keys()
    quantized = 0
    for name, tensor in expected.items():
        other = found[name]
        assert (other.dtype, other.requires_grad, type(other)) == (tensor.dtype, tensor.requires_grad, type(tensor))
        assert torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (other, tensor))), name
        if quantization := getattr(tensor, "quant_state", None):
            quantized += 1
            assert torch.equal(other.quant_state.absmax, quantization.absmax)
            assert torch.equal(other.quant_state.state2.absmax, quantization.state2.absmax)
    assert bool(quantized) == (tuning == "nf4")
    shared = {name: len({id(p) for p in state(model).values()}) for name, model in (("want", want), ("got", got))}
    assert shared["want"] == shared["got"]  # tied weights are


def test_nothing_is_read_before(saved: Any, tiny: Tiny) -> None:
    """A placeholder takes no memory, and what computes with it gets NaN."""
    loaded = recipe(saved("llama"), tiny, lora=None)
    model = build_model(loaded, "fsdp", 1, stream=Stream(loaded))
    assert all(p.untyped_storage().nbytes() == 4 and p.isnan().all() for p in model.parameters())
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


def test_no_unit_is_forgotten(saved: Any, tiny: Tiny) -> None:
    loaded = recipe(saved("llama"), tiny, lora=None)
    stream = Stream(loaded)
    model = build_model(loaded, "fsdp", 1, stream=stream)
    with pytest.raises(RunError, match=r"lm_head\.weight and 20 others of the base were not sharded"):
        stream.around(lambda *objects: objects)(model)


def test_files_of_another_model(saved: Any, tiny: Tiny) -> None:
    folder = saved("llama")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 48'))
    loaded = recipe(folder, tiny, lora=None)
    with pytest.raises(DataError, match=r"does not fit its config\.json: .* stored with the shape \(64, 32\)"):
        build_model(loaded, "fsdp", 1, stream=Stream(loaded))


def test_missing_weights(saved: Any, tiny: Tiny) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = recipe(folder, tiny, lora=None)
    with pytest.raises(DataError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        build_model(loaded, "fsdp", 1, stream=Stream(loaded))
