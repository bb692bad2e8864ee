"""`distft import` in this process, and files to import."""

from __future__ import annotations

from collections.abc import Callable

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


def reasons(draft: Draft) -> dict[str, str]:
    return {item.option: item.why for item in draft.refused}


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["import", *arguments])
    return done.exit_code, done.stdout, done.stderr
