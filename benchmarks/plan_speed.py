"""How long a plan takes beside accelerate's and fitcheck's estimates, and whether it depends on the number of nodes.

    python benchmarks/plan_speed.py [--rounds 5] [--fitcheck COMMAND]

Whole processes, interleaved; medians of wall time, and the largest memory of a process. The plan is that of Llama-3-70B
(only its config.json) with all candidates. `--fitcheck` is the command of fitcheck-llm, if it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
RECIPE = {
    "name": "70b",
    "model": {"name_or_path": "model"},
    "lora": {"r": 16},
    "data": {"train": "data.jsonl", "max_length": 4096},
    "training": {"global_batch_size": 2048},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fitcheck", default=shutil.which("fitcheck"), help="fitcheck-llm's command")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # pip compiled the others; the first round compiles distft
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model").mkdir()
        (Path(folder) / "model" / "config.json").write_text(json.dumps(LLAMA_70B))
        (Path(folder) / "data.jsonl").write_text('{"text": "a"}\n')
        (Path(folder) / "recipe.yaml").write_text(json.dumps(RECIPE))  # YAML too
        plan = [str(BIN / "distft"), "plan", "recipe.yaml", "--gpu", "h100-80gb", "--gpus-per-node", "8", "--nodes"]
        commands = {
            "distft plan, 128 x 8": [*plan, "128"],
            "distft plan, 1 x 8": [*plan, "1"],
            "accelerate estimate-memory": [str(BIN / "accelerate"), "estimate-memory", "x/llama-70b"],
        }
        if options.fitcheck:
            commands["fitcheck"] = [options.fitcheck, "x/llama-70b", "--gpu", "H100"]
        # Both take hub ids, so the config is put into a separate hub cache.
        home = Path(folder) / "hub" / "models--x--llama-70b"
        (home / "snapshots" / "0").mkdir(parents=True)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("0")
        (home / "snapshots" / "0" / "config.json").write_text(json.dumps(LLAMA_70B))
        environment = os.environ | {"HF_HUB_CACHE": str(home.parent), "HF_HUB_OFFLINE": "1"}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        failed: dict[str, str] = {}
        memory: dict[str, float] = {}
        for round_number in range(options.rounds + 1):
            for name, command in commands.items():
                began = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
                if round_number:  # the first round fills the disk cache
                    seconds[name].append(time.perf_counter() - began)
                if done.returncode > 1 or not done.stdout.strip():  # 1: it does not fit
                    failed[name] = (done.stderr.strip().splitlines() or ["no words"])[-1][:70]
                if "distft" in name and not memory:
                    memory["distft"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    own = statistics.median(seconds["distft plan, 128 x 8"])
    for name, times in seconds.items():
        median = statistics.median(times)
        note = f"  (no answer: {failed[name]})" if name in failed else ""
        print(f"{name:<28}{median:7.3f} s   {median / own:5.1f} x distft{note}")
    print(f"{'memory of distft plan':<28}{memory['distft']:7.1f} MiB")


if __name__ == "__main__":
    main()
