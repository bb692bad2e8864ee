"""plan_accuracy.py, section `measured`: peaks of real steps on a GPU, beside a simulation of the same script.

Anas Bouzid measured them for fitcheck-llm (github.com/Anassbzdd/fitcheck, data/measurements: t4-sweep-2026-09-15 and
final-t4-20260921; torch 2.14 and 2.10, transformers 5.17 and 5.0, peft 0.20 and 0.19): a Tesla T4, float16 without
autocast, LoRA on q, k, v and o, AdamW, checkpointed blocks, the loss of all tokens at once. NF4 has no second
quantization there, and prepare_model_for_kbit_training makes float32 of what is not quantized, which distft does not.
The script is not distft's; operators, kernels, states and what autograd keeps are.

`reserved` is what torch's caching allocator took for that: planner/memory.py, GAPS and ERROR.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from accuracy_rows import parse, recipe_of

from distft.models.quantization import NF4_BLOCK, NF4_SCALE_BLOCK
from distft.planner.memory import ERROR, GAPS, OTHER_ERROR, OTHER_GAPS
from distft.simulation.fake_model import build
from distft.simulation.trace import trace

# MiB: torch.cuda.max_memory_allocated / max_memory_reserved. `sdpa` there is its memory-efficient kernel, without mask.
STEPS = """
qwen2.5-1.5b  nf4:32  eager 2x1024 6838.5/7548
qwen2.5-1.5b  lora32  eager 2x1024 7405.8/7910
qwen2.5-1.5b  nf4:32  sdpa  2x1024 6827.7/7400
qwen2.5-1.5b  lora32  sdpa  2x1024 7401.8/7766
smollm2-1.7b  nf4:32  eager 4x1024 5297.3/6996
smollm2-1.7b  lora32  eager 4x1024 6536.7/7734
smollm2-1.7b  nf4:32  sdpa  4x1024 5281.3/5940
smollm2-1.7b  lora32  sdpa  4x1024 6528.7/7094
smollm2-135m  nf4:32  eager 1x4096 3679.3/5224
smollm2-135m  lora32  eager 1x4096 3180.1/4476
smollm2-135m  nf4:32  sdpa  1x4096 3576.8/3784
smollm2-135m  lora32  sdpa  1x4096 3148.1/3284
smollm2-135m  nf4:32  eager 2x512  1067.2/1192
smollm2-135m  lora32  eager 2x512  1027.3/1104
smollm2-135m  nf4:32  sdpa  2x512  1063.8/1194
smollm2-135m  lora32  sdpa  2x512  1026.9/1070
smollm2-360m  nf4:32  eager 1x4096 5687.2/8164
smollm2-360m  lora32  eager 1x4096 4908.5/7304
smollm2-360m  nf4:32  sdpa  1x4096 4017.8/4518
smollm2-360m  lora32  sdpa  1x4096 3754.8/3912
tinyllama     nf4:32  eager 2x1024 2876.3/3666
tinyllama     lora32  eager 2x1024 3518.1/4226
tinyllama     nf4:32  sdpa  2x1024 2531.6/2896
tinyllama     lora32  sdpa  2x1024 3287.8/3532
tinyllama     nf4:32  eager 2x2048 6651.0/7840
tinyllama     lora32  eager 2x2048 6616.1/7662
tinyllama     nf4:32  sdpa  2x2048 3895.9/4750
tinyllama     lora32  sdpa  2x2048 4354.1/4696
tinyllama     nf4:32  eager 2x512  1850.3/2216
tinyllama     lora32  eager 2x512  2757.2/2908
tinyllama     nf4:32  sdpa  2x512  1849.3/2054
tinyllama     lora32  sdpa  2x512  2756.2/2880
qwen2.5-7b    nf4:16  eager 1x1024 10584.8/11746
qwen2.5-7b    nf4:16  sdpa  1x1024 10585.8/11880
mistral-7b    nf4:16  eager 1x1024 6190.6/6740
mistral-7b    nf4:16  sdpa  1x1024 6056.3/6400
deepseek-1.3b nf4:16  eager 1x1024 1975.5/2274
deepseek-1.3b nf4:16  sdpa  1x1024 1971.7/2172
qwen2.5-1.5b  nf4:16  eager 1x1024 4235.8/5060
qwen2.5-1.5b  nf4:16  sdpa  1x1024 4235.2/5212
llama-3.2-3b  nf4:16  eager 1x1024 5498.5/6212
llama-3.2-3b  nf4:16  sdpa  1x1024 5495.0/6268
llama-3.2-1b  nf4:16  eager 1x1024 3728.1/4058
llama-3.2-1b  nf4:16  sdpa  1x1024 3723.1/4026
"""
WORKSPACES = 2 * 8.125  # MiB: cuBLAS's, in torch's allocator: a T4's, of the forward and the backward thread
MEAN, WORST = 0.5, 1.0  # %, of the simulation


def run(folder: Path, only: str) -> dict[str, Any]:
    rows = []
    print(f"{'MiB':40}{'measured':>9}{'simulated':>10}{'ratio':>7}{'reserved':>10}")
    for line in filter(None, map(str.strip, STEPS.splitlines())):
        if only not in line:
            continue
        model, tuning, attention, size, peaks = line.split()
        allocated, reserved = map(float, peaks.split("/"))
        found = _simulated(folder, model, tuning, attention, size) / 2**20 + WORKSPACES
        rows.append({"row": line, "simulated_mib": found, "ratio": found / allocated, "reserved": reserved})
        name = f"{model:14}{tuning:8}{attention:6}{size}"
        print(f"{name:40}{allocated:9.0f}{found:10.0f}{found / allocated:7.3f}{reserved:10.0f}", flush=True)
    off = [100 * abs(row["ratio"] - 1) for row in rows]
    print(f"\n{len(rows)} steps: {statistics.mean(off):.1f}% off in the mean, {max(off):.1f}% at worst")
    for attention, gaps, error in (("sdpa", OTHER_GAPS, OTHER_ERROR), ("eager", GAPS["eager"], ERROR["eager"])):
        if ratios := [row["reserved"] / row["simulated_mib"] for row in rows if attention in row["row"]]:
            away = sorted(100 * abs(ratio / (1 + gaps) - 1) for ratio in ratios)
            print(
                f"the allocator takes {100 * statistics.median(ratios) - 100:.0f}% more in the median with {attention};"
                f" with {gaps:.0%} added, 9 of 10 are at most {away[math.ceil(0.9 * len(away)) - 1]:.0f}% off (the"
                f" plan says {error:.0%}), the worst {away[-1]:.0f}%"
            )
    bounds = {f"mean <= {MEAN}%": statistics.mean(off) <= MEAN, f"worst <= {WORST}%": max(off) <= WORST}
    return {"table": rows, "bounds": bounds}


def _simulated(folder: Path, model: str, tuning: str, attention: str, size: str) -> int:
    """Bytes at the peak."""
    targets = "targets=q_proj,k_proj,v_proj,o_proj"
    row = next(parse(f"{model} {tuning} fp16 ddp*1 {attention} {size} padded checkpointing peak=0 {targets}"))
    recipe, runs = recipe_of(folder, row), attention
    if attention == "sdpa":
        runs = "flash_attention_2"  # no mask is made for their rows, as for FlashAttention's
    made = build(recipe, "autocast", runs)
    quantized = 0
    for module in made.modules():
        if type(module).__name__ == "Linear4bit":
            quantized += module.in_features * module.out_features
            for parameter in (module.bias,) if module.bias is not None else ():
                parameter.data = parameter.data.float()
    if quantized:
        for parameter in made.parameters():
            if type(parameter).__name__ != "Params4bit":
                parameter.data = parameter.data.float()
    held: list[Any] = []  # their script holds the outputs, and with them the logits, until the step is over
    forward = made.forward
    made.forward = lambda *args, **kwargs: (held.append(forward(*args, **kwargs)), held[-1])[1]
    steps = trace(
        recipe,
        made,
        dtype_regime="zero",  # without autocast
        micro_batch_size=row.setting.micro_batch_size,
        gradient_checkpointing=True,
        attn_implementation=runs,
    )
    blocks = quantized // NF4_BLOCK
    single = 4 * blocks - (blocks + 4 * blocks // NF4_SCALE_BLOCK)  # their scales are not quantized
    return max(steps.total(segment) for segment in steps.peaks if segment[0] != "warm-up") + single
