"""plan_accuracy.py, section `formula`: the formula's peaks against peaks counted on fake tensors."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from accuracy_rows import parse, recipe_of

MEAN, WORST = 5.0, 10.0  # bounds, %

# model, tuning, precision, strategy x ranks, attention, micro-batch x length, packed or padded, checkpointing or not;
# then NAME=VALUE: optimizer, masters, targets, dora, offload, global batch.
ROWS = """
smollm2-135m   full    bf16 ddp*1    flash  8x2048 packed keep
smollm2-135m   full    no   ddp*1    sdpa   4x1024 packed keep
smollm2-360m   lora16  bf16 ddp*2    sdpa   4x2048 padded keep
smollm2-360m   nf4:16  bf16 ddp*1    sdpa   8x1024 packed checkpointing
llama-3.2-1b   full    bf16 ddp*1    sdpa   2x2048 packed checkpointing optim=adamw_torch
llama-3.2-1b   lora64  fp16 ddp*4    sdpa   2x1024 padded keep
llama-3.2-1b   full    no   zero2*4  eager  1x1024 padded keep
llama-3.2-3b   lora8   bf16 fsdp*4   flash  2x4096 packed keep
llama-3.2-3b   full    bf16 fsdp*8   flash  2x4096 packed checkpointing
llama-3.2-3b   full    bf16 ddp*1    flash  1x4096 packed checkpointing masters=none
llama-3.2-1b   full    bf16 ddp*8    sdpa   2x2048 packed keep          masters=none
llama-3.1-8b   full    bf16 fsdp*8   flash  1x8192 packed checkpointing masters=none
llama-3.1-8b   full    bf16 zero2*8  flash  2x2048 packed checkpointing masters=none
qwen3-0.6b     full    bf16 ddp*1    sdpa   4x2048 packed keep          masters=none
llama-3.1-8b   full    bf16 ddp*1    flash  1x2048 packed checkpointing optim=paged_adamw_8bit
llama-3.1-8b   lora16  bf16 ddp*8    flash  2x4096 packed keep
llama-3.1-8b   lora16  bf16 zero2*8  sdpa   1x2048 packed checkpointing
llama-3.1-8b   nf4:16  bf16 ddp*1    flash  2x2048 packed checkpointing
llama-3.1-8b   nf4:64  bf16 ddp*1    sdpa   1x2048 packed keep
llama-3.1-8b   int8:16 fp16 ddp*1    sdpa   1x1024 padded keep
llama-3.1-8b   full    bf16 zero3*8  flash  4x2048 packed checkpointing offload=all
llama-3.1-8b   full    bf16 hsdp*8/4 flash  1x8192 packed checkpointing
llama-3.1-8b   lora16  bf16 ddp*4    flash  1x4096 packed keep          targets=q_proj,v_proj
llama-3.1-8b   lora16  bf16 ddp*4    flash  1x4096 packed checkpointing targets=q_proj,v_proj
llama-3.1-8b   lora16  bf16 zero2*4  flash  1x4096 packed keep          targets=q_proj,k_proj,v_proj,o_proj
llama-3.1-8b   nf4:16  bf16 ddp*1    sdpa   1x2048 packed keep          targets=q_proj,v_proj
llama-3.1-8b   lora16  bf16 ddp*4    flash  1x2048 packed keep          dora
llama-3.1-8b   lora16  bf16 ddp*4    flash  1x2048 packed checkpointing dora
llama-2-7b     lora16  bf16 zero3*8  flash  4x2048 packed checkpointing targets=q_proj,v_proj
llama-2-7b     lora16  bf16 zero2*8  flash  2x2048 packed checkpointing dora
llama-3.1-70b  lora16  bf16 zero3*16 flash  1x4096 packed checkpointing
llama-3.1-70b  lora16  bf16 fsdp*16  flash  1x4096 packed checkpointing
llama-3.1-70b  nf4:16  bf16 ddp*8    flash  1x2048 packed checkpointing
llama-3.1-70b  full    bf16 zero3*64 flash  2x4096 packed checkpointing
llama-2-7b     lora8   bf16 ddp*1    sdpa   1x2048 packed keep
llama-2-7b     int8:8  bf16 ddp*1    sdpa   2x512  padded checkpointing
llama-2-7b     nf4:16  bf16 ddp*1    flash  1x2048 packed keep          dora
llama-2-7b     nf4:16  bf16 ddp*1    flash  4x2048 packed checkpointing dora
llama-2-13b    full    bf16 zero1*8  flash  1x2048 packed checkpointing
qwen2.5-0.5b   full    bf16 ddp*1    flash  4x2048 packed keep          optim=adamw_bnb_8bit
qwen2.5-0.5b   lora16  no   ddp*1    sdpa   2x1024 packed keep
qwen2.5-7b     lora32  bf16 zero3*4  flash  2x4096 packed keep
qwen2.5-7b     nf4:16  fp16 ddp*1    sdpa   1x2048 padded checkpointing
qwen2.5-7b     full    bf16 zero2*8  flash  1x4096 packed checkpointing offload=optimizer
qwen2.5-32b    lora16  bf16 fsdp*8   flash  1x4096 packed checkpointing
qwen3-0.6b     full    bf16 ddp*1    sdpa   4x2048 packed keep
qwen3-4b       lora16  bf16 ddp*2    flash  2x2048 packed keep
qwen3-8b       full    bf16 fsdp*8   sdpa   1x4096 packed checkpointing optim=adafactor
qwen1.5-moe    lora16  bf16 zero2*8  flash  1x2048 packed checkpointing targets=q_proj,k_proj,v_proj,o_proj
gemma-2-2b     lora16  bf16 ddp*1    eager  1x2048 packed keep
gemma-2-2b     full    bf16 ddp*8    flash  1x4096 packed checkpointing
gemma-2-9b     nf4:16  bf16 ddp*1    eager  1x2048 packed checkpointing
gemma-3-1b     full    bf16 zero2*4  flash  2x2048 packed keep
gemma-3-1b     lora16  fp16 zero2*2  sdpa   2x2048 padded keep          targets=q_proj,v_proj dora
gemma-3-1b     lora16  bf16 ddp*1    sdpa   4x1024 padded keep
phi-3-mini     lora16  bf16 ddp*1    flash  2x4096 packed keep
phi-3-mini     full    bf16 zero3*8  sdpa   2x2048 packed keep
phi-3-mini     nf4:32  bf16 ddp*1    sdpa   2x2048 padded checkpointing
gpt2           full    no   ddp*2    eager  8x1024 padded keep
gpt2           full    fp16 ddp*1    sdpa   16x512 packed keep          optim=adamw_torch
gpt2-xl        lora16  bf16 ddp*1    sdpa   4x1024 padded keep          targets=c_attn
gpt2-xl        lora16  bf16 ddp*1    sdpa   4x1024 padded keep
mistral-7b     lora16  bf16 ddp*8    flash  1x8192 packed checkpointing
mistral-7b     int8:16 bf16 ddp*1    flash  1x2048 packed keep
mistral-7b-0.1 full    bf16 zero3*8  sdpa   1x8192 packed checkpointing
mixtral-8x7b   lora16  bf16 zero3*8  flash  1x4096 packed checkpointing targets=q_proj,k_proj,v_proj,o_proj
mixtral-8x7b   full    bf16 zero3*32 flash  1x4096 packed checkpointing
smollm3-3b     full    bf16 fsdp*4   flash  2x4096 packed checkpointing optim=adamw_torch
smollm3-3b     lora16  bf16 ddp*1    sdpa   2x2048 packed keep
olmo-2-7b      lora16  bf16 ddp*2    flash  2x2048 packed keep
olmo-2-7b      full    bf16 zero3*8  flash  2x4096 packed checkpointing
starcoder2-3b  lora16  bf16 ddp*1    sdpa   2x4096 packed keep
starcoder2-3b  full    bf16 zero2*4  flash  1x4096 packed checkpointing
falcon-7b      lora16  bf16 ddp*1    sdpa   1x2048 packed keep
falcon-7b      nf4:16  bf16 ddp*1    sdpa   2x1024 padded checkpointing
pythia-160m    full    no   ddp*1    sdpa   8x1024 padded keep
pythia-1.4b    full    bf16 zero1*4  flash  4x2048 packed keep
opt-1.3b       lora16  fp16 ddp*1    sdpa   2x2048 padded keep
opt-1.3b       full    bf16 ddp*4    eager  1x1024 packed checkpointing optim=adafactor
bloom-560m     full    bf16 ddp*1    eager  2x1024 padded keep
bloom-7b1      lora16  bf16 zero3*4  eager  1x2048 packed checkpointing
aya-23-8b      lora16  bf16 ddp*4    flash  1x4096 packed keep
command-r      lora16  bf16 zero3*8  flash  1x4096 packed checkpointing
granite-3.1-2b lora16  bf16 ddp*1    sdpa   2x2048 packed keep
granite-3.1-2b full    bf16 fsdp*4   flash  1x4096 packed checkpointing
stablelm-3b    lora16  bf16 ddp*1    flash  2x2048 packed keep
stablelm-3b    full    bf16 zero2*8  sdpa   2x2048 padded checkpointing
"""


def run(folder: Path, only: str) -> dict[str, Any]:
    from distft.models.shapes import read_model_shape
    from distft.planner.memory import Estimator
    from distft.simulation.simulate import simulate

    rows, spent = [], {"formula": 0.0, "simulation": 0.0}
    print(f"{'':104}{'formula':>9}{'simulated':>11}  GiB{'error':>9}")
    for row in parse(ROWS):
        if only not in row.text:
            continue
        recipe = recipe_of(folder, row)
        began = time.perf_counter()
        estimate = Estimator(recipe, read_model_shape(recipe)).memory(row.setting)
        between = time.perf_counter()
        simulated = simulate(recipe, row.setting)
        spent["formula"] += between - began
        spent["simulation"] += time.perf_counter() - between
        error = 100 * (estimate.peak / simulated.peak - 1)
        print(f"{row.text:104}{estimate.peak / 2**30:9.2f}{simulated.peak / 2**30:11.2f}{error:+13.2f}%", flush=True)
        rows.append(
            {"row": row.text, "formula": estimate.peak, "simulated": simulated.peak, "error_percent": round(error, 3)}
            | {"moment": estimate.moment, "simulated_moment": simulated.moment}
        )
    errors = [row["error_percent"] for row in rows]
    under = [error for error in errors if error < 0]
    figures = {
        "rows": len(rows),
        "mean_absolute_percent": round(statistics.mean(map(abs, errors)), 3),
        "worst_percent": max(errors, key=abs),
        "too_low": len(under),
        "mean_too_low_percent": round(statistics.mean(under), 3) if under else 0.0,
        "worst_too_low_percent": min(under, default=0.0),
        "formula_milliseconds": round(1000 * spent["formula"] / len(rows), 2),
        "simulation_seconds": round(spent["simulation"] / len(rows), 2),
    }
    print()
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<26}{value:>10}")
    bounds = {
        f"mean < {MEAN}%": figures["mean_absolute_percent"] < MEAN,
        f"worst < {WORST}%": abs(figures["worst_percent"]) < WORST,
    }
    return {**figures, "bounds": bounds, "table": rows}
