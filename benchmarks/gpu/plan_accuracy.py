"""The plan's memory beside a GPU's: predicted and measured peaks of 28 configurations, as JSON.

    python benchmarks/gpu/plan_accuracy.py

Needs one CUDA GPU, the `train` extra and under 9 minutes; no download: weights are random and made on the GPU. Each
configuration takes three steps as distft wraps the model (wrapped.py), in this process; its peak is
torch.cuda.max_memory_allocated(), and the process is what nvidia-smi reports. Bounds: 5% in the mean, 10% at worst, and
nothing that ran out of memory was predicted to fit.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from wrapped import LLAMA_3_8B, RESULTS, SMALL_MODEL, Row, build, describe, train_step

from distft.config.recipe import Recipe
from distft.hardware.devices import Device
from distft.models.shapes import read_model_shape
from distft.planner.memory import Estimator
from distft.planner.setting import Setting

LLAMA_1B = {**LLAMA_3_8B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
LLAMA_3B = {**LLAMA_3_8B, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
LLAMA_3B |= {"num_attention_heads": 24}
MODELS = {"1B": LLAMA_1B, "3B": LLAMA_3B, "8B": LLAMA_3_8B, "tiny": SMALL_MODEL}
MEAN, WORST = 0.05, 0.10


@dataclass(frozen=True)
class Configuration:
    """What is measured; rows of `sequence` tokens, unpacked, SDPA."""

    model: str
    method: str  # full, lora, qlora
    gradient_checkpointing: bool
    micro_batch: int
    sequence: int


def configurations(tiny: bool) -> list[Configuration]:
    """28 configurations, small ones first; the last ones should run out of memory on most GPUs."""
    if tiny:
        return [
            Configuration("tiny", method, checkpointing, 2, 32)
            for method in ("full", "lora")
            for checkpointing in (False, True)
        ]
    found = [
        Configuration(model, method, checkpointing, 1, sequence)
        for model, method in (
            ("1B", "full"),
            ("1B", "lora"),
            ("3B", "lora"),
            ("3B", "qlora"),
            ("8B", "lora"),
            ("8B", "qlora"),
        )
        for checkpointing in (True, False)
        for sequence in (2048, 4096)
    ]
    return [
        *found,
        Configuration("3B", "full", True, 1, 2048),
        Configuration("8B", "lora", True, 8, 4096),
        Configuration("8B", "qlora", True, 16, 4096),
        Configuration("8B", "lora", False, 8, 8192),
    ]


def predict(configuration: Configuration, device: Device) -> dict[str, Any]:
    """The formula, from config.json alone."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_type": "llama", "tie_word_embeddings": False, **MODELS[configuration.model]}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        recipe = Recipe.model_validate(
            {
                "name": "gpu",
                "model": {"name_or_path": folder, "quantization": "nf4" if configuration.method == "qlora" else None},
                "lora": None if configuration.method == "full" else {},
                "data": {"train": "random", "max_length": configuration.sequence, "packing": False},
                "training": {"global_batch_size": configuration.micro_batch},
            }
        )
        found = Estimator(recipe, read_model_shape(recipe)).memory(
            Setting(
                "ddp",
                micro_batch_size=configuration.micro_batch,
                gradient_checkpointing=configuration.gradient_checkpointing,
                attn_implementation="flash_attention_2",  # unpadded rows need no mask: SDPA takes its flash kernel
            )
        )
    return {"peak": found.peak, "process": found.process, "fits": found.process <= device.memory}


def measure(configuration: Configuration, device: torch.device) -> dict[str, Any]:
    """Three steps; bytes."""
    shape, batch = MODELS[configuration.model], (configuration.micro_batch, configuration.sequence)
    row = Row(configuration.method, configuration.gradient_checkpointing, "sdpa")
    cuda = device.type == "cuda"
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        model = build(row, shape, device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        tokens = torch.randint(shape["vocab_size"], batch, device=device)
        if cuda:  # creating and quantizing weights takes more memory than training
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            train_step(model, tokens, optimizer, trained)
        if not cuda:
            return {"status": "ok", "peak": None, "process": None}
        torch.cuda.synchronize()
        return {"status": "ok", "peak": torch.cuda.max_memory_allocated(), "process": process_memory()}
    except torch.OutOfMemoryError:
        return {"status": "out_of_memory", "peak": None, "process": None}


def process_memory() -> int | None:
    """The memory in use on the GPU, from nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/plan-NAME-DATE.json)")
    parser.add_argument("--budget-seconds", type=float, default=500)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy model: every part in seconds")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("plan_accuracy.py: there is no CUDA GPU here (--device cpu --tiny runs a toy model)", file=sys.stderr)
        return 2
    device, began, rows = torch.device(options.device), time.perf_counter(), []
    result = describe(device)
    here = Device(options.device, result["gpu"]["name"] or "cpu", result["gpu"]["memory_bytes"] or 2**34)
    name = "".join(c if c.isalnum() else "-" for c in here.name.lower())
    out = options.out or RESULTS / f"plan-{name}-{result['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'configuration':44} {'predicted':>9} {'measured':>9} {'error':>7} {'process':>9} {'nvidia-smi':>10}   GiB")
    for configuration in configurations(options.tiny):
        if time.perf_counter() - began > options.budget_seconds:
            break
        row = asdict(configuration) | {
            "predicted": predict(configuration, here),
            "measured": measure(configuration, device),
        }
        rows.append(row)
        show(row)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        errors = [r["predicted"]["peak"] / r["measured"]["peak"] - 1 for r in rows if r["measured"]["peak"]]
        wrong = [r for r in rows if r["measured"]["status"] == "out_of_memory" and r["predicted"]["fits"]]
        result |= {"rows": rows, "seconds": time.perf_counter() - began, "predicted_to_fit_but_did_not": len(wrong)}
        if errors:
            result |= {
                "mean_absolute_error": statistics.mean(map(abs, errors)),
                "worst_error": max(errors, key=abs),
                "largest_under_prediction": min(0.0, *errors),
            }
        out.write_text(json.dumps(result, indent=1) + "\n")
    if errors:
        print(f"mean absolute error {result['mean_absolute_error']:.1%}, worst {result['worst_error']:+.1%}")
    print(f"predicted to fit, but out of memory: {len(wrong)}\n{out}")
    missed = errors and (result["mean_absolute_error"] > MEAN or abs(result["worst_error"]) > WORST)
    return int(bool(missed or wrong))


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    name = f"{row['model']} {row['method']}, {'checkpointing' if row['gradient_checkpointing'] else 'no checkpointing'}"
    name += f", {row['micro_batch']} x {row['sequence']}"
    predicted, measured = row["predicted"], row["measured"]
    if not measured["peak"]:
        print(f"{name:44} {_gib(predicted['peak'])} {measured['status']}, fits: {predicted['fits']}", flush=True)
        return
    error = predicted["peak"] / measured["peak"] - 1
    process = f"{_gib(predicted['process'])} {_gib(measured['process'], 10)}"
    print(f"{name:44} {_gib(predicted['peak'])} {_gib(measured['peak'])} {error:+7.1%} {process}", flush=True)


def _gib(size: int | None, width: int = 9) -> str:
    return f"{size / 2**30:{width}.2f}" if size else f"{'-':>{width}}"


if __name__ == "__main__":
    sys.exit(main())
