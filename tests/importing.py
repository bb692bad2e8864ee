"""`distft import` in this process, and files to import."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from distft.cli import main
from distft.importers.draft import Draft

Import = Callable[..., Draft]

AXOLOTL = {
    "base_model": "owner/model",
    "datasets": [{"path": "owner/rows", "type": "chat_template"}],
    "learning_rate": 1e-4,
}

ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": False, "fsdp_reshard_after_forward": True},
    "mixed_precision": "bf16",
    "num_machines": 2,
    "num_processes": 16,
    "machine_rank": 0,
    "downcast_bf16": "no",
}


def write_tokenizer(folder: Path, *tokens: str) -> None:
    """A tokenizer.json with these tokens and a few words."""
    folder.mkdir(exist_ok=True)
    added = [{"id": 2 + number, "content": token, "special": True} for number, token in enumerate(tokens)]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"vocab": {"a": 0, "b": 1}}}))


def reasons(draft: Draft) -> dict[str, str]:
    return {item.option: item.why for item in draft.refused}


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["import", *arguments])
    return done.exit_code, done.stdout, done.stderr
