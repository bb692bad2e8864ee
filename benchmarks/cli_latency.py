"""How long the command line takes to start, beside torchrun and accelerate, interleaved in one run.

    python benchmarks/cli_latency.py [--rounds 10] [--json]

Each figure is the median wall time of the whole process.
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

BIN = Path(sys.executable).parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # pip compiled the others; the first round compiles distft
    with tempfile.TemporaryDirectory() as folder:
        recipe = str(write_tiny(Path(folder)))
        commands = {
            "distft --help": [str(BIN / "distft"), "--help"],
            "distft validate --sample 0": [str(BIN / "distft"), "validate", "--sample", "0", recipe],
            "distft launch --dry-run": [str(BIN / "distft"), "launch", recipe, "--dry-run"],
            "torchrun --help": [str(BIN / "torchrun"), "--help"],
            "accelerate launch --help": [str(BIN / "accelerate"), "launch", "--help"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for round_number in range(options.rounds + 1):
            for name, command in commands.items():
                began = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, cwd=folder)
                if round_number:  # the first round fills the disk cache
                    seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    peer = medians["accelerate launch --help"]
    if options.json:
        print(json.dumps({"rounds": options.rounds, "median_seconds": medians}))
        return
    for name, median in medians.items():
        print(f"{name:<28}{median:7.3f} s   accelerate takes {peer / median:5.1f} x as long")


if __name__ == "__main__":
    main()
