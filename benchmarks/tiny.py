"""A small model, data and recipe for the benchmarks, generated from a fixed seed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

WORDS = ["list", "dict", "file", "open", "read", "write", "path", "node", "rank", "step", "loss", "model", "data"]


def write_tiny(folder: Path, **training: object) -> Path:
    """Write model/, data.jsonl and recipe.yaml; returns the recipe."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    source = random.Random(0)
    rows = [" ".join(source.choices(WORDS, k=source.randint(30, 110))) for _ in range(600)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    recipe = {
        "name": "bench",
        "model": {"name_or_path": "model"},
        "data": {"train": "data.jsonl", "max_length": 128, "packing": False, "long_rows": "truncate"},
        "training": {
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "mixed_precision": "no",
            "learning_rate": 0.001,
            "warmup_ratio": 0.0,
            "lr_scheduler_type": "constant",
            **training,
        },
        "output_dir": str(folder / "runs"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"
