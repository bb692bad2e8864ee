"""What `model.attn_implementation: auto` means; the one place for the rules, the planner and the ranks.

The newest FlashAttention that GPU and precision allow and the ranks can import; for packed rows else torch's own
varlen_attn (train/varlen.py), where it works there and the model's class can use it; else SDPA, or eager attention
where the class has no SDPA. Only a rank can see what is installed there, so the planner counts `auto` as the last,
which never needs less memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from distft.models.kinds import has_own_code

AMPERE = 8.0  # compute capability


class Flash(NamedTuple):
    """A version of FlashAttention: compute capabilities (the last one excluded), largest head, and whether it has
    dropout."""

    least: float
    below: float
    largest_head: int
    dropout: bool


# The newest first. Capabilities: transformers 5.23 modeling_flash_attention_utils.py,
# FLASH_ATTENTION_COMPATIBILITY_MATRIX; the last ones, heads and dropout: flash-attn's README, its hopper/ (kernels of
# Hopper) and flash_attn/cute/interface.py ("Supported: 9.x, 10.x, 11.x").
FLASH = {
    "flash_attention_4": Flash(9.0, 12.0, 128, False),
    "flash_attention_3": Flash(AMPERE, 10.0, 256, False),
    "flash_attention_2": Flash(AMPERE, float("inf"), 256, True),
}
# They take a micro-batch as one row without padding, and the bounds of its documents instead of a mask.
UNPADDED = (*FLASH, "varlen")
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

# Model types whose class has no `_supports_sdpa` (the same).
NO_SDPA = frozenset(
    [
        "big_bird",
        "bigbird_pegasus",
        "bloom",
        "codegen",
        "cpmant",
        "deepseek_v4",
        "falcon_mamba",
        "flint",
        "git",
        "got_ocr2",
        "gpt_neo",
        "gpt_neox_japanese",
        "gpt_oss",
        "gptj",
        "granite_swa",
        "granitemoe_swa",
        "hy_v4",
        "inkling2_text",
        "mamba",
        "mamba2",
        "megatron-bert",
        "mimo_v2_flash",
        "mpt",
        "mvp",
        "openai-gpt",
        "prophetnet",
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
# ... and from 5.21 on: they cap the logits of their attention, which SDPA cannot do.
NO_SDPA_FROM_5_21 = frozenset(("gemma2", "vaultgemma"))

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
    device_type: str,
    compute_capability: float | None,
    mixed_precision: str,
    config: Mapping[str, Any],
    name: str = "flash_attention_2",
) -> str | None:
    """Why a version of FlashAttention cannot run there, whatever is installed; None where it can.

    Its kernels are for recent GPUs, in bf16 and fp16 (flash-attn's README). What the first version cannot do, no later
    one can.

    Args:
        compute_capability: None where it is not known; the GPU is then taken for a recent one.
        mixed_precision: bf16 | fp16 | no.
        config: the model's config.json.
    """
    flash = FLASH[name]
    if device_type != "cuda":
        return "no GPU"
    if compute_capability is not None and compute_capability < flash.least:
        return f"the GPU is older than {'Ampere' if flash.least == AMPERE else 'Hopper'}"
    if compute_capability is not None and compute_capability >= flash.below:
        return f"the GPU is newer than {name}"
    if mixed_precision == "no":
        return "float32"
    kind = config.get("model_type")
    if kind in NO_FLASH:
        return f"{kind} models have no FlashAttention"
    if not flash.dropout and has_dropout(config):
        return "it has no dropout, and config.json asks for it in attention"
    size = largest_head(config)
    return f"heads of {size}; {name} has kernels for up to {flash.largest_head}" if size > flash.largest_head else None


def has_dropout(config: Mapping[str, Any]) -> bool:
    """Whether a config.json asks for dropout in attention."""
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, Mapping) else (config,)
    return any(part.get(name) for part in parts for name in ("attention_dropout", "attn_pdrop"))


def no_varlen(config: Mapping[str, Any]) -> str | None:
    """Why a model of this config.json cannot use varlen; None where it can. On GPUs see no_flash_attention, too."""
    kind = config.get("model_type")
    if kind not in VARLEN or has_own_code(config):
        return f"{kind} models cannot use it"
    if has_dropout(config):
        return "it has no dropout, and config.json asks for it in attention"
    return None


def largest_head(config: Mapping[str, Any]) -> int:
    """The largest head dimension that a config.json names, of any kind of layer; 0 where it names none."""
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, Mapping) else (config,)
    named = (part.get(name) for part in parts for name in ("head_dim", "global_head_dim"))
    return max((size for size in named if isinstance(size, int)), default=0)


def plain_attention(model_type: str | None) -> str:
    """What runs everywhere: sdpa, or eager for models that have none."""
    return "eager" if model_type in NO_SDPA | NO_SDPA_FROM_5_21 else "sdpa"


def planned_attention(wanted: str, model_type: str | None = None) -> str:
    """What the planner counts for the recipe's model.attn_implementation: flex_attention needs no more than SDPA.

    Args:
        model_type: None where the model is not read yet.
    """
    return plain_attention(model_type) if wanted in ("auto", "flex_attention") else wanted
