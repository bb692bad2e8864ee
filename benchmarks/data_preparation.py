"""Seconds and memory to prepare chats for training, beside trl's path over datasets with as many processes.

    python benchmarks/data_preparation.py [--rows N] [--processes P] [--json]

The same JSONL of chats of 2 to 8 turns, read, rendered with Qwen2.5's template, tokenized with the loss on the
assistant's turns, and packed. distft: distft.train.data's preparation, checks included. trl: load_dataset and making an
SFTTrainer with assistant_only_loss, packing and dataset_num_proc. Each in a process of its own, with an empty cache;
the time includes imports, and trl's the loading of a model of 2 MB. Memory is the largest resident size of any of a
tool's processes (resource.getrusage).
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
from pydoc_data.topics import topics
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
    """The chats, and a model with a tokenizer of 16,384 tokens that learnt from their text and a published template."""
    import trl.chat_template_utils
    from tiny import make_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=16384, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(topics.values(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    templates = Path(trl.chat_template_utils.__file__).parent / "chat_templates"
    tokenizer.chat_template = (templates / "qwen2_5.jinja").read_text()
    tokenizer.save_pretrained(folder / "model")
    make_model(folder / "model", vocab_size=len(tokenizer), max_position_embeddings=MAX_LENGTH)
    words = " ".join(topics.values()).split()
    source = random.Random(0)
    with (folder / "chats.jsonl").open("w") as file:
        for _ in range(rows):
            turns = [turn for _ in range(source.randint(1, 4)) for turn in (("user", 10, 60), ("assistant", 20, 200))]
            messages = [{"role": role, "content": text(source, words, *sizes)} for role, *sizes in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def text(source: random.Random, words: list[str], shortest: int, longest: int) -> str:
    """A piece of Python's reference that long, in words."""
    count = source.randint(shortest, longest)
    start = source.randrange(len(words) - count)
    return " ".join(words[start : start + count])


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
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        str(folder / "out"),
        assistant_only_loss=True,
        packing=True,
        max_length=MAX_LENGTH,
        dataset_num_proc=processes,
        use_cpu=True,
        report_to="none",
    )
    dataset = load_dataset("json", data_files=str(folder / "chats.jsonl"), split="train")
    trainer = SFTTrainer(str(folder / "model"), config, train_dataset=dataset)
    resident = largest_resident()  # before the tokens are counted, which is not trl's
    trained = sum(len(row) - row.count(-100) for row in trainer.train_dataset["labels"])
    return {"trained_tokens": trained, "resident": resident}


if __name__ == "__main__":
    main()
