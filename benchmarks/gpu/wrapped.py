"""A model with random weights on one device, wrapped as distft.train wraps it, and what it ran on."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).resolve().parent.parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "flash-attn", "liger-kernel")
# Dense bf16 TFLOP/s from the data sheets; the first name that occurs in the GPU's name counts.
PEAK_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200 NVL": 835,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}

SMALL_MODEL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}
LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


@dataclass(frozen=True)
class Row:
    """What is measured in one row."""

    method: str  # lora, qlora, full
    gradient_checkpointing: bool
    attention: str  # sdpa, flash_attention_2


def describe(device: torch.device) -> dict[str, Any]:
    """The result without its measurements."""
    gpu: dict[str, Any] = {"name": None, "memory_bytes": None, "driver": None, "peak_bf16_tflops": None}
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        gpu["name"], gpu["memory_bytes"] = name, torch.cuda.get_device_properties(0).total_memory
        gpu["driver"], gpu["peak_bf16_tflops"] = driver_version(), peak_tflops(name)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu,
        "versions": {package: package_version(package) for package in PACKAGES} | {"cuda": torch.version.cuda},
        "rows": [],
    }


def peak_tflops(gpu: str) -> float | None:
    """A GPU's peak by its name; None if it is not in the table."""
    return next((peak for key, peak in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", gpu)), None)


def driver_version() -> str | None:
    """The version of the NVIDIA driver, from nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def package_version(package: str) -> str | None:
    """A package's version; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def train_step(model: Any, tokens: torch.Tensor, optimizer: Any, trained: list) -> torch.Tensor:
    """One step as distft's Trainer takes it; returns the loss."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def build(row: Row, shape: dict[str, Any], device: torch.device) -> Any:
    """The model as distft.train.model.build_model makes it; its weights are made, and quantized, on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from distft.config.recipe import Recipe
    from distft.train.model import add_adapters, compute_dtype, quantization_config

    base = {"name_or_path": "random", "quantization": "nf4" if row.method == "qlora" else None}
    full = row.method == "full"
    lora = {"lora": None} if full else {}
    recipe = Recipe.model_validate({"name": "gpu-check", "model": base, "data": {"train": "random"}, **lora})
    config = LlamaConfig(**shape, tie_word_embeddings=False, use_cache=False)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if full else compute_dtype(recipe), attn_implementation=row.attention
        )
    settings = quantization_config(recipe, "ddp") if recipe.model.quantization else None
    if settings is not None:
        quantize(model, settings, device)
    if not full:
        model = add_adapters(model, recipe)
    if row.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def quantize(model: Any, settings: Any, device: torch.device) -> None:
    """Quantize all linear layers but the output layer, in place and on their device, as loading from disk does."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer is model.lm_head:
                continue
            scheme = {
                "compress_statistics": settings.bnb_4bit_use_double_quant,
                "quant_type": settings.bnb_4bit_quant_type,
                "quant_storage": settings.bnb_4bit_quant_storage,
            }
            dtype = settings.bnb_4bit_compute_dtype
            shape = (layer.in_features, layer.out_features)
            quantized = Linear4bit(*shape, bias=False, compute_dtype=dtype, device="meta", **scheme)
            weight = Params4bit(layer.weight.data, requires_grad=False, **scheme)
            quantized.weight = weight.to(device)  # this quantizes
            setattr(parent, name, quantized)
    model.is_loaded_in_4bit = True  # peft looks at it
