"""Rows of plan_accuracy.py: a line of text → a recipe and a setting."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from model_configs import CONFIGS

from distft.config.loading import load_recipe
from distft.config.recipe import Recipe
from distft.planner.setting import Setting

ATTENTION = {"flash": "flash_attention_2"}


@dataclass(frozen=True)
class Row:
    """One configuration."""

    text: str
    model: str
    recipe: dict[str, Any]
    setting: Setting
    extra: dict[str, str]


def parse(text: str) -> Iterator[Row]:
    """One row per line: model, tuning, precision, strategy*ranks[/shard], attention, micro-batch x length,
    packed | padded, checkpointing | keep; then NAME=VALUE. oft=SIZE: rotations instead of LoRA."""
    for line in filter(None, map(str.strip, text.splitlines())):
        model, tuning, precision, strategy, attention, size, packing, checkpointing, *rest = line.split()
        extra = {key: value for key, _, value in (word.partition("=") for word in rest)}
        kind, rank = re.fullmatch(r"(full|lora|nf4:|int8:)(\d*)", tuning).groups()
        name, ranks, shard = re.fullmatch(r"(\w+)\*(\d+)/?(\d*)", strategy).groups()
        micro, length = map(int, size.split("x"))
        lora: dict[str, Any] | None = None
        if kind != "full":
            lora = {"r": int(rank), "use_dora": "dora" in extra}
            if "oft" in extra:
                lora = {"oft": {"oft_block_size": int(extra["oft"])}}
            if "targets" in extra:
                lora["target_modules"] = extra["targets"].split(",")
        recipe = {
            "name": "row",
            "model": {"name_or_path": model, "quantization": kind[:-1] if kind.endswith(":") else None},
            "data": {"train": "data.jsonl", "max_length": length, "packing": packing == "packed"},
            "lora": lora,
            "training": {
                "mixed_precision": precision,
                # Two micro-batches a step, so that gradients are there in the second's forward pass; one where somebody
                # else's figure is compared.
                "global_batch_size": (1 if "peak" in extra else 2) * micro * int(ranks),
                "master_weights": extra.get("masters", "float32"),
                "optim": extra.get("optim", "adamw_torch_fused"),
                "compile": "compile" in extra,
                "loss": "full" if "peak" in extra else "chunked",  # published rows are from before chunks
            },
        }
        setting = Setting(
            strategy=name,
            offload=extra.get("offload", "none"),
            shard_size=int(shard or ranks) if name != "ddp" else 1,
            world_size=int(ranks),
            nproc_per_node=min(int(ranks), 8),
            micro_batch_size=micro,
            gradient_checkpointing=checkpointing == "checkpointing",
            attn_implementation=ATTENTION.get(attention, attention),
        )
        yield Row(line, model, recipe, setting, extra)


def recipe_of(folder: Path, row: Row) -> Recipe:
    """The row's recipe, beside its model's config.json."""
    model = folder / row.model
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIGS[row.model]))
    (folder / "data.jsonl").write_text("{}\n")
    (folder / "row.yaml").write_text(yaml.safe_dump(row.recipe))
    return load_recipe(folder / "row.yaml")
