"""Tiny models of images and text, with random weights."""

from __future__ import annotations

from typing import Any

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "depth": 1,
    "embed_dim": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "image_size": 28,
    "patch_size": 14,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# How positions of images share the dimensions of a head, here of 16.
SECTIONS = {"qwen2_vl": [2, 3, 3], "qwen2_5_vl": [2, 3, 3], "qwen3_vl": [2, 3, 3], "qwen3_vl_moe": [2, 3, 3]}
SECTIONS |= {"glm4v": [2, 3, 3], "glm46v": [2, 3, 3], "glm4v_moe": [1, 1, 2]}


def small(config: Any) -> Any:
    """A config with small sizes, in its parts too."""
    for name, value in SMALL.items():
        if isinstance(getattr(config, name, ""), (int, type(None))):
            setattr(config, name, value)
    for part in list(vars(config).values()):
        if hasattr(part, "to_dict"):
            small(part)
    return config


def small_model(kind: str) -> Any:
    """One of kinds.IMAGES_AND_TEXT."""
    import torch
    from transformers import AutoConfig

    from distft.train.auto_class import auto_class

    config = small(AutoConfig.for_model(kind))
    text, vision = config.get_text_config(), config.vision_config
    if kind in SECTIONS:
        rope = dict(text.rope_parameters or {"rope_type": "default", "rope_theta": 1e4})
        text.rope_parameters = rope | {"mrope_section": SECTIONS[kind]}
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        if hasattr(vision, name):
            setattr(vision, name, [0])
    torch.manual_seed(0)
    return auto_class(kind).from_config(config).float()
