"""Documents of a packed row in transformers' model types but NOT_TRIED: the first is changed, the second looked at; and
model.attn_implementation: varlen held against SDPA's masks."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from distft.models import kinds
from distft.models.attention import NO_FLASH, VARLEN, plain_attention
from distft.models.packing import why_mixed
from distft.train import varlen

LENGTHS = (5, 1, 9)  # the last is longer than a window
COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 7,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    # Experts, by each of their names.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts"), 1),
}
# Multi-head latent attention has no head_dim, and no groups.
LATENT = {
    "head_dim": None,
    "num_key_value_heads": 4,
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("index_topk", "index_head_dim", "index_n_heads"), 8),
    "first_k_dense_replace": 1,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_HYBRID = ["mamba", "hybrid"] * 2
SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "minicpm3", "youtu"), LATENT),
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 101,
        "hidden_size_per_layer_input": 4,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "gemma4_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 101, "hidden_size_per_layer_input": 0},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "hunyuan_v1_moe": {"num_experts": 2, "moe_topk": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "modernbert-decoder": {"pad_token_id": 0},
    "olmoe": {"sliding_window": None},  # its attention alone would know of it, not its mask
    "zamba": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
        "attention_head_dim": 16,
        "layer_types": _HYBRID,
        "layers_block_type": _HYBRID,
    },
}
LIMIT = 20_000_000  # parameters
# Types whose config class makes no small model of COMMON. Those that are in a list of models/packing.py were tried with
# sizes of their own when they came there; the others are taken for the type named here, or are refused.
NOT_TRIED = {
    **dict.fromkeys(("bamba", "falcon", "granitemoehybrid", "kimi_linear", "lfm2_moe", "mamba2", "zamba2"), "listed"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "zaya", "deepseek_v4"), "listed"),
    "emu3": "llama",
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_text",
    "llama4": "llama4_text",
    "mllama": "mllama_text",
    "phi4_multimodal": "phi3",
    "qwen4_exp": "qwen4_exp_text",
    "longcat_flash": "deepseek_v3",
    "blt": "refused",
    "dots3_note": "refused",
    "dots3_note_text": "refused",
}
TYPES = sorted(name for name in NAMES if kinds.not_causal({"model_type": name}) is None and name not in NOT_TRIED)


@pytest.mark.parametrize("kind", TYPES)
def test_documents_of_a_row(kind: str) -> None:
    """The second sees the first where models/packing.py says so; varlen computes what SDPA does where it is listed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    varlen.register()
    sizes = {**COMMON, **SIZES.get(kind, {})}
    if sizes["head_dim"] is None:
        del sizes["head_dim"]
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) < LIMIT
    torch.manual_seed(0)
    rows = torch.randint(3, 17, (2, sum(LENGTHS)))
    rows[1, LENGTHS[0] :] = rows[0, LENGTHS[0] :]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].expand(2, -1)

    def logits(attention: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        with torch.no_grad():  # what begins as zeros and ones would hide what is left out
            for tensor in model.parameters():
                tensor.add_(torch.randn_like(tensor) * 0.1)
            found: torch.Tensor = model(rows, position_ids=positions, use_cache=False).logits
        return found

    masked = logits(plain_attention(kind))
    leaks = not torch.allclose(masked[0, LENGTHS[0] :], masked[1, LENGTHS[0] :], atol=1e-4)
    assert leaks is (why_mixed(kind) is not None)
    if kind in VARLEN:
        torch.testing.assert_close(logits("varlen"), masked, atol=1e-4, rtol=1e-4)


def test_every_type_is_tried_or_named() -> None:
    assert NOT_TRIED.keys() <= set(NAMES)
    assert set(TYPES) >= VARLEN
    assert not VARLEN & NO_FLASH and not any(map(why_mixed, VARLEN))
    assert all(why_mixed(name) for name, why in NOT_TRIED.items() if why == "listed")
