"""Training speed of `distft launch` beside a bare trl.SFTTrainer script and a hand-written loop.

    python benchmarks/train_overhead.py [--rounds 3] [--steps 40] [--json]

The same model, LoRA, rows, batch, optimizer and threads; one process each, interleaved. Tokens per second are counted
after the first quarter of the steps; start-up is the time from the start of the process to the end of its first step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tiny import write_tiny

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {"distft launch": [], "trl.SFTTrainer": [], "hand-written loop": []}
    threads = str(len(os.sched_getaffinity(0)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment["DISTFT_CACHE"] = str(folder / "cache")
        recipe = write_tiny(folder, max_steps=options.steps)
        bare = [sys.executable, str(HERE / "bare_scripts.py"), str(folder), str(options.steps)]
        launch = [sys.executable, "-m", "distft", "launch", str(recipe), "--gpus-per-node", "1", "--json"]
        commands = {"distft launch": launch, "trl.SFTTrainer": [*bare, "sft"], "hand-written loop": [*bare, "loop"]}
        for round_number in range(options.rounds + 1):
            for name, command in commands.items():
                began = time.time()
                done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=environment)
                if name == "distft launch":
                    metrics = Path(json.loads(done.stdout)["run_dir"]) / "metrics.jsonl"
                    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
                    steps = [(line["time"], line["tokens"]) for line in lines]
                else:
                    steps = json.loads(done.stdout.splitlines()[-1])
                if round_number:  # the first round fills caches
                    (first, tokens), (last, all_tokens) = steps[options.steps // 4], steps[-1]
                    results[name].append(((all_tokens - tokens) / (last - first), steps[0][0] - began))
    speed = {name: statistics.median(rate for rate, _ in values) for name, values in results.items()}
    start = {name: statistics.median(seconds for _, seconds in values) for name, values in results.items()}
    if options.json:
        print(json.dumps({"threads": int(threads), "tokens_per_second": speed, "startup_seconds": start}))
        return
    for name in results:
        ratio = speed[name] / speed["trl.SFTTrainer"]
        figures = f"{speed[name]:9,.0f} tokens/s, {ratio:.2f} x SFTTrainer, first step after {start[name]:.1f} s"
        print(f"{name:<20}{figures}")


if __name__ == "__main__":
    main()
