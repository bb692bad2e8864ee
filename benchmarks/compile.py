"""Steps with and without training.compile, on this machine: GPUs where there are some, else CPU ranks.

    python benchmarks/compile.py [--steps 30] [--ranks 1]

The same small model, LoRA, rows and threads, in turns; tokens per second of the second half of the steps, and how long
the first step took, with kernels compiled anew and found in the cache. What it says about CPU ranks says nothing about
GPUs: there, benchmarks/gpu/check.py has the row `compiled`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tiny import write_tiny


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    speeds: dict[bool, list[float]] = {False: [], True: []}
    first_steps = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_tiny(folder, max_steps=options.steps)
        cache = {"DISTFT_CACHE": str(folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "kernels")}
        command = [
            sys.executable,
            "-m",
            "distft",
            "launch",
            str(recipe),
            "--gpus-per-node",
            str(options.ranks),
            "--json",
        ]
        for _ in range(options.rounds):
            for compiled in speeds:
                done = subprocess.run(
                    [
                        *command,
                        "--set",
                        "parallelism.strategy=ddp",
                        "--set",
                        f"training.compile={str(compiled).lower()}",
                    ],
                    check=True,
                    capture_output=True,
                    text=True,
                    cwd=folder,
                    env={**os.environ, "HF_HUB_OFFLINE": "1", **cache},
                )
                run = Path(json.loads(done.stdout)["run_dir"])
                lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                half, last = lines[len(lines) // 2], lines[-1]
                speeds[compiled].append((last["tokens"] - half["tokens"]) / (last["time"] - half["time"]))
                if compiled:
                    first_steps.append(json.loads((run / "status.json").read_text())["ran"]["first_step_seconds"])
    plain, compiled_speed = (statistics.median(speeds[which]) for which in (False, True))
    print(f"not compiled {plain:8,.0f} tokens/s")
    print(f"compiled     {compiled_speed:8,.0f} tokens/s   {compiled_speed / plain:.2f} x")
    print("first step   " + ", then ".join(f"{seconds:.1f} s" for seconds in first_steps))


if __name__ == "__main__":
    main()
