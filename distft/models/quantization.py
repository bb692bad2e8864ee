"""How bitsandbytes stores quantized weights: the settings that every room uses, and the bytes they take."""

from __future__ import annotations

from typing import Any

# QLoRA's 4-bit NormalFloat with double quantization (arXiv 2305.14314), as keyword arguments of transformers'
# BitsAndBytesConfig; the compute and storage dtypes follow the recipe (train/model.py).
NF4_QUANT_TYPE, NF4_DOUBLE_QUANTIZATION = "nf4", True
NF4: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": NF4_QUANT_TYPE,
    "bnb_4bit_use_double_quant": NF4_DOUBLE_QUANTIZATION,
}
# Weights that share an 8-bit scale, and scales that share a float32 one (bitsandbytes functional.py, quantize_4bit).
NF4_BLOCK, NF4_SCALE_BLOCK = 64, 256


def stored_bytes(quantization: str, size: int, rows: int) -> int:
    """Bytes of a weight of `size` elements in `rows` rows.

    NF4: half a byte an element, and the scales. LLM.int8(): a byte an element and a float32 scale a row.
    """
    if quantization == "nf4":
        return size // 2 + -(-size // NF4_BLOCK) + 4 * -(-size // (NF4_BLOCK * NF4_SCALE_BLOCK))
    return size + 4 * rows
