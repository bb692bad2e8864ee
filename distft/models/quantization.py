"""How bitsandbytes stores quantized weights: the settings that every room uses, and the bytes they take.

And what is known of checkpoints that are stored quantized.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
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


# Methods of stored weights that adapters are trained on: bitsandbytes' as they are, the others dequantized on loading.
# Each was trained under ddp, zero3 and fsdp with equal losses (tests/integration/test_stored_quantized.py).
AS_STORED, DEQUANTIZED = ("bitsandbytes",), ("mxfp4", "fp8")


# Files beside config.json that say it alone: modelopt's, AutoGPTQ's and AutoAWQ's own.
BESIDE = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
# Names of weights; the integers under other names are buffers (positions, masks).
WEIGHT = re.compile(r"(weight|weight_packed|experts\.\w+)$")


def with_file_beside(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A config.json that says how the weights in its folder are stored, where only another file there does."""
    for name, by in {} if disk_quantization(config) else BESIDE.items():
        try:
            found = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            continue
        # modelopt may quantize nothing but the cache of keys and values.
        own = found.get("quantization", found) if isinstance(found, dict) else None
        if isinstance(own, dict) and (by != "modelopt" or own.get("quant_algo")):
            return config | {"quantization_config": own | {"quant_method": by}}
    return config


def unexplained(config: Mapping[str, Any], dtypes: Mapping[str, str]) -> str | None:
    """A weight that is no plain number, where nothing says how it is quantized; None if there is none.

    Args:
        dtypes: of the stored tensors by name, as safetensors calls them.
    """
    if disk_quantization(config):
        return None
    for name, dtype in dtypes.items():
        if dtype.startswith(("F8", "F6", "F4")) or (dtype.startswith(("I", "U")) and WEIGHT.search(name)):
            return f"{name} in {dtype}"
    return None


def disk_quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the weights of a config.json are stored quantized; {} for plain weights.

    Older files of compressed-tensors have it under another name, multimodal models may have it in the text's part.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(found := part.get(key), Mapping):
                return found
    return {}


def method(config: Mapping[str, Any]) -> str:
    """How the weights are stored quantized, by transformers' name; empty for plain weights."""
    found = disk_quantization(config)
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    nameless = "mlx" if isinstance(config.get("quantization"), Mapping) else "without a name"  # mlx-lm writes both
    return str(found.get("quant_method") or nameless) if found else ""


def bits_in_memory(config: Mapping[str, Any]) -> str | None:
    """`nf4` or `int8` where the stored weights stay in 4 or 8 bits, as model.quantization has them."""
    found = disk_quantization(config)
    return "nf4" if found.get("load_in_4bit") else "int8" if found.get("load_in_8bit") else None


def is_kept(config: Mapping[str, Any], module: str) -> bool:
    """Whether a stored checkpoint has a linear layer in full precision (transformers quantizers_utils.py,
    should_convert_module)."""
    patterns = disk_quantization(config).get("llm_int8_skip_modules") or ()
    return any(re.match(rf"(?:{p})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(p) for p in map(str, patterns))


def stored_bytes(quantization: str, size: int, rows: int, config: Mapping[str, Any] = {}) -> int:
    """Bytes of a weight of `size` elements in `rows` rows.

    NF4: half a byte an element, and the scales: 8-bit ones, or float32 where the checkpoint of this config.json says
    so. LLM.int8(): a byte an element and a float32 scale a row.
    """
    if quantization != "nf4":
        return size + 4 * rows
    scales = -(-size // NF4_BLOCK)
    if not disk_quantization(config).get("bnb_4bit_use_double_quant", True):
        return size // 2 + 4 * scales
    return size // 2 + scales + 4 * -(-size // (NF4_BLOCK * NF4_SCALE_BLOCK))
