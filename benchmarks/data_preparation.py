"""Seconds and memory to prepare chats for training, beside trl's path over datasets with as many processes.

    python benchmarks/data_preparation.py [--rows N] [--processes P] [--json]

The same JSONL of chats of 2 to 8 turns, read, rendered, tokenized with the loss on the assistant's turns, and packed.
distft: distft.train.data's preparation, checks included. trl: what SFTTrainer does before training: load_dataset, the
chat template's marks (assistant_only_loss) in Dataset.map with num_proc, and pack_dataset. Each in a process of its
own, with an empty cache; the time includes imports. Memory is the largest resident size of any process of the two
(resource.getrusage).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

MAX_LENGTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", choices=["distft", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        answer = {"distft": run_distft, "trl": run_trl}[arguments.run](arguments.folder, arguments.processes)
        Path(arguments.folder / f"{arguments.run}.json").write_text(json.dumps(answer))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder, arguments.rows)
        size = (folder / "chats.jsonl").stat().st_size
        results = {name: measure(name, folder, arguments.processes) for name in ("distft", "trl")}
    same = results["distft"]["trained_tokens"] == results["trl"]["trained_tokens"]
    answer = {"rows": arguments.rows, "bytes": size, "processes": arguments.processes, "same": same, **results}
    if arguments.json:
        print(json.dumps(answer))
        return
    print(f"{arguments.rows:,} chats, {size / 1e6:.0f} MB, {arguments.processes} encoding processes")
    for name, result in results.items():
        print(
            f"{name:8}{result['seconds']:8.1f} s{arguments.rows / result['seconds']:10,.0f} chats/s"
            f"{result['resident'] / 2**20:8.0f} MiB{result['trained_tokens']:14,} trained tokens"
        )


def make(folder: Path, rows: int) -> None:
    from chats import WORDS
    from tiny import make_model, make_tokenizer

    make_tokenizer(folder / "model")
    make_model(folder / "model")
    source = random.Random(0)
    with (folder / "chats.jsonl").open("w") as file:
        for _ in range(rows):
            messages = [
                {"role": role, "content": " ".join(source.choices(WORDS, k=source.randint(5, 60)))}
                for _ in range(source.randint(1, 4))
                for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def measure(name: str, folder: Path, processes: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", name, "--folder", str(folder), "--processes", str(processes)]
    caches = {"DISTFT_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    started = time.perf_counter()
    quiet = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **caches, **quiet})
    seconds = time.perf_counter() - started
    return {"seconds": seconds, **json.loads((folder / f"{name}.json").read_text())}


def largest_resident() -> int:
    """Bytes."""
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return 1024 * max(own, children)


def run_distft(folder: Path, processes: int) -> dict[str, int]:
    from distft.config.loading import load_recipe
    from distft.train import encoding
    from distft.train.data import load_prepared

    encoding.processes = lambda: processes
    recipe = {
        "name": "bench",
        "model": {"name_or_path": str(folder / "model")},
        "data": {"train": str(folder / "chats.jsonl"), "max_length": MAX_LENGTH},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    prepared = load_prepared(load_recipe(folder / "recipe.yaml"))
    return {"trained_tokens": prepared.counts["train"]["trained_tokens"], "resident": largest_resident()}


def run_trl(folder: Path, processes: int) -> dict[str, int]:
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import pack_dataset

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    dataset = load_dataset("json", data_files=str(folder / "chats.jsonl"), split="train")
    dataset = dataset.map(tokenize, remove_columns=["messages"], num_proc=processes)
    trained = sum(map(sum, dataset["assistant_masks"]))  # of the check, a small part of the time
    pack_dataset(dataset, MAX_LENGTH, "bfd", {"num_proc": processes})
    return {"trained_tokens": trained, "resident": largest_resident()}


if __name__ == "__main__":
    main()
