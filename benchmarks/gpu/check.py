"""`distft launch` on one GPU: the default path beside each of its switches turned off, and compiled, as JSON.

    python benchmarks/gpu/check.py

Needs one CUDA GPU, the `train` extra, 20 GB of disk (--folder) and under 10 minutes; no download: the model has the
shape of Llama-3-8B and random weights. First losses of a small model are compared, with the CPU's and with each other.
Then each row is a run: what it ran with, tokens/s, the peak beside the plan's, and what nvidia-smi saw while it loaded,
trained and saved.
benchmarks/gpu/README.md says what is printed, and what would be a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from wrapped import LLAMA_3_8B, RESULTS, SMALL_MODEL, describe

ANCHOR = 12_473  # tokens/s: NeMo Automodel, Llama3-8B with LoRA, rows of 4,096, micro-batch 2, one H100
STEPS, WARM_UP = 14, 4  # of a row; the first ones are not timed
LOSS_STEPS = 8
Part = tuple[str, str, Callable[[], dict[str, Any]]]  # key in the result, name, what measures it
OFFLOADED = ("training.gradient_checkpointing=true", "training.activation_offloading=true")
SWITCHES: dict[str, tuple[str, ...]] = {
    "default": (),  # packed rows, the attention that `auto` takes, the loss in chunks
    "attention: sdpa": ("model.attn_implementation=sdpa",),
    "loss: full": ("training.loss=full",),
    "not packed": ("data.packing=false",),
    "checkpointing": ("training.gradient_checkpointing=true",),
    "nf4": ("model.quantization=nf4",),
    # Those that are turned on.
    "compiled": ("training.compile=true",),
    "inputs offloaded": OFFLOADED,
}
# Losses that have to be equal: name, overrides of either side, whether the first is on the CPU, tolerance. In float32
# SDPA's kernels differ in the order of their sums alone; bf16 has 8 bits.
FLOAT32 = ("training.mixed_precision=no", "data.packing=false")
BF16 = ("training.mixed_precision=bf16",)
NO_MASTERS = (*BF16, "lora=null", "training.master_weights=none")
EQUAL: tuple[tuple[str, tuple[str, ...], tuple[str, ...], bool, float], ...] = (
    ("GPU and CPU, float32", FLOAT32, FLOAT32, True, 1e-3),
    ("GPU and CPU, float32, full", (*FLOAT32, "lora=null"), (*FLOAT32, "lora=null"), True, 1e-3),
    ("GPU and CPU, no masters", NO_MASTERS, NO_MASTERS, True, 2e-2),
    ("auto and sdpa, bf16", (*BF16, "model.attn_implementation=sdpa"), BF16, False, 2e-2),
    ("chunked and full loss, bf16", (*BF16, "training.loss=full"), BF16, False, 2e-2),
    ("inputs offloaded or not", BF16, (*BF16, *OFFLOADED), False, 2e-2),
    ("compiled and not, bf16", BF16, (*BF16, "training.compile=true"), False, 2e-2),
    ("zero3 with offload and ddp", FLOAT32, (*FLOAT32, "parallelism={strategy: zero3, offload: all}"), False, 1e-3),
)


def main() -> int:
    """Run the rows; the JSON is rewritten after each one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/gpu-NAME-DATE.json)")
    parser.add_argument("--folder", type=Path, help="where model and runs are written (default: a temporary folder)")
    parser.add_argument("--budget-seconds", type=float, default=590, help="what would begin later is skipped")
    parser.add_argument("--tiny", action="store_true", help="a toy model, on the CPU where there is no GPU")
    parser.add_argument("--only", default="", help="rows and comparisons with this word in their name")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or options.tiny):
        print("check.py: there is no CUDA GPU here (--tiny runs a toy model)", file=sys.stderr)
        return 2
    began = time.perf_counter()
    result = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    result |= {"model": SMALL_MODEL if options.tiny else LLAMA_3_8B, "losses": [], "anchor": ANCHOR}
    name = re.sub(r"\W+", "-", result["gpu"]["name"] or "none").lower()
    out = options.out or RESULTS / f"gpu-{name}-{result['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{result['gpu']['name'] or 'CPU'}, {result['versions']}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for key, name, measure in _parts(Path(folder), result["model"], options):
            late = time.perf_counter() - began > options.budget_seconds
            found = {"name": name} | ({"status": "skipped"} if late else measure())
            result[key].append(found)
            result["seconds"] = time.perf_counter() - began
            print(_line(key, found), flush=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
    first = next((row for row in result["rows"] if row["name"] == "default" and row["status"] == "ok"), None)
    if first and not options.tiny:
        print(f"{first['tokens_per_second'] / ANCHOR:.0%} of NeMo Automodel's {ANCHOR:,} tokens/s on one H100")
    print(out)
    return int(any(found["status"] == "failed" for found in (*result["rows"], *result["losses"])))


def _parts(folder: Path, shape: dict[str, Any], options: argparse.Namespace) -> Iterator[Part]:
    """Comparisons first, which are short."""
    write(folder / "small", SMALL_MODEL, length=128)
    for name, *how in EQUAL:
        if options.only in name:
            yield "losses", name, partial(_equal, folder / "small", *how)
    print(f"{'row':18}{'tokens/s':>10}{'planned':>9}  GiB {'peak':>6}{'planned':>8}   by nvidia-smi")
    write(folder / "model", shape, length=128 if options.tiny else 4096)
    for name, sets in SWITCHES.items():
        if options.only in name:
            yield "rows", name, partial(_measure, folder / "model", sets)


def write(folder: Path, shape: dict[str, Any], length: int) -> None:
    """Model, tokenizer, data and recipe. The weights of a large model are made on the GPU, in bf16."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder.mkdir()
    words = [f"w{number}" for number in range(200)]
    vocabulary = {word: number for number, word in enumerate(("<pad>", "<eos>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder / "model")
    large = shape["hidden_size"] > 1000
    torch.manual_seed(0)
    with torch.device("cuda" if large else "cpu"):
        config = LlamaConfig(**shape, tie_word_embeddings=False, pad_token_id=0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if large else torch.float32)
    model.save_pretrained(folder / "model")
    del model
    torch.cuda.empty_cache()
    source = random.Random(0)
    with open(folder / "data.jsonl", "w") as file:
        for _ in range(600):
            text = " ".join(source.choices(words, k=source.randint(length // 16, length - 1)))
            file.write(json.dumps({"text": text}) + "\n")
    recipe = {
        "name": "check",
        "model": {"name_or_path": "model"},
        "data": {"train": "data.jsonl", "max_length": length},
        "training": {"global_batch_size": 2, "micro_batch_size": 2, "gradient_checkpointing": False},
        "output_dir": "runs",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))


def launch(folder: Path, sets: tuple[str, ...], steps: int, on_cpu: bool = False) -> tuple[Path, float]:
    """A run directory, and the seconds that its run took.

    Raises:
        RuntimeError: it failed, or ran where it should not.
    """
    command = [sys.executable, "-m", "distft", "launch", "recipe.yaml", "--gpus-per-node", "1", "--force"]
    for one in (f"training.max_steps={steps}", "parallelism.strategy=ddp", *sets):
        command += ["--set", one]
    shutil.rmtree(folder / "runs", ignore_errors=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-3000:])
    run = next((folder / "runs").iterdir())
    on_gpu = _json(run / "plan.json")["topology"]["gpu"] is not None
    if on_gpu != (torch.cuda.is_available() and not on_cpu):
        raise RuntimeError(f"it ran on the {'GPU' if on_gpu else 'CPU'}")
    return run, time.perf_counter() - began


def _measure(folder: Path, sets: tuple[str, ...]) -> dict[str, Any]:
    try:
        with watched(folder / "runs") as seen:
            run, seconds = launch(folder, sets, STEPS)
    except RuntimeError as error:
        return {"status": "failed", "error": str(error)}
    metrics, plan, status = _metrics(run), _json(run / "plan.json"), _json(run / "status.json")
    first, last = metrics[WARM_UP - 1], metrics[-1]
    return {
        "status": "ok",
        "tokens_per_second": (last["tokens"] - first["tokens"]) / (last["time"] - first["time"]),
        "planned_tokens_per_second": plan["time"]["tokens_per_second_per_gpu"],
        "peak": max(row["peak_memory_bytes"] for row in metrics),
        "planned_peak": plan["memory"]["peak"],
        "planned_process": plan["memory"]["process"],
        "nvidia_smi": seen,
        "ran": status["ran"],
        "loss_first": metrics[0]["loss"],
        "loss_last": last["loss"],
        "seconds": seconds,
    }


@contextmanager
def watched(runs: Path) -> Iterator[dict[str, int]]:
    """The most memory that nvidia-smi shows in use, in bytes, while a run loads, trains and saves."""
    seen: dict[str, int] = {}
    ended = threading.Event()

    def phase() -> str:
        lines = sum(len(file.read_bytes().splitlines()) for file in runs.glob("*/metrics.jsonl"))
        return "saving" if lines >= STEPS else "steps" if lines else "loading"

    def watch() -> None:
        while not ended.wait(0.2):
            used = _used_memory()
            if used is not None:
                now = phase()
                seen[now] = max(seen.get(now, 0), used)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def _used_memory() -> int | None:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return int(done.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _equal(
    folder: Path, one: tuple[str, ...], other: tuple[str, ...], on_cpu: bool, tolerance: float
) -> dict[str, Any]:
    try:
        losses, ran = [], []
        for sets, here in ((one, on_cpu), (other, False)):
            run, _ = launch(folder, sets, LOSS_STEPS, here)
            losses.append([row["loss"] for row in _metrics(run)])
            ran.append(_json(run / "status.json")["ran"])
    except RuntimeError as error:
        return {"status": "failed", "error": str(error)}
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    status = "ok" if difference <= tolerance else "failed"
    return {"status": status, "difference": difference, "tolerance": tolerance, "losses": losses, "ran": ran}


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _line(key: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"{found['name']}: failed\n{found['error']}"
    if found["status"] == "skipped":
        return f"{found['name']}: skipped, no time left"
    if key == "losses":
        difference = f"losses differ by {found['difference']:.1e}, at most {found['tolerance']:g}"
        kernels = " and ".join(str(ran.get("attention")) for ran in found["ran"])
        return f"{found['name']}: {difference}: {found['status']} ({kernels})"
    planned, seen = found["planned_tokens_per_second"], found["nvidia_smi"]
    smi = ", ".join(f"{name} {seen[name] / 2**30:.1f}" for name in ("loading", "steps", "saving") if name in seen)
    rates = f"{found['tokens_per_second']:10,.0f}" + (f"{planned:9,.0f}" if planned else f"{'-':>9}")
    peaks = f"{found['peak'] / 2**30:6.2f}{found['planned_peak'] / 2**30:8.2f}"
    return f"{found['name']:18}{rates}      {peaks}   {smi or '-'} ({found['ran'].get('attention')})"


if __name__ == "__main__":
    sys.exit(main())
