"""What `model.attn_implementation: auto` means; the one place for the rules, the planner and the ranks.

FlashAttention-2 where GPU and precision allow it and the ranks can import flash-attn; else SDPA. Only a rank can see
what is installed there, so the planner counts `auto` as SDPA, which never needs less memory.
"""

from __future__ import annotations

AMPERE = 8.0  # compute capability


def no_flash_attention(device_type: str, compute_capability: float | None, mixed_precision: str) -> str | None:
    """Why FlashAttention-2 cannot run there, whatever is installed; None where it can.

    Its kernels are for Ampere and later, in bf16 and fp16 (flash-attn's README).

    Args:
        compute_capability: None where it is not known; the GPU is then taken for a recent one.
        mixed_precision: bf16 | fp16 | no.
    """
    if device_type != "cuda":
        return "no GPU"
    if compute_capability is not None and compute_capability < AMPERE:
        return "the GPU is older than Ampere"
    return "float32" if mixed_precision == "no" else None


def planned_attention(wanted: str) -> str:
    """What the planner counts for the recipe's model.attn_implementation."""
    return "sdpa" if wanted == "auto" else wanted
