"""plan_accuracy.py, section `published`: peaks that others measured on GPUs, beside the formula's.

Figures without model, batch and length are left out: torchtune's unpacked rows, Hugging Face's BERT, NeMo's speeds.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from accuracy_rows import Row, parse, recipe_of
from model_configs import CONFIGS

from distft.models.shapes import read_model_shape
from distft.planner.memory import Estimator

FAR = 10.0  # %; a row that is further off has to say why

# `peak` is their figure in GiB; `states` is what they hold per trained parameter (weights/gradients/optimizer) where it
# differs from distft: torchtune trains in 16 bit throughout. `chunked`: the loss of an eighth of the tokens at a time;
# logits then take 2 bytes per entry, plus 4 + 4 for an eighth of them. Only the torchtitan rows accumulate gradients.
# torchtune: README.md, "Memory and training speed" (packed 2 x 2048, compiled), and its ladder of optimizations
# (2 x 4096, each row adds one). torchtitan: llama3 8B on H100, selective checkpointing, which lies between its rows.
PEAKS = """
llama-3.1-8b   full   bf16 ddp*1    flash 2x2048 packed checkpointing peak=18.9 states=2/0/0 chunked compile
llama-3.1-8b   full   bf16 ddp*1    flash 2x2048 packed checkpointing peak=37.4 states=2/2/0 chunked compile
llama-3.1-8b   lora8  bf16 ddp*1    flash 2x2048 packed checkpointing peak=16.2 states=2/2/4 chunked compile
llama-3.1-8b   lora8  bf16 ddp*1    flash 2x2048 packed keep          peak=30.3 states=2/2/4 chunked compile
llama-3.1-8b   nf4:8  bf16 ddp*1    flash 2x2048 packed checkpointing peak=7.4 states=2/2/4 chunked compile
llama-3.1-70b  lora16 bf16 fsdp*8   flash 2x2048 packed checkpointing peak=27.6 chunked compile
llama-3.1-405b nf4:16 bf16 fsdp*8   flash 2x2048 packed checkpointing peak=41.7 chunked compile
llama-3.2-3b   full   bf16 ddp*1    flash 2x4096 packed keep          peak=60.0 states=2/2/4
llama-3.2-3b   full   bf16 ddp*1    flash 2x4096 packed keep          peak=51.0 states=2/2/4 compile
llama-3.2-3b   full   bf16 ddp*1    flash 2x4096 packed keep          peak=42.9 states=2/2/4 chunked compile
llama-3.2-3b   full   bf16 ddp*1    flash 2x4096 packed checkpointing peak=24.9 states=2/2/4 chunked compile
llama-3.2-3b   full   bf16 ddp*1    flash 2x4096 packed checkpointing peak=23.1 states=2/0/4 chunked compile in-backward
llama-3.2-3b   full   bf16 ddp*1    flash 2x4096 packed checkpointing peak=21.8 states=2/0/4 chunked compile offloaded
llama-3.2-3b   full   bf16 ddp*1    flash 2x4096 packed checkpointing peak=17.6 states=2/0/2 chunked compile offloaded
llama-3.2-3b   lora8  bf16 ddp*1    flash 2x4096 packed checkpointing peak=8.5 states=2/2/4 chunked compile offloaded
llama-3.2-3b   nf4:8  bf16 ddp*1    flash 2x4096 packed checkpointing peak=4.6 states=2/2/4 chunked compile offloaded
llama-3.1-8b   full   bf16 fsdp*8   flash 2x8192 packed checkpointing peak=82.4
llama-3.1-8b   full   bf16 fsdp*8   flash 2x8192 packed keep          peak=82.4
llama-3.1-8b   full   bf16 fsdp*8   flash 2x8192 packed keep          peak=77.0 compile
llama-3.1-8b   full   bf16 fsdp*128 flash 2x8192 packed checkpointing peak=67.0
llama-3.1-8b   full   bf16 fsdp*128 flash 2x8192 packed keep          peak=67.0
llama-3.1-8b   full   bf16 fsdp*128 flash 2x8192 packed keep          peak=62.0 compile
"""
CHUNKED = 2 + (4 + 4) / 8  # bytes per token and vocabulary entry

# k: a block's activations in a backward pass under checkpointing are 2 k T h bytes, measured with torch's memory
# profiler (Bekman, ml-engineering, training/performance: bf16, no LoRA, FlashAttention).
PER_BLOCK = {"smollm2-360m": 24, "llama-3.1-8b": 28, "mistral-7b": 28, "qwen3-8b": 29.8, "qwen3-4b": 38}


def run(folder: Path, only: str) -> dict[str, Any]:
    rows = []
    print(f"{'GiB':112}{'theirs':>8}{'distft':>8}{'as they':>9}{'ratio':>7}")
    for row in parse(PEAKS):
        if only not in row.text:
            continue
        recipe = recipe_of(folder, row)
        estimator = Estimator(recipe, read_model_shape(recipe))
        ours = estimator.memory(row.setting)
        theirs, measured = _as_they(row, estimator), float(row.extra["peak"])
        ratio = theirs / 2**30 / measured
        why = _why(row, ratio) if abs(ratio - 1) > FAR / 100 else ""
        print(f"{row.text:112}{measured:8.1f}{ours.peak / 2**30:8.1f}{theirs / 2**30:9.1f}{ratio:7.2f}  {why}")
        rows.append(
            {"row": row.text, "published_gib": measured, "distft_bytes": ours.peak, "as_they_bytes": theirs}
            | {"ratio": round(ratio, 3), "why": why}
        )
    blocks = _per_block(folder) if only in "per block" else []
    off = [abs(100 * (row["ratio"] - 1)) for row in rows]
    if off:
        print(
            f"\nmedian {statistics.median(off):.0f}% off, {sum(error <= FAR for error in off)} of {len(off)} within 10%"
        )
    return {"table": rows, "per_block": blocks}


def _why(row: Row, ratio: float) -> str:
    """Why a row differs."""
    if row.setting.strategy == "fsdp" and "chunked" not in row.extra:
        if row.setting.gradient_checkpointing:
            return "they checkpoint less"
        return "they checkpoint selectively" + (", and compile" if "compile" in row.extra else "")
    if ratio < 1:
        return "not all their settings are published"
    if row.recipe["model"]["quantization"] and row.setting.strategy == "fsdp":
        return "their own NF4 kernels, compiled"
    return "activations are offloaded" if "offloaded" in row.extra else "torch.compile keeps fewer activations"


def _as_they(row: Row, estimator: Any) -> int:
    """The peak with their states, their compute in 16 bit, and their loss."""
    logits_bytes = CHUNKED * CONFIGS[row.model]["vocab_size"] * _tokens(row)
    if "states" not in row.extra:
        found = estimator.memory(row.setting)
        return int(found.peak - (max(0, found.logits - logits_bytes) if "chunked" in row.extra else 0))
    weights, gradients, optimizer = map(float, row.extra["states"].split("/"))
    setting = replace(row.setting, strategy="zero2", shard_size=1)  # computes in 16 bit without autocast
    sizes, totals = estimator.sizes, []
    for (moment, _), live in estimator.step(setting, estimator.recipe.data.max_length).items():
        logits = min(live["logits"], logits_bytes) if "chunked" in row.extra else live["logits"]
        rest = 0 if moment == "optimizer" else live["activations"]
        totals.append(live["gradients"] * gradients / 4 + logits + rest)
    return int(sizes.frozen_bytes + (weights + optimizer) * sizes.trained + max(totals))


def _tokens(row: Row) -> int:
    return row.setting.micro_batch_size * row.recipe["data"]["max_length"]


def _per_block(folder: Path) -> list[dict[str, Any]]:
    from distft.models.architecture import describe
    from distft.planner.activations import Mode, polynomials, symbols

    rows = []
    print(f"\n{'activations of a block, in 2 T h bytes':40}{'measured':>9}{'distft':>9}{'ratio':>7}")
    for name, measured in PER_BLOCK.items():
        sizes = describe(CONFIGS[name]).sizes
        table = polynomials(CONFIGS[name]["model_type"], Mode("low", "full", "flash", True))
        tokens = 4096
        value = symbols(sizes, tokens, tokens, 1)
        peak = max(sum(size * value[m] for m, size in p.items() if "T" in m) for p in table["top"])
        found = peak / (2 * tokens * sizes.hidden_size)
        print(f"{name:40}{measured:9.1f}{found:9.1f}{found / measured:7.2f}")
        rows.append({"model": name, "measured": measured, "distft": round(found, 2)})
    print("ours has the backward pass's temporaries in it; theirs may not")
    return rows
