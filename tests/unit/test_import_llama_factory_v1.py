"""LLaMA-Factory's v1 trainer, and its YAML of data sets: the recipe, computed by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from importing import Import, reasons

from distft.errors import RecipeError

V1 = {"model": "owner/model", "train_dataset": "data/sft.yaml", "dist_config": {"name": "fsdp2"}}


@pytest.fixture(autouse=True)
def described(tmp_path: Path) -> None:
    """data/ with YAML files of data sets, whose paths start at the folder above it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.json").write_text("[]")
    mine = {"path": "data/mine.json", "source": "local", "converter": "alpaca"}
    files = {
        "sft": {"mine": mine},
        "mix": {
            "drawn": {**mine, "size": 500},
            "half": {"path": "owner/chats", "split": "test", "converter": "sharegpt", "weight": 0.5},
        },
        "pairs": {"pairs": {"path": "owner/pairs", "converter": "pair"}},
        "own": {"own": {"path": "data/mine.json", "source": "local"}},
    }
    for name, content in files.items():
        (tmp_path / "data" / f"{name}.yaml").write_text(yaml.safe_dump(content))


def test_defaults(imported: Import) -> None:
    draft = imported(V1)
    assert draft.fields == {
        "name": "config",
        "model.name_or_path": "owner/model",
        "lora": None,
        "data.train": "data/mine.json",
        "data.format": "alpaca",
        "data.train_on": "all_with_reasoning",
        "data.max_length": 2048,
        "data.packing": False,
        "data.long_rows": "truncate",
        "training.global_batch_size": 8,
        "training.num_train_epochs": 3,
        "training.learning_rate": 1e-4,
        "training.lr_scheduler_type": "constant",
        "training.weight_decay": 0.01,
        "training.max_grad_norm": 1.0,
        "training.seed": 42,
        "training.optim": "adamw_torch",
        "training.mixed_precision": "bf16",
        "parallelism.strategy": "fsdp",
        "parallelism.offload": "none",
    }
    assert not draft.refused
    assert any(text.startswith("training.weight_decay: LLaMA-Factory v1 lets norms decay") for text in draft.warnings)


def test_lora_of_a_quantized_model(imported: Import) -> None:
    draft = imported(
        {
            **V1,
            "peft_config": {"name": "lora", "r": 16, "target_modules": "all", "use_rslora": True, "export_dir": "x"},
            "quant_config": {"name": "bnb", "quantization_bit": 4},
            "kernel_config": {"name": "auto, liger_kernel"},
            "init_config": {"name": "init_on_rank0"},
            "model_class": "llm",
            "flash_attn": "flash_attention_2",
            "micro_batch_size": 2,
            "cp_size": 2,
            "max_steps": 10,
            "enable_activation_checkpointing": False,
            "sample_backend": "hf",
        }
    )
    assert not draft.refused
    expected = {
        "model.quantization": "nf4",
        "lora.r": 16,
        "lora.lora_alpha": 16,
        "lora.lora_dropout": 0.05,
        "lora.target_modules": "all-linear",
        "lora.use_rslora": True,
        "training.use_liger_kernel": True,
        "training.global_batch_size": 8,
        "training.max_steps": 10,
        "training.gradient_checkpointing": False,
    }
    assert {name: draft.fields.get(name) for name in expected} == expected
    dropped = {item.option for item in draft.dropped}
    assert {
        "cp_size",
        "init_config",
        "model_class",
        "flash_attn",
        "sample_backend",
        "peft_config.export_dir",
    } <= dropped


def test_data_sets(imported: Import) -> None:
    draft = imported({**V1, "train_dataset": "data/mix.yaml"})
    assert draft.fields["data.train"] == [
        {"path": "data/mine.json", "rows": 500},
        {"path": "owner/chats:test", "epochs": 0.5},
    ]
    assert draft.fields["data.format"] == "auto"
    assert not draft.refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batching_strategy": "padding_free"}, {"data.packing": False, "training.global_batch_size": 32}),
        ({"batching_strategy": "dynamic_padding_free"}, {"data.packing": "auto", "training.global_batch_size": 32}),
        ({"global_batch_size": 64}, {"training.global_batch_size": 64}),
        ({"dist_config": None}, {"parallelism.strategy": "ddp", "training.mixed_precision": "no"}),
        ({"dist_config": None, "peft_config": {"name": "lora"}}, {"training.mixed_precision": "bf16"}),
        ({"bf16": False}, {"training.mixed_precision": "no"}),
        ({"dist_config": {"name": "fsdp2", "offload_params": True}}, {"parallelism.offload": "all"}),
        ({"dist_config": {"name": "fsdpturbo", "ep_size": 8}}, {"parallelism.strategy": "fsdp"}),
        ({"mp_replicate_size": 2}, {"parallelism.strategy": "hsdp", "parallelism.hsdp_shard_size": 4}),
        (
            {
                "peft_config": {
                    "name": "freeze",
                    "freeze_trainable_layers": 3,
                    "freeze_trainable_modules": "all",
                    "freeze_extra_modules": ["lm_head"],
                    "cast_trainable_params_to_fp32": False,
                }
            },
            {"lora": None, "training.train_only": [r".*\.-[123]", ".*lm_head.*"]},
        ),
        (
            {"optim_config": {"name": "muon", "momentum": 0.95, "adamw_betas": [0.8, 0.9], "adamw_eps": 1e-7, "lr": 1}},
            {
                "training.optim": "muon",
                "training.weight_decay": 0.1,
                "training.learning_rate": 1e-4,
                "trainer.overrides.adam_beta1": 0.8,
                "trainer.overrides.adam_beta2": 0.9,
                "trainer.overrides.adam_epsilon": 1e-7,
            },
        ),
        (
            {"optim_config": {"name": "muon", "wd": 0.0}},
            {"training.weight_decay": 0, "trainer.overrides.adam_beta2": 0.95},
        ),
        (
            {"dist_config": {"name": "deepspeed", "config_file": "ds.json"}},
            {"parallelism.strategy": "zero3", "parallelism.offload": "none", "training.mixed_precision": "bf16"},
        ),
    ],
)
def test_options(imported: Import, tmp_path: Path, options: dict[str, Any], expected: dict[str, Any]) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}))
    draft = imported({**V1, "micro_batch_size": 4, **options})
    assert not draft.refused
    assert {name: draft.fields.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"train_dataset": "data/pairs.yaml"}, '"pairs.yaml".pairs.converter'),
        ({"train_dataset": "data/own.yaml"}, '"own.yaml".own.converter'),
        ({"train_dataset": "owner/rows"}, "train_dataset.converter"),
        ({"batching_strategy": "dynamic_batching"}, "batching_strategy"),
        ({"optim_config": {"name": "lion"}}, "optim_config.name"),
        ({"optim_config": {"name": "muon"}, "peft_config": {"name": "lora"}}, "optim_config.name"),
        ({"optim_config": {"name": "muon", "ns_steps": 6}}, "optim_config.ns_steps"),
        ({"optim_config": {"name": "muon", "nesterov": False}}, "optim_config.nesterov"),
        ({"peft_config": {"name": "freeze", "frozen": 2}}, "peft_config.frozen"),
        ({"peft_config": {"name": "lora", "rank": 8}}, "peft_config.rank"),
        ({"dist_config": {"name": "fsdp2", "dcp_path": "x"}}, "dist_config.dcp_path"),
        ({"quant_config": {"name": "bnb"}}, "quant_config.name"),
        ({"model_class": "cls"}, "model_class"),
        ({"micro_batch": 2}, "micro_batch"),
    ],
)
def test_refused(imported: Import, options: dict[str, Any], expected: str) -> None:
    assert list(reasons(imported({**V1, **options}))) == [expected]


def test_absent_data_sets(imported: Import, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such file: data/none.yaml \(config.yaml:\d\); download it"):
        imported({**V1, "train_dataset": "data/none.yaml"})
    (tmp_path / "data" / "sft.yaml").write_text("mine: [")
    with pytest.raises(RecipeError, match=r"train_dataset: .*not valid YAML"):
        imported(V1)
    with pytest.raises(RecipeError, match=r"train_dataset is missing \(config.yaml\)"):
        imported({name: value for name, value in V1.items() if name != "train_dataset"})
