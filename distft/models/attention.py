"""What `model.attn_implementation: auto` means; the one place for the rules, the planner and the ranks.

FlashAttention-2 where GPU and precision allow it and the ranks can import flash-attn; else SDPA. Only a rank can see
what is installed there, so the planner counts `auto` as SDPA, which never needs less memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AMPERE = 8.0  # compute capability
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


def largest_head(config: Mapping[str, Any]) -> int:
    """The largest head dimension that a config.json names, of any kind of layer; 0 where it names none."""
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, Mapping) else (config,)
    named = (part.get(name) for part in parts for name in ("head_dim", "global_head_dim"))
    return max((size for size in named if isinstance(size, int)), default=0)


def planned_attention(wanted: str) -> str:
    """What the planner counts for the recipe's model.attn_implementation."""
    return "sdpa" if wanted == "auto" else wanted
