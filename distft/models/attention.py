"""What `model.attn_implementation: auto` means; the one place for the rules, the planner and the ranks.

FlashAttention-2 where GPU and precision allow it and the ranks can import flash-attn; for packed rows else torch's own
varlen_attn (train/varlen.py), where it works there and the model's class can use it; else SDPA. Only a rank can see
what is installed there, so the planner counts `auto` as SDPA, which never needs less memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distft.models.kinds import has_own_code

AMPERE = 8.0  # compute capability
# They take a micro-batch as one row without padding, and the bounds of its documents instead of a mask.
UNPADDED = ("flash_attention_2", "varlen")
LARGEST_HEAD = 256  # flash-attn's README: head dimensions up to 256
# Model types of transformers 5.17 to 5.23 whose class has no `_supports_flash_attn` (tests/unit/test_rules.py).
NO_FLASH = frozenset(
    [
        "axk2",
        "big_bird",
        "bigbird_pegasus",
        "bloom",
        "blt",
        "codegen",
        "cpmant",
        "deepseek_v32",
        "deepseek_v4",
        "doge",
        "dots3_note",
        "dots3_note_text",
        "falcon_mamba",
        "git",
        "glm_moe_dsa",
        "got_ocr2",
        "gpt_neox_japanese",
        "hy_v4",
        "inkling2_text",
        "inkling_text",
        "llama4",
        "llama4_text",
        "mamba",
        "mamba2",
        "megatron-bert",
        "minimax_m3_vl_text",
        "mllama",
        "mpt",
        "mvp",
        "openai-gpt",
        "prophetnet",
        "qwen4_exp",
        "qwen4_exp_text",
        "reformer",
        "rembert",
        "roformer",
        "rwkv",
        "trocr",
        "xglm",
        "xlm",
        "xlnet",
        "xlstm",
    ]
)

# Model types of transformers 5.23 with which varlen computes what SDPA does (tests/unit/test_packing.py). Others do not
# tell it where documents begin, or were not tried.
VARLEN = frozenset(
    [
        "apertus",
        "arcee",
        "aria_text",
        "axk1",
        "beam",
        "bitnet",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "cwm",
        "dbrx",
        "deepseek_v2",
        "deepseek_v3",
        "diffllama",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "flex_olmo",
        "gemma",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "gemma4_unified_text",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt-sw3",
        "gpt2",
        "gpt_neox",
        "granite",
        "granitemoe",
        "granitemoeshared",
        "helium",
        "hrm_text",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hy_v3",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jais2",
        "jetmoe",
        "kolibri1",
        "laguna",
        "llama",
        "mellum",
        "minicpm3",
        "minimax_m2",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "modernbert-decoder",
        "nanochat",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "solar_open",
        "stablelm",
        "starcoder2",
        "youtu",
    ]
)


def no_flash_attention(
    device_type: str, compute_capability: float | None, mixed_precision: str, config: Mapping[str, Any]
) -> str | None:
    """Why FlashAttention-2 cannot run there, whatever is installed; None where it can.

    Its kernels are for Ampere and later, in bf16 and fp16 (flash-attn's README).

    Args:
        compute_capability: None where it is not known; the GPU is then taken for a recent one.
        mixed_precision: bf16 | fp16 | no.
        config: the model's config.json.
    """
    if device_type != "cuda":
        return "no GPU"
    if compute_capability is not None and compute_capability < AMPERE:
        return "the GPU is older than Ampere"
    if mixed_precision == "no":
        return "float32"
    kind = config.get("model_type")
    if kind in NO_FLASH:
        return f"{kind} models have no flash_attention_2"
    size = largest_head(config)
    return f"heads of {size}; FlashAttention-2 has kernels for up to {LARGEST_HEAD}" if size > LARGEST_HEAD else None


def no_varlen(config: Mapping[str, Any]) -> str | None:
    """Why a model of this config.json cannot use varlen; None where it can. On GPUs see no_flash_attention, too."""
    kind = config.get("model_type")
    if kind not in VARLEN or has_own_code(config):
        return f"{kind} models cannot use it"
    if config.get("attention_dropout") or config.get("attn_pdrop"):
        return "it has no dropout, and config.json asks for it in attention"
    return None


def largest_head(config: Mapping[str, Any]) -> int:
    """The largest head dimension that a config.json names, of any kind of layer; 0 where it names none."""
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, Mapping) else (config,)
    named = (part.get(name) for part in parts for name in ("head_dim", "global_head_dim"))
    return max((size for size in named if isinstance(size, int)), default=0)


def planned_attention(wanted: str) -> str:
    """What the planner counts for the recipe's model.attn_implementation."""
    return "sdpa" if wanted == "auto" else wanted
