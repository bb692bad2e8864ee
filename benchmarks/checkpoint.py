"""Checkpoints of `distft launch` beside transformers.Trainer's, of the same model, adapters and strategy.

    python benchmarks/checkpoint.py [--ranks 2] [--json]

Measures the bytes of one checkpoint, the seconds for which a save holds up training (the median of a run), the seconds
until it is written, and the seconds that continuing takes (distft: restoring; Trainer: from train() to the first step,
minus the same without a checkpoint).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tiny import write_tiny

HERE = Path(__file__).parent
STEPS, SAVE_STEPS, LAST = 12, 4, 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DISTFT_CACHE"] = str(folder / "cache")
        write_tiny(folder, max_steps=STEPS, micro_batch_size="auto")
        for tuning in ("lora", "full"):
            for strategy in ("ddp", "zero3", "fsdp"):
                ours = of_distft(folder, tuning, strategy, options.ranks)
                theirs = of_trainer(folder, tuning, strategy, options.ranks)
                results[f"{tuning} {strategy}"] = {"distft": ours, "Trainer": theirs}
    if options.json:
        print(json.dumps(results))
        return
    print(f"{'':12} {'MB':>16} {'training held up, s':>22} {'written after, s':>18} {'continuing, s':>18}")
    print(f"{'':12} " + " ".join(f"{'distft':>{w}} {'Trainer':>8}" for w in (7, 13, 9, 9)))
    for name, pair in results.items():
        ours, theirs = pair["distft"], pair["Trainer"]
        if "error" in theirs:
            theirs = dict.fromkeys(ours, float("nan")) | {"error": theirs["error"]}
        columns = [
            f"{ours['bytes'] / 1e6:7.2f} {theirs['bytes'] / 1e6:8.2f}",
            f"{ours['stall']:13.3f} {theirs['stall']:8.3f}",
            f"{ours['written']:9.3f} {theirs['written']:8.3f}",
            f"{ours['resume']:9.3f} {theirs['resume']:8.3f}",
        ]
        print(f"{name:12} {' '.join(columns)}  {theirs.get('error', '')}".rstrip())


def distft(folder: Path, *arguments: str) -> tuple[int, Path, str]:
    command = [sys.executable, "-m", "distft", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    run = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    return done.returncode, Path(run.get("run_dir", "/nonexistent")), done.stderr


def of_distft(folder: Path, tuning: str, strategy: str, ranks: int) -> dict[str, float]:
    sets = [f"name={tuning}-{strategy}", f"parallelism.strategy={strategy}", f"checkpoint.save_steps={SAVE_STEPS}"]
    sets += ["lora=null"] if tuning == "full" else ["lora.r=16"]
    words = [word for text in sets for word in ("--set", text)]
    status, run, errors = distft(folder, "launch", "recipe.yaml", "--gpus-per-node", str(ranks), *words)
    if status:
        raise SystemExit(errors)
    saves = json.loads((run / "status.json").read_text())["saves"]
    for part in ("final", f"checkpoints/step-{STEPS}"):
        shutil.rmtree(run / part)
    (run / "status.json").write_text(json.dumps({"state": "failed"}))
    size = size_of(run / "checkpoints" / f"step-{LAST}")
    status, _, errors = distft(folder, "resume", str(run))
    if status:
        raise SystemExit(errors)
    return {
        "bytes": size,
        "stall": statistics.median(save["stall_seconds"] for save in saves),
        "written": statistics.median(save["seconds"] for save in saves),
        "resume": json.loads((run / "status.json").read_text())["restore_seconds"],
    }


def of_trainer(folder: Path, tuning: str, strategy: str, ranks: int) -> dict[str, Any]:
    output = folder / f"trainer-{tuning}-{strategy}"

    def run(*checkpoint: str) -> dict[str, Any] | str:
        launch = ["launch", "--gpus-per-node", str(ranks), "--set", f"parallelism.strategy={strategy}", "--"]
        script = [str(HERE / "checkpoint_peer.py"), str(folder), tuning, str(STEPS), str(SAVE_STEPS), str(output)]
        command = [sys.executable, "-m", "distft", *launch, *script, *checkpoint]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if "Error" in line]
            return lines[-1][:90] if lines else "it failed"
        return json.loads((output / "timings.json").read_text())

    plain = run()
    if isinstance(plain, str):
        return {"error": plain}
    saved = output / f"checkpoint-{LAST}"
    found = {"bytes": size_of(saved), "stall": statistics.median(plain["stalls"])}
    again = run(str(saved))
    resume = float("nan") if isinstance(again, str) else again["first_step"] - plain["first_step"]
    error = {"error": f"(continuing: {again})"} if isinstance(again, str) else {}
    return found | {"written": found["stall"], "resume": resume} | error


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
