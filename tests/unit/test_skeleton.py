"""A model whose weights are read block by block computes what it does with all of them in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import small, small_model
from tiny import Tiny

from distft.config.recipe import Recipe
from distft.train.skeleton import logits, skeleton


def text_and_images() -> Any:
    """Its wrapper looks up the embedding of the padding token by hand, for the embeddings per layer."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    layers = ["sliding_attention", "full_attention"]
    text = {"vocab_size": 320, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8, "head_dim": 16}
    text |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "layer_types": layers}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_kv_shared_layers": 0, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=vision, audio_config=None))


def complex_rotary() -> Any:
    """It asks its weights for the device of what it computes."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = small(Llama4TextConfig())
    config.layer_types = config.layer_types[:2]
    return Llama4ForCausalLM(config)


@pytest.mark.parametrize(
    "make", [text_and_images, complex_rotary, lambda: small_model("idefics3")], ids=["gemma4", "llama4", "idefics3"]
)
def test_logits(make: Any, tiny: Tiny, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().float().eval()
    model.config.save_pretrained(tmp_path)
    parameters, buffers = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
    empty = skeleton(tmp_path, Recipe.model_validate(tiny.recipe()))
    for name, buffer in empty.named_buffers():
        buffer.copy_(buffers[name])
    rows = torch.arange(3, 67).view(2, 32)
    with torch.no_grad():
        wanted = model(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(logits(empty, parameters.__getitem__, rows), wanted)
    assert all(parameter.is_meta for parameter in empty.parameters())
