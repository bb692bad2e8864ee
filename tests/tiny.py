"""A tiny model with its tokenizer and data, and a recipe for them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = [
    "list",
    "dict",
    "file",
    "open",
    "read",
    "write",
    "path",
    "node",
    "rank",
    "step",
    "loss",
    "model",
    "data",
    "batch",
    "token",
    "shard",
    "plan",
    "launch",
    "run",
    "mesh",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content + '<|go|>' }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """Folder with model/, tied/ (with one weight for both ends), chat.jsonl, heldout.jsonl, text.jsonl, chatml.jinja,
    and a recipe() for them."""

    path: Path

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """A recipe as a dict; `changes` are dotted keys with `__` for the dot."""
        recipe: dict[str, Any] = {
            "name": "tiny",
            "model": {"name_or_path": str(self.path / "model")},
            "lora": {"r": 4, "lora_alpha": 8},
            "data": {"train": str(self.path / "chat.jsonl"), "max_length": 64, "packing": True},
            "training": {
                "global_batch_size": 8,
                "max_steps": 4,
                "learning_rate": 0.01,
                "mixed_precision": "no",
                "weight_decay": 0.1,
                "warmup_ratio": 0.25,
            },
            "checkpoint": {},
            "parallelism": {},
            "fsdp": {},
        }
        for key, value in changes.items():
            *groups, last = key.split("__")
            target = recipe
            for group in groups:
                target = target[group]
            target[last] = value
        return recipe


def make_tiny(path: Path) -> None:
    make_tokenizer(path / "model")
    make_model(path / "model")
    make_tokenizer(path / "tied")
    make_model(path / "tied", tie_word_embeddings=True)
    (path / "chatml.jinja").write_text(CHATML)
    chat = random.Random(1)
    write_jsonl(path / "chat.jsonl", [chat_row(chat) for _ in range(90)])
    write_jsonl(path / "heldout.jsonl", [chat_row(chat) for _ in range(11)])
    write_jsonl(path / "text.jsonl", [{"text": sentence(chat, 4, 30)} for _ in range(60)])


def make_tokenizer(folder: Path, pad: bool = True, chat: bool = True) -> None:
    """A byte-level BPE of 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<|user|>", "<|system|>", "<|go|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    names = {"pad_token": "<pad>"} if pad else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **names)
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def make_model(folder: Path, **changes: Any) -> None:
    """A Llama of two layers, float32, random weights from a fixed seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 256}
    config = LlamaConfig(**(sizes | changes))
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def sentence(source: random.Random, shortest: int, longest: int) -> str:
    return " ".join(source.choices(WORDS, k=source.randint(shortest, longest)))


def chat_row(source: random.Random) -> dict[str, Any]:
    """A turn or two, of different lengths, so that ranks differ in how many tokens they train on."""
    turns = []
    for _ in range(source.randint(1, 2)):
        turns.append({"role": "user", "content": sentence(source, 1, 6)})
        turns.append({"role": "assistant", "content": sentence(source, 1, 9)})
    return {"messages": turns}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
