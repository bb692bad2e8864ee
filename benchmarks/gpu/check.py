"""Training steps of a Llama-3-8B-shaped model on one GPU, as distft wraps it: tokens/s, MFU, memory, losses, as JSON.

    python benchmarks/gpu/check.py

Needs one CUDA GPU, the `train` extra and under 8 minutes; no download: the weights are random and made on the GPU.
Rows: LoRA and QLoRA, with and without gradient checkpointing, for each available attention implementation, then with
liger-kernel. Every row trains on one repeated batch, so a falling loss shows that it learns. At the end, FSDP with and
without CPU offload has to give the same losses.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).resolve().parent.parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "flash-attn", "liger-kernel")
ANCHOR = {
    "source": "NeMo Automodel, Llama3-8B LoRA bf16, sequence 4096, micro-batch 2, 1 GPU",
    "gpu": "H100",
    "tokens_per_second": 12_473,
}
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
OFFLOAD_SECONDS = 30  # of the budget, kept for the offload check
OFFLOAD_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Size:
    """A model's shape and the steps to run on it."""

    model: dict[str, Any]
    sequence: int
    warmup_steps: int
    micro_batch: int = 2
    timed_steps: int = 10


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
FULL = Size(LLAMA_3_8B, sequence=4096, warmup_steps=3)
TINY = Size(SMALL_MODEL, sequence=32, warmup_steps=1)


@dataclass(frozen=True)
class Row:
    """What is measured in one row."""

    method: str  # lora, qlora, full
    gradient_checkpointing: bool
    attention: str  # sdpa, flash_attention_2
    liger: bool = False


def main() -> int:
    """Run the rows; the JSON is rewritten after each one."""
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "check.py: there is no CUDA GPU here (--device cpu --tiny runs every part on a toy model)", file=sys.stderr
        )
        return 2
    started = time.perf_counter()
    device = torch.device(options.device)
    size = TINY if options.tiny else FULL
    result = describe(device, size)
    name = re.sub(r"\W+", "-", result["gpu"]["name"] or "none").lower()
    out = options.out or RESULTS / f"gpu-{name}-{result['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)

    def save(**fields: Any) -> None:
        result.update(fields, seconds=time.perf_counter() - started)
        out.write_text(json.dumps(result, indent=1) + "\n")

    print(f"{result['gpu']['name'] or 'CPU'}, {result['versions']}")
    print(f"{'row':44} {'tokens/s':>10} {'MFU':>6} {'GiB':>7} {'loss':>16} {'seconds':>8}")
    longest = 0.0
    for row in wanted_rows(device):
        before = time.perf_counter()
        if before - started + longest > options.budget_seconds - OFFLOAD_SECONDS:
            measured: dict[str, Any] = {"status": "skipped", "reason": "would not fit the time budget"}
        else:
            measured = attempt(row, size, device)
            longest = max(longest, time.perf_counter() - before)
        result["rows"].append(asdict(row) | measured | {"seconds": time.perf_counter() - before})
        print_row(result["rows"][-1])
        save()
    first = result["rows"][0]
    if not options.tiny and first["status"] == "ok":
        result["above_anchor"] = first["tokens_per_second"] > ANCHOR["tokens_per_second"]
    save(fsdp_offload=check_offload(device))
    print(f"above the anchor ({ANCHOR['tokens_per_second']} tokens/s on one H100): {result['above_anchor']}")
    print(f"FSDP offload: {result['fsdp_offload']}\n{out}")
    failed = any(row["status"] == "failed" for row in result["rows"])
    return int(failed or result["fsdp_offload"]["status"] == "failed")


def parse_arguments() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/gpu-NAME-DATE.json)")
    parser.add_argument("--budget-seconds", type=float, default=450, help="rows that would take longer are skipped")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy model: every part in seconds")
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny")
    return options


def describe(device: torch.device, size: Size) -> dict[str, Any]:
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
        "size": asdict(size),
        "rows": [],
        "anchor": ANCHOR,
        "above_anchor": None,
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


def importable(module: str) -> bool:
    """Whether a compiled package works: one built for another torch or CUDA is installed but does not."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError):
        return False
    return True


def wanted_rows(device: torch.device) -> Iterator[Row]:
    """The rows, the most important ones first.

    liger-kernel's come last: its patches stay in the process.
    """
    flash = device.type == "cuda" and importable("flash_attn")
    liger = device.type == "cuda" and importable("liger_kernel.transformers")
    kinds = [("sdpa", False)] + [("flash_attention_2", False)] * flash + [("sdpa", True)] * liger
    for attention, with_liger in kinds:
        for method in ("lora", "qlora"):
            for checkpointing in (False, True):
                yield Row(method, checkpointing, attention, with_liger)


def attempt(row: Row, size: Size, device: torch.device) -> dict[str, Any]:
    """Measure a row. An error in it is recorded, and the other rows still run."""
    try:
        return measure(row, size, device)
    except torch.OutOfMemoryError:
        return {"status": "out_of_memory"}
    except Exception as error:  # any library may fail on a GPU that it was never tested on
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(row: Row, size: Size, device: torch.device) -> dict[str, Any]:
    """Train for a few steps and time the last ones."""
    torch.manual_seed(0)  # the same weights and tokens in all rows
    model, parameters = build(row, size, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
    tokens = torch.randint(size.model["vocab_size"], (size.micro_batch, size.sequence), device=device)
    losses = []

    def step() -> None:
        losses.append(train_step(model, tokens, optimizer, trained))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with flash_only(row, device):
        for _ in range(size.warmup_steps):
            step()
        synchronize(device)
        before = time.perf_counter()
        for _ in range(size.timed_steps):
            step()
        synchronize(device)
        seconds = (time.perf_counter() - before) / size.timed_steps

    first, last = losses[0].item(), losses[-1].item()
    tokens_per_second = tokens.numel() / seconds
    return {
        "status": "ok" if math.isfinite(first) and math.isfinite(last) else "failed",
        "tokens_per_second": tokens_per_second,
        "seconds_per_step": seconds,
        **utilization(row, size, device, parameters, tokens_per_second),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "loss_first": first,
        "loss_last": last,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
    }


def train_step(model: Any, tokens: torch.Tensor, optimizer: Any, trained: list) -> torch.Tensor:
    """One step as distft's Trainer takes it; returns the loss."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def build(row: Row, size: Size, device: torch.device) -> tuple[Any, int]:
    """The wrapped model, as distft.train.model.build_model makes it, and its base parameters without the embedding.

    The weights are made on the device, and quantized there.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    from distft.config.recipe import Recipe
    from distft.train.model import add_adapters, compute_dtype, quantization_config

    base = {"name_or_path": "random", "quantization": "nf4" if row.method == "qlora" else None}
    full = row.method == "full"
    lora = {"lora": None} if full else {}
    recipe = Recipe.model_validate({"name": "gpu-check", "model": base, "data": {"train": "random"}, **lora})
    if row.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = LlamaConfig(**size.model, tie_word_embeddings=False, use_cache=False)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if full else compute_dtype(recipe), attn_implementation=row.attention
        )
    parameters = sum(parameter.numel() for parameter in model.parameters()) - model.model.embed_tokens.weight.numel()
    settings = quantization_config(recipe, "ddp") if recipe.model.quantization else None
    if settings is not None:
        quantize(model, settings, device)
    if not full:
        model = add_adapters(model, recipe)
    if row.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(), parameters


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


def flash_only(row: Row, device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU, SDPA may use only its flash kernel: a fallback is an error, not a slow row."""
    if device.type == "cpu" or row.attention != "sdpa":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def utilization(
    row: Row, size: Size, device: torch.device, parameters: int, tokens_per_second: float
) -> dict[str, Any]:
    """FLOPs per token, and the share of the GPU's peak that they reach.

    Weights: 2N forward and 2N backward to the activations (frozen weights have no gradients), and 2N for recomputing.
    Attention, apart: two causal products forward, four backward, and two for recomputing.
    """
    shape = size.model
    forwards = 2 if row.gradient_checkpointing else 1
    weights = 2 * parameters * (forwards + 1)
    attention = 2 * size.sequence * shape["hidden_size"] * shape["num_hidden_layers"] * (forwards + 2)
    achieved = weights * tokens_per_second / 1e12
    achieved_attention = attention * tokens_per_second / 1e12
    peak = peak_tflops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return {
        "flops_per_token": weights,
        "attention_flops_per_token": attention,
        "tflops": achieved,
        "attention_tflops": achieved_attention,
        "mfu": achieved / peak if peak else None,
        "mfu_with_attention": (achieved + achieved_attention) / peak if peak else None,
    }


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    checkpointing = "checkpointing" if row["gradient_checkpointing"] else "no checkpointing"
    name = f"{row['method']}, {checkpointing}, {row['attention']}{', liger' if row['liger'] else ''}"
    if "tokens_per_second" not in row:
        print(f"{name:44} {row['status']}: {row.get('reason') or row.get('error') or ''}", flush=True)
        return
    mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
    memory = f"{row['peak_memory_bytes'] / 2**30:.1f}" if row["peak_memory_bytes"] else "-"
    loss = f"{row['loss_first']:.3f} > {row['loss_last']:.3f}"
    print(
        f"{name:44} {row['tokens_per_second']:10.0f} {mfu:>6} {memory:>7} {loss:>16} {row['seconds']:8.1f}", flush=True
    )


def check_offload(device: torch.device) -> dict[str, Any]:
    """Three float32 steps under FSDP2 with its states in host memory, and the same steps without offload."""
    import torch.distributed as dist

    if device.type != "cuda":
        return {"status": "skipped", "reason": "CPU offload needs a GPU to offload from"}
    try:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        losses, _ = fsdp_losses(device, offload=False)
        offloaded_losses, places = fsdp_losses(device, offload=True)
    except Exception as error:  # recorded, as for a row
        return {"status": "failed", "error": f"{type(error).__name__}: {error}", "losses_equal": False}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    difference = max(abs(one - other) for one, other in zip(losses, offloaded_losses, strict=True))
    equal = difference <= OFFLOAD_TOLERANCE
    return {
        "status": "ok" if equal and places == ["cpu"] else "failed",
        "losses_equal": equal,
        "largest_difference": difference,
        "tolerance": OFFLOAD_TOLERANCE,
        "losses": losses,
        "losses_offloaded": offloaded_losses,
        "parameters_offloaded_to": places,
    }


def fsdp_losses(device: torch.device, offload: bool) -> tuple[list[float], list[str]]:
    """The losses of three steps of a small model, and where its parameters are afterwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL_MODEL, use_cache=False), dtype=torch.float32)
        tokens = torch.randint(SMALL_MODEL["vocab_size"], (2, 64))
    mesh = init_device_mesh(device.type, (1,))
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, offload_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, sorted({parameter.device.type for parameter in model.parameters()})


if __name__ == "__main__":
    sys.exit(main())
