"""Which layers are trained and have adapters, by the names of real models' parameters."""

from __future__ import annotations

import pytest

from distft.config.recipe import Lora
from distft.errors import PlanError
from distft.models.freezing import other_inputs
from distft.models.layout import Tensor
from distft.models.lora import adapters, left_out_layers, module_of, named_but_left_out

LAYERS = {
    "text": ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head"],
    "gemma3": [
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "model.multi_modal_projector.linear",
        "model.language_model.layers.0.self_attn.q_proj",
        "lm_head",
    ],
    "qwen2_vl as published": ["visual.blocks.0.attn.qkv", "model.layers.0.self_attn.q_proj", "lm_head"],
    "llama4": ["language_model.model.layers.0.feed_forward.router", "language_model.model.layers.0.self_attn.q_proj"],
    "deepseek_v4": ["model.layers.0.self_attn.o_a_proj", "model.layers.0.self_attn.o_b_proj"],
    "mllama": [
        "model.language_model.layers.3.cross_attn.q_proj",
        "model.language_model.layers.3.mlp.up_proj",
        "model.language_model.layers.4.self_attn.q_proj",
    ],
    "mamba2": ["model.layers.0.mamba.in_proj", "model.layers.0.mamba.out_proj", "model.layers.1.self_attn.q_proj"],
    "linear attention": ["model.layers.0.linear_attn.in_proj", "model.layers.0.linear_attn.out_proj"],
}
MORE = {
    "mllama": ["model.language_model.layers.3.cross_attn_attn_gate"],
    "mamba2": ["model.layers.0.mamba.A_log", "model.layers.0.mamba.D"],
    "linear attention": ["model.layers.0.linear_attn.A_log"],  # of Qwen3-Next: it calls its layers
}


def tensors(model: str) -> list[Tensor]:
    kinds = {"lm_head": "output"}
    found = [Tensor(f"{name}.weight", (8, 8), kinds.get(name, "linear")) for name in LAYERS[model]]
    return [*found, *(Tensor(name, (8,), "param") for name in MORE.get(model, []))]


@pytest.mark.parametrize(
    ("model", "adapted", "fixed"),
    [
        ("text", [0, 1], []),
        ("gemma3", [2], [0, 1]),
        ("qwen2_vl as published", [1], [0]),
        ("llama4", [1], []),
        ("deepseek_v4", [1], []),
        ("mllama", [2], [0, 1]),
        ("mamba2", [0, 2], []),
        ("linear attention", [0, 1], []),
    ],
)
def test_layers(model: str, adapted: list[int], fixed: list[int]) -> None:
    found = [module_of(tensor) for tensor, _ in adapters(Lora(), tensors(model))]
    assert found == [LAYERS[model][n] for n in adapted]
    untrained = other_inputs(tensor.name for tensor in tensors(model))
    kept = {module_of(t) for t in tensors(model) if t.name in untrained and t.is_linear}
    assert kept == {LAYERS[model][n] for n in fixed}
    assert (MORE["mllama"][0] in untrained) == (model == "mllama")  # the gate of the layer that is skipped


def test_targets_that_are_named() -> None:
    lora = Lora(target_modules=["q_proj"])
    assert [module_of(t) for t, _ in adapters(lora, tensors("gemma3"))] == [LAYERS["gemma3"][2]]
    (paths,) = named_but_left_out(lora, left_out_layers(tensors("gemma3"))).values()
    assert paths == [LAYERS["gemma3"][0]]
    for target in ("linear", r".*projector\.linear"):
        wanted = Lora(target_modules=[target] if target == "linear" else target)
        with pytest.raises(PlanError, match=r"model.multi_modal_projector.linear cannot have an adapter \(not part of"):
            adapters(wanted, tensors("gemma3"))
