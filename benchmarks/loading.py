"""Memory that a rank takes while a model is read and sharded with FSDP2: distft beside transformers and accelerate.

    python benchmarks/loading.py [--ranks 4] [--layers 16] [--json]

CPU ranks, where the memory of the GPU and of the host are one: the peak of a rank's anonymous memory (RssAnon of
/proc/PID/status, every 5 ms) from before the model is read until it is sharded, of the rank that takes most, as a part
of the whole model's bytes (float32; the frozen weights of an adapter in 16 bit; NF4 as it is stored). The pages of the
files are not in it: the ranks share them, and the system drops them when it must. The model (Llama, 1536 wide, 551
million parameters in 16 layers) is stored in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

CONFIG = {
    "vocab_size": 32_000,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "tie_word_embeddings": False,
}
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"lora": None},
    "lora": {"lora": {"r": 8}},
    "nf4": {"lora": {"r": 8}, "quantization": "nf4"},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        print(json.dumps(measure(*options.rank)), flush=True)
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, options.layers)
        for tuning in TUNINGS:
            results[tuning] = {}
            for way in ("distft", "accelerate"):
                results[tuning][way] = all_ranks(folder, tuning, way, options.ranks)
    if options.json:
        print(json.dumps(results))
        return
    print(f"{options.ranks} ranks    peak of a rank, GiB      of the model       seconds")
    print("           distft   accelerate   distft   accelerate   distft   accelerate")
    for tuning, ways in results.items():
        ours, theirs = ways["distft"], ways["accelerate"]
        print(
            f"{tuning:8} {ours['peak'] / 2**30:8.2f} {theirs['peak'] / 2**30:12.2f} {ours['part']:8.2f} "
            f"{theirs['part']:12.2f} {ours['seconds']:8.1f} {theirs['seconds']:12.1f}"
        )


def make_model(folder: Path, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**CONFIG, num_hidden_layers=layers)).to(torch.bfloat16).save_pretrained(folder)


def all_ranks(folder: Path, tuning: str, way: str, ranks: int) -> dict[str, float]:
    """Peak bytes, part of the model and seconds, of the rank with most."""
    recipe = {
        "name": "loading",
        "model": {"name_or_path": str(folder), "attn_implementation": "sdpa"},
        "data": {"train": "none.jsonl"},
        "training": {"mixed_precision": "bf16"},
    }
    changes = dict(TUNINGS[tuning])
    recipe["model"] |= {"quantization": changes.pop("quantization", None)}  # type: ignore[operator]
    file = folder / "recipe.json"
    file.write_text(json.dumps(recipe | changes))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # Freed memory goes back to the system at once, as a GPU's allocator has it at hand again.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [*command, __file__, "--rank", way, str(file)], capture_output=True, text=True, env=env, check=False
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(found) != ranks:
        raise SystemExit(done.stderr)
    return max(found, key=lambda rank: rank["peak"])


def measure(way: str, file: str) -> dict[str, float]:
    """One rank: the model read and sharded."""
    from distft.config.recipe import Recipe
    from distft.hardware.topology import Topology
    from distft.strategies.accelerate import accelerate_config, accelerate_environment
    from distft.train import cpu_ranks

    world = int(os.environ["WORLD_SIZE"])
    config = accelerate_config(
        strategy="fsdp",
        offload="none",
        topology=Topology(1, world),
        shard_size=world,
        mixed_precision="bf16",
        device_type="cpu",
    )
    os.environ |= accelerate_environment(config)
    cpu_ranks.apply()
    import bitsandbytes  # noqa: F401 - what is imported is not what is measured
    import peft  # noqa: F401
    import torch
    from accelerate import Accelerator

    from distft.train.model import build_model
    from distft.train.streaming import Stream

    recipe = Recipe.model_validate(json.loads(Path(file).read_text()))
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(way == "accelerate" and not recipe.model.quantization)
    accelerator = Accelerator()
    before, start = anonymous(), time.perf_counter()
    with Peak() as peak:
        stream = Stream(recipe) if way == "distft" else None
        model = build_model(recipe, "fsdp", stream=stream)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        prepare = stream.around(accelerator.prepare) if stream else accelerator.prepare
        model, optimizer = prepare(model, optimizer)
    seconds = time.perf_counter() - start
    whole = sum(p.numel() * p.element_size() for p in model.parameters())  # of the whole tensors, as DTensors tell it
    return {"peak": peak.bytes - before, "part": (peak.bytes - before) / whole, "seconds": seconds}


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """The most anonymous memory inside the context."""

    bytes = 0

    def __enter__(self) -> Peak:
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.bytes = max(self.bytes, anonymous())


if __name__ == "__main__":
    main()
