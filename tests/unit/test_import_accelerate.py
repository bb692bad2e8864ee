"""accelerate's config: a part of a recipe, and a cluster profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from importing import ACCELERATE, Import, reasons, run

from distft.config.cluster import load_cluster
from distft.errors import RecipeError


def test_accelerate(here: Path) -> None:
    (here / "fsdp.yaml").write_text(yaml.safe_dump(ACCELERATE))
    status, out, error = run("fsdp.yaml", "--cluster-out", "cluster.yaml")
    assert status == 0, error
    assert yaml.safe_load(Path("recipe.yaml").read_text()) == {
        "training": {"mixed_precision": "bf16"},
        "parallelism": {"strategy": "fsdp", "offload": "none"},
    }
    assert "a part of a recipe" in Path("recipe.yaml").read_text().splitlines()[0]
    assert "launch with --nodes 2 --gpus-per-node 8" in " ".join(out.split())
    assert load_cluster("cluster.yaml").node.gpus_per_node == 8


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"distributed_type": "MULTI_GPU", "fsdp_config": None}, {"parallelism.strategy": "ddp"}),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "offload_param_device": "cpu"}},
            {"parallelism.strategy": "zero3", "parallelism.offload": "all"},
        ),
        ({"fsdp_config": {"fsdp_reshard_after_forward": "HYBRID_SHARD"}}, {"parallelism.strategy": "hsdp"}),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "default"}}, {"training.compile": True}),
        ({"dynamo_config": {"dynamo_backend": "NO"}}, {"training.compile": None}),
        ({"mixed_precision": "fp8"}, {"training.mixed_precision": "bf16"}),
        ({"mixed_precision": "no"}, {"training.mixed_precision": "no"}),
        (
            {"fsdp_config": {"fsdp_sharding_strategy": 4, "fsdp_activation_checkpointing": True}},
            {"parallelism.strategy": "hsdp", "training.gradient_checkpointing": True},
        ),
    ],
)
def test_accelerate_options(imported: Import, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    draft = imported(ACCELERATE | changes, gpus=None)
    assert not draft.refused
    assert {name: draft.fields.get(name) for name in expected} == expected


def test_a_deepspeed_config_says_the_precision(imported: Import, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}, "fp16": {"enabled": true}}')
    config = {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": "ds.json"},
        "num_processes": 2,
    }
    assert imported(config, gpus=None).fields == {
        "parallelism.strategy": "zero1",
        "parallelism.offload": "none",
        "training.mixed_precision": "fp16",
    }
    assert imported(config | {"mixed_precision": "bf16"}, gpus=None).fields["training.mixed_precision"] == "bf16"


def test_accelerate_refuses(imported: Import) -> None:
    assert "distributed_type" in reasons(imported(ACCELERATE | {"distributed_type": "MEGATRON_LM"}))
    assert "numprocesses" in reasons(imported(ACCELERATE | {"numprocesses": 3}))
    with pytest.raises(RecipeError, match="num_processes: got 15, which 2 machines cannot share evenly"):
        imported(ACCELERATE | {"num_processes": 15})
