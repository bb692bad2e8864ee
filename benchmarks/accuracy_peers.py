"""plan_accuracy.py, section `peers`: other estimators on the same rows, in the same run.

DeepSpeed's estimators and accelerate's estimate-memory are called as functions. fitcheck-llm (0.3.1; calibrated on a
T4 with transformers and peft) is a command: the one that FITCHECK names, or `fitcheck` on the PATH; without it the
column stays empty. All figures are GiB, beside the simulated peak, and count only tensors: no context or gaps.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from accuracy_rows import Row, parse, recipe_of
from model_configs import CONFIGS

from distft.models.shapes import ModelShape, read_model_shape
from distft.planner.memory import Estimator
from distft.simulation.simulate import simulate

ROWS = """
llama-3.2-1b   lora16  bf16 ddp*1   sdpa  4x1024 packed keep
llama-3.1-8b   lora16  bf16 ddp*1   flash 2x4096 packed keep
llama-3.1-8b   lora16  bf16 ddp*1   flash 1x2048 packed checkpointing
llama-3.1-8b   nf4:16  bf16 ddp*1   flash 2x2048 packed checkpointing
llama-3.1-8b   int8:16 bf16 ddp*1   flash 1x1024 packed checkpointing
qwen2.5-0.5b   full    bf16 ddp*1   flash 4x2048 packed checkpointing
qwen2.5-7b     nf4:16  bf16 ddp*1   flash 1x2048 packed keep
gemma-2-2b     lora16  bf16 ddp*1   eager 1x2048 packed keep
phi-3-mini     lora16  bf16 ddp*1   flash 1x2048 packed keep
gpt2-xl        full    bf16 ddp*1   flash 4x1024 packed keep
llama-3.1-8b   full    bf16 zero2*8 flash 1x2048 packed checkpointing
llama-3.1-8b   lora16  bf16 zero2*8 flash 1x2048 packed checkpointing
llama-3.1-8b   full    bf16 zero3*8 flash 1x2048 packed checkpointing
llama-3.1-70b  lora16  bf16 zero3*8 flash 1x2048 packed checkpointing
"""
PEERS = ("distft", "DeepSpeed", "accelerate", "fitcheck-llm")


def run(folder: Path, only: str) -> dict[str, Any]:
    command = os.environ.get("FITCHECK") or shutil.which("fitcheck")
    if command is None:
        print("fitcheck-llm is not installed: its column is empty\n")
    else:
        print("fitcheck-llm takes what prepare_model_for_kbit_training turns into float32, which distft does not do\n")
    rows: list[dict[str, Any]] = []
    print(f"{'GiB':70}{'simulated':>10}" + "".join(f"{peer:>20}" for peer in PEERS))
    for row in parse(ROWS):
        if only not in row.text:
            continue
        recipe = recipe_of(folder, row)
        model = read_model_shape(recipe)
        simulated = simulate(recipe, row.setting).peak
        found = {
            "distft": Estimator(recipe, model).memory(row.setting).peak,
            "DeepSpeed": deepspeed(row, model),
            "accelerate": accelerate(model),
            "fitcheck-llm": fitcheck(command, folder, row) if command else None,
        }
        print(
            f"{row.text:70}{simulated / 2**30:10.2f}" + "".join(_cell(found[p], simulated) for p in PEERS), flush=True
        )
        rows.append({"row": row.text, "simulated": simulated, **found})
    means = {}
    for peer in PEERS:
        errors = [abs(100 * (row[peer] / row["simulated"] - 1)) for row in rows if row[peer] is not None]
        if errors:
            means[peer] = {"rows": len(errors), "mean_percent": sum(errors) / len(errors), "worst_percent": max(errors)}
            print(f"{peer:14}{len(errors):4} rows, mean {means[peer]['mean_percent']:6.1f}%, worst {max(errors):6.1f}%")
    return {"means": means, "table": rows}


def _cell(value: int | None, simulated: int) -> str:
    if value is None:
        return f"{'-':>20}"
    return f"{value / 2**30:10.2f}{100 * (value / simulated - 1):+9.1f}%"


def deepspeed(row: Row, model: ModelShape) -> int | None:
    """ZeRO's model states; it does not know activations, and assumes that all parameters are trained."""
    ranks = row.setting.world_size
    if row.setting.strategy == "zero2":
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as two

        return two(model.parameters, num_gpus_per_node=ranks, cpu_offload=False)[1]
    if row.setting.strategy == "zero3":
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as three

        largest = max(tensor.size for tensor in model.tensors)
        return three(model.parameters, largest, ranks, cpu_offload=False, cpu_offload_params=False)[1]
    return None


def accelerate(model: ModelShape) -> int:
    """`accelerate estimate-memory`, "Training using Adam" in 16 bit: four times the model, whatever the batch."""
    from accelerate.commands.estimate import estimate_training_usage

    return max(estimate_training_usage(4 * model.parameters, "bfloat16").values())


def fitcheck(command: str, folder: Path, row: Row) -> int | None:
    """Everything but its `overhead`; one GPU only. It takes a hub id, so the config lies in a separate hub cache."""
    if row.setting.strategy != "ddp":
        return None
    cache = folder / "hub"
    home = cache / f"models--x--{row.model}"
    (home / "snapshots" / "0").mkdir(parents=True, exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text("0")
    (home / "snapshots" / "0" / "config.json").write_text(json.dumps(CONFIGS[row.model]))
    quantization = row.recipe["model"]["quantization"] or "none"
    options = ["--precision", row.recipe["training"]["mixed_precision"], "--quant", quantization]
    options += ["--double-quant"] if quantization == "nf4" else []
    options += ["--lora-r", str(row.recipe["lora"]["r"]), "--lora-targets", "full"] if row.recipe["lora"] else []
    options += [] if row.recipe["lora"] else ["--no-lora"]
    options += ["--batch-size", str(row.setting.micro_batch_size)]
    options += ["--seq-len", str(row.recipe["data"]["max_length"]), "--vram-mib", "81920", "--json"]
    options += ["--grad-checkpoint"] if row.setting.gradient_checkpointing else []
    options += [] if row.setting.attn_implementation == "eager" else ["--flash-attn"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([command, f"x/{row.model}", *options], env=environment, capture_output=True, text=True)
    if not done.stdout.startswith("{"):  # an unknown family
        return None
    memory = json.loads(done.stdout)["memory_mib"]
    return int(2**20 * (memory["total"] - memory["overhead"]))
