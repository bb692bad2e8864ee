"""axolotl's files: the recipe, computed by hand, and what becomes of other options."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from importing import AXOLOTL, Import, reasons

from distft.errors import RecipeError
from distft.importers.draft import Draft
from distft.models.freezing import named


def without(draft: Draft, *names: str) -> dict[str, Any]:
    return {name: value for name, value in draft.fields.items() if name not in names}


def test_axolotl_defaults(imported: Import) -> None:
    """Every default that is not distft's stands in the recipe."""
    draft = imported(AXOLOTL)
    assert draft.fields == {
        "name": "config",
        "model.name_or_path": "owner/model",
        "lora": None,
        "data.train": "owner/rows",
        "data.format": "messages",
        "data.max_length": 512,
        "data.packing": False,
        "data.long_rows": "drop",
        "training.global_batch_size": 8,
        "training.num_train_epochs": 1,
        "training.learning_rate": 1e-4,
        "training.weight_decay": 0.0,
        "training.max_grad_norm": 1.0,
        "training.seed": 42,
        "training.optim": "adamw_torch_fused",
        "training.lr_scheduler_type": "cosine",
        "training.warmup_ratio": 0.03,
        "training.mixed_precision": "bf16",
    }
    assert (draft.refused, draft.dropped) == ([], [])


def test_axolotl_qlora(imported: Import, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    draft = imported(
        {
            "base_model": "owner/model",
            "model_type": "LlamaForCausalLM",
            "revision_of_model": "abc123",
            "load_in_4bit": True,
            "adapter": "qlora",
            "lora_r": 64,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "lora_target_modules": ["q_proj", "v_proj"],
            "peft_use_rslora": True,
            "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": "alpaca"}],
            "val_set_size": 0.05,
            "sequence_len": 4096,
            "sample_packing": True,
            "pad_to_sequence_len": True,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "max_steps": 200,
            "num_epochs": 4,
            "optimizer": "paged_adamw_32bit",
            "adam_beta2": 0.95,
            "lr_scheduler": "linear",
            "learning_rate": "2e-5",
            "warmup_steps": 10,
            "weight_decay": 0.1,
            "max_grad_norm": 0.3,
            "bf16": False,
            "fp16": True,
            "gradient_checkpointing": "offload",
            "save_steps": 50,
            "save_total_limit": 2,
            "eval_steps": 20,
            "seed": 7,
            "special_tokens": {"pad_token": "</s>", "bos_token": "<s>"},
            "plugins": ["axolotl.integrations.liger.LigerPlugin"],
            "liger_rope": True,
            "sdp_attention": True,
            "wandb_project": "mine",
            "wandb_name": None,
            "output_dir": "./out",
        }
    )
    assert not draft.refused
    assert without(draft, "name") == {
        "model.name_or_path": "owner/model",
        "model.revision": "abc123",
        "model.quantization": "nf4",
        "model.pad_token": "</s>",
        "model.attn_implementation": "sdpa",
        "lora.r": 64,
        "lora.lora_alpha": 16,
        "lora.lora_dropout": 0.05,
        "lora.target_modules": ["q_proj", "v_proj"],
        "lora.use_rslora": True,
        "data.train": "rows.jsonl",
        "data.format": "alpaca_prompt",
        "data.eval": 0.05,
        "data.max_length": 4096,
        "data.packing": "auto",
        "data.long_rows": "drop",
        "training.global_batch_size": 64,
        "training.max_steps": 200,
        "training.learning_rate": 2e-5,
        "training.lr_scheduler_type": "linear",
        "training.warmup_steps": 10,
        "training.weight_decay": 0.1,
        "training.max_grad_norm": 0.3,
        "training.seed": 7,
        "training.optim": "paged_adamw_32bit",
        "training.mixed_precision": "fp16",
        "training.gradient_checkpointing": True,
        "training.activation_offloading": True,
        "training.use_liger_kernel": True,
        "training.eval_steps": 20,
        "training.report_to": ["wandb"],
        "checkpoint.save_steps": 50,
        "checkpoint.save_total_limit": 2,
        "trainer.overrides.adam_beta2": 0.95,
        "output_dir": "./out",
    }
    dropped = {item.option: item.line for item in draft.dropped}
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    assert lines[(dropped["wandb_project"] or 0) - 1] == "wandb_project: mine"
    assert {"model_type", "num_epochs", "pad_to_sequence_len", "special_tokens.bos_token"} <= set(dropped)
    assert "wandb_name" not in dropped  # null: not set


@pytest.mark.parametrize(
    ("data_set", "expected"),
    [
        (
            {"type": "completion", "field": "story"},
            {"format": "text", "columns": {"text": "story"}, "long_rows": "split"},
        ),
        (
            {
                "type": "chat_template",
                "field_messages": "conversations",
                "message_property_mappings": {"role": "from", "content": "value"},
            },
            {"format": "sharegpt"},
        ),
        (
            {
                "type": "chat_template",
                "field_messages": "dialog",
                "message_property_mappings": {"role": "speaker", "content": "text"},
                "roles": {"assistant": ["bot"], "user": ["human"]},
            },
            {
                "format": "messages",
                "columns": {"messages": "dialog", "role": "speaker", "content": "text"},
                "roles": {"bot": "assistant"},
            },
        ),
        (
            {
                "type": {
                    "field_instruction": "q",
                    "field_output": "a",
                    "format": "{instruction}",
                    "no_input_format": "{instruction}",
                }
            },
            {"format": "prompt_completion", "columns": {"prompt": "q", "completion": "a"}},
        ),
        ({"type": None}, {"format": "tokens"}),
        ({"type": "alpaca", "split": "train[:20%]"}, {"train": [{"path": "owner/rows", "epochs": 0.2}]}),
        ({"type": "alpaca", "split": "test[:100]"}, {"train": [{"path": "owner/rows:test", "rows": 100}]}),
        ({"type": "alpaca", "shards": 4}, {"train": [{"path": "owner/rows", "epochs": 0.25}]}),
        ({"type": "alpaca", "name": "small"}, {"train": [{"path": "owner/rows", "config": "small"}]}),
        ({"type": "alpaca", "revision": "v1"}, {"train": "owner/rows@v1"}),
        ({"type": "alpaca", "data_files": "a.jsonl"}, {"train": "hf://datasets/owner/rows/a.jsonl"}),
    ],
)
def test_axolotl_data_sets(imported: Import, data_set: dict[str, Any], expected: dict[str, Any]) -> None:
    draft = imported({**AXOLOTL, "datasets": [{"path": "owner/rows", **data_set}]})
    assert not draft.refused
    found = {name.removeprefix("data."): value for name, value in draft.fields.items()}
    assert {name: found.get(name) for name in expected} == expected


def test_axolotl_several_data_sets(imported: Import) -> None:
    two = [{"path": "owner/a", "type": "alpaca"}, {"path": "owner/b", "type": "alpaca", "split": "train[50%:]"}]
    draft = imported({**AXOLOTL, "datasets": two})
    assert draft.fields["data.train"] == ["owner/a", {"path": "owner/b", "epochs": 0.5}]
    assert "datasets[1].split: 50% of the rows are drawn by training.seed, not those of the slice" in draft.warnings
    eval_rows = [{"path": "owner/c", "type": "chat_template"}]
    draft = imported({**AXOLOTL, "datasets": two[:1], "test_datasets": eval_rows})
    assert reasons(draft) == {
        "test_datasets[0].type": "a recipe has one data.format and data.columns for all its data; here it would be "
        "messages, and for datasets[0].type alpaca_prompt; write these rows in that form"
    }
    two[1]["type"] = "chat_template"
    draft = imported({**AXOLOTL, "datasets": two})
    assert list(reasons(draft)) == ["datasets[1].type"]
    assert "datasets" in {item.option for item in draft.mapped}  # as data.train: it is not refused, too


def test_axolotl_formats_that_auto_tells_apart(imported: Import) -> None:
    from_value = {"role": "from", "content": "value"}
    chats = [
        {"path": "owner/a", "type": "chat_template", "field_messages": "conversations"},
        {"path": "owner/b", "type": "chat_template", "message_property_mappings": from_value, "roles": {"user": "me"}},
        {"path": "owner/c", "type": "sharegpt"},
    ]
    draft = imported({**AXOLOTL, "datasets": chats, "test_datasets": [{"path": "owner/d", "type": "chat_template"}]})
    assert not draft.refused
    assert (draft.fields["data.format"], draft.fields["data.roles"]) == ("auto", {"me": "user"})
    types = "datasets[0].type + datasets[1].type + datasets[2].type + test_datasets[0].type"
    assert [item.option for item in draft.mapped if ".type" in item.option] == [types] * 2  # and nothing more of them
    assert "data.columns" not in draft.fields
    chats[0]["field_messages"] = "turns"  # which `auto` does not look for
    assert list(reasons(imported({**AXOLOTL, "datasets": chats}))) == ["datasets[1].type"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rl": "dpo"}, "distft trains on examples alone"),
        ({"processor_type": "AutoProcessor"}, "distft trains on text alone"),
        ({"embedding_lr": 1e-5}, "distft has one learning rate for all weights"),
        ({"optimizer": "lion_pytorch"}, "distft has adamw_torch_fused, "),
        ({"optimizer": "muon"}, "axolotl's Muon leaves norms and biases as they are"),
        ({"lr_scheduler": "rex"}, "distft has cosine, "),
        ({"early_stopping_patience": 3}, "distft trains all steps"),
        ({"plugins": ["axolotl.integrations.spectrum.SpectrumPlugin"]}, "distft runs no plugins"),
        ({"micro_batchsize": 2}, "not an option of axolotl; did you mean micro_batch_size?"),
        ({"val_set_size": 100}, "a number of rows"),
        ({"model_type": "LlamaForSequenceClassification"}, "distft trains causal language models alone"),
        ({"qgalore_rank": 8}, "distft has nothing like it"),
        ({"adapter": "lora"}, "missing: peft would choose by the type of the model; name them"),
    ],
)
def test_axolotl_refuses(imported: Import, options: dict[str, Any], expected: str) -> None:
    draft = imported({**AXOLOTL, **options})
    assert len(draft.refused) == 1
    assert draft.refused[0].why.startswith(expected)


def test_every_option_is_listed(imported: Import) -> None:
    """No option that is set vanishes: it is mapped, dropped or refused."""
    options = {
        **AXOLOTL,
        "adapter": "lora",
        "lora_target_linear": True,
        "lora_target_modules": ["q_proj"],
        "fsdp": ["full_shard"],
        "fsdp_config": {
            "fsdp_offload_params": True,
            "fsdp_sharding_strategy": "FULL_SHARD",
            "fsdp_state_dict_type": "X",
        },
        "liger_rope": True,
        "liger_rms_norm": True,
        "plugins": ["axolotl.integrations.liger.LigerPlugin"],
        "relora": True,
        "bf16": "auto",
        "tf32": True,
        "chat_template": "chatml",
        "eot_tokens": ["<e>"],
        "special_tokens": {"bos_token": "<s>"},
        "evals_per_epoch": 4,
        "loss_watchdog_threshold": 5.0,
    }
    draft = imported(options)
    listed = {item.option for item in (*draft.mapped, *draft.dropped, *draft.refused)}
    inner = {f"fsdp_config.{name}" for name in options["fsdp_config"]} | {"special_tokens.bos_token"}
    data_set = {"datasets[0].path", "datasets[0].type"}
    assert set(options) - {"fsdp_config", "special_tokens", "datasets"} | inner | data_set <= listed


def test_axolotl_options_that_are_off(imported: Import) -> None:
    off = {"rl": None, "relora": False, "unfrozen_parameters": [], "fp8": False, "sample_packing": None, "debug": None}
    assert imported({**AXOLOTL, **off}).fields == imported(AXOLOTL).fields
    assert not imported({**AXOLOTL, **off}).refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"micro_batch_size": 3}, 24),
        ({"micro_batch_size": 3, "batch_size": 12}, 96),  # batch_size / micro_batch_size is the accumulation
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 4, "tensor_parallel_size": 2}, 32),
        ({"context_parallel_size": 4, "gradient_accumulation_steps": 2}, 4),
    ],
)
def test_axolotl_batch(imported: Import, options: dict[str, Any], expected: int) -> None:
    assert imported({**AXOLOTL, **options}).fields["training.global_batch_size"] == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"torch_compile": "auto"}, True),
        ({"torch_compile": True, "torch_compile_backend": "inductor", "torch_compile_mode": "default"}, True),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, None),
        ({"torch_compile": True, "deepspeed": "deepspeed_configs/zero3_bf16.json"}, None),  # it does not work there
        ({"torch_compile": False}, None),
    ],
)
def test_axolotl_compiles(imported: Import, options: dict[str, Any], expected: bool | None) -> None:
    draft = imported({**AXOLOTL, **options})
    assert draft.fields.get("training.compile") is expected
    assert expected or any(item.option == "torch_compile" for item in draft.dropped)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fsdp": ["full_shard", "auto_wrap"]}, ("fsdp", "none")),
        (
            {"fsdp_version": 2, "fsdp_config": {"offload_params": True, "state_dict_type": "FULL_STATE_DICT"}},
            ("fsdp", "all"),
        ),
        ({"fsdp": "hybrid_shard", "fsdp_config": {"fsdp_offload_params": False}}, ("hsdp", "none")),
        ({"dp_shard_size": 8}, ("fsdp", None)),
        ({"dp_shard_size": 4, "dp_replicate_size": 2}, ("hsdp", None)),
        ({"deepspeed": "deepspeed_configs/zero3_bf16_cpuoffload_all.json"}, ("zero3", "all")),
        ({"deepspeed": "ds.json"}, ("zero2", "optimizer")),
    ],
)
def test_sharding(imported: Import, tmp_path: Path, options: dict[str, Any], expected: tuple[str, str | None]) -> None:
    config = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "bf16": {"enabled": True},
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    draft = imported({**AXOLOTL, **options})
    assert not draft.refused
    assert (draft.fields["parallelism.strategy"], draft.fields.get("parallelism.offload")) == expected


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"optimizer": "adamw_torch_8bit", "fsdp": ["full_shard"]}, "adamw_bnb_8bit does not work under fsdp"),
        (
            {"adapter": "lora", "lora_target_linear": True, "load_in_8bit": True, "dp_shard_size": 2},
            "fsdp cannot shard int8 weights",
        ),
    ],
)
def test_sharding_that_distft_does_not_have(imported: Import, options: dict[str, Any], why: str) -> None:
    draft = imported({**AXOLOTL, **options})
    assert draft.fields["parallelism.strategy"] == "auto"
    assert draft.fields.get("parallelism.offload", "auto") == "auto"
    assert [item.to for item in draft.mapped if item.field == "parallelism.strategy"] == ["auto"]
    assert f"parallelism.strategy: {why}, so distft chooses another; what is trained stays the same" in draft.warnings


@pytest.mark.parametrize(
    ("options", "masters", "said"),
    [
        ({"bf16": "full"}, "none", "Kahan summation"),
        ({"bf16": "full", "adapter": "lora", "lora_target_linear": True}, None, ""),
        ({"bf16": True}, None, "training.master_weights: none is nearer"),
        ({"bf16": True, "fsdp": ["full_shard"]}, None, ""),
        ({"bf16": "full", "optimizer": "adafactor"}, None, "distft's are float32 for adafactor"),
    ],
)
def test_full_bf16(imported: Import, options: dict[str, Any], masters: str | None, said: str) -> None:
    draft = imported({**AXOLOTL, **options})
    assert draft.fields.get("training.master_weights") == masters
    found = [text for text in draft.warnings if text.startswith("bf16: ")]
    assert said in found[0] if said else not found


def test_a_frozen_vision_tower(imported: Import) -> None:
    options = {**AXOLOTL, "unfrozen_parameters": ["^model.language_model.*", "lm_head"]}
    assert not imported(options).refused
    assert "training.train_only" not in imported(options).fields


@pytest.mark.parametrize(
    ("given", "pattern", "trained"),
    [
        ("^lm_head.weight$", r"lm_head\.weight", {"lm_head.weight"}),
        ("lm_head", "lm_head.*", {"lm_head.weight"}),
        (
            "model.layers.1[01]+.mlp",
            r"model\.layers\.1[01]+\.mlp.*",
            {f"model.layers.{n}.mlp.up.weight" for n in (10, 11)},
        ),
        ("model.layers.1.*", r"model\.layers\.1.*", {f"model.layers.{n}.mlp.up.weight" for n in (1, 10, 11)}),
        ("lm_head|model.norm.weight$", r"(?:lm_head|model\.norm\.weight$).*", {"lm_head.weight", "model.norm.weight"}),
    ],
)
def test_unfrozen_parameters(imported: Import, given: str, pattern: str, trained: set[str]) -> None:
    """As axolotl matches them (utils/freeze.py, LayerNamePattern.match), which is computed here."""
    names = [*(f"model.layers.{n}.mlp.up.weight" for n in range(12)), "model.norm.weight", "lm_head.weight"]
    theirs = re.compile(re.sub(r"\.(?!\+)", "\\.", given))
    assert {name for name in names if theirs.match(name)} == trained
    draft = imported({**AXOLOTL, "unfrozen_parameters": [given]})
    assert (draft.fields["training.train_only"], draft.fields["lora"], draft.refused) == ([pattern], None, [])
    assert named(names, [pattern]) == trained


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"unfrozen_parameters": ["lm_head", "^model.embed_tokens.weight$[:32000]"]}, "trains some rows of a weight"),
        ({"unfrozen_parameters": ["lm_head"], "adapter": "lora", "lora_target_linear": True}, "distft trains adapters"),
    ],
)
def test_unfrozen_parameters_that_are_refused(imported: Import, options: dict[str, Any], why: str) -> None:
    found = reasons(imported({**AXOLOTL, **options}))
    assert list(found) == ["unfrozen_parameters"]
    assert why in found["unfrozen_parameters"]


def test_groups_of_gpus(imported: Import) -> None:
    options = {**AXOLOTL, "dp_shard_size": 4, "dp_replicate_size": 2, "tensor_parallel_size": 2}
    with pytest.raises(RecipeError, match=r"--gpus: got 8, need a multiple of 16 \(dp_shard_size 4 x"):
        imported(options)
    assert imported(options, gpus=16).fields["training.global_batch_size"] == 8


def test_a_deepspeed_config_with_its_own_optimizer(imported: Import, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}, "optimizer": {"params": {"lr": 1}}}')
    assert list(reasons(imported({**AXOLOTL, "deepspeed": "ds.json"}))) == ['"ds.json".optimizer']
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(RecipeError, match=r"deepspeed: .*ds.json cannot be read as JSON"):
        imported({**AXOLOTL, "deepspeed": "ds.json"})


def test_schedules(imported: Import) -> None:
    fields = imported({**AXOLOTL, "cosine_min_lr_ratio": 0.1, "warmup_ratio": 0.2}).fields
    assert fields["trainer.overrides.lr_scheduler_type"] == "cosine_with_min_lr"
    assert fields["trainer.overrides.lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert fields["training.warmup_ratio"] == 0.2
    assert imported({**AXOLOTL, "max_steps": 1000}).fields["training.warmup_steps"] == 30  # min(int(0.03 x 1000), 100)
    assert imported({**AXOLOTL, "max_steps": 9000}).fields["training.warmup_steps"] == 100
    assert imported({**AXOLOTL, "warmup_steps": 0.1}).fields["training.warmup_ratio"] == 0.1  # transformers 5


def test_optimizers_that_store_fewer_bits(imported: Import) -> None:
    draft = imported({**AXOLOTL, "optimizer": "adamw_torch_4bit"})
    assert draft.fields["training.optim"] == "adamw_bnb_8bit"
    assert "these are more exact, and twice as large" in draft.warnings[-1] + draft.warnings[0]
    assert imported({**AXOLOTL, "optimizer": "adamw_8bit"}).fields["training.optim"] == "adamw_bnb_8bit"


def test_axolotl_tokens(imported: Import) -> None:
    special = {
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "additional_special_tokens": ["<a>"],
    }
    draft = imported({**AXOLOTL, "special_tokens": special, "tokens": ["<b>", "<a>"], "eot_tokens": ["<|im_end|>"]})
    assert not draft.refused
    assert draft.fields["model.eos_token"] == "<|im_end|>"
    assert draft.fields["model.pad_token"] == "<pad>"
    assert draft.fields["model.add_tokens"] == ["<a>", "<b>"]
    assert "special_tokens.bos_token: distft uses the tokenizer's own, which <s> must be" in draft.warnings


def test_axolotl_options_for_some_layers(imported: Import) -> None:
    given = {
        "adapter": "lora",
        "lora_target_linear": True,
        "lora_modules_to_save": ["embed_tokens", "lm_head"],
        "lora_exclude_modules": ["o_proj"],
        "lora_rank_pattern": {"down_proj": 32},
        "lora_alpha_pattern": {"down_proj": 64},
        "peft_layers_to_transform": 0,
        "loraplus_lr_ratio": 16,
        "loraplus_lr_embedding": 1e-5,
        "peft_init_lora_weights": "pissa_niter_4",
    }
    draft = imported({**AXOLOTL, **given})
    names = ("modules_to_save", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform")
    names += ("loraplus_lr_ratio", "loraplus_lr_embedding", "init_lora_weights")
    assert not draft.refused
    assert [draft.fields[f"lora.{name}"] for name in names] == list(given.values())[2:]
    empty = dict.fromkeys(list(given)[2:])
    draft = imported({**AXOLOTL, **given, **empty})
    assert not draft.refused
    assert not any(f"lora.{name}" in draft.fields for name in names)
    refused = imported({**AXOLOTL, **given, "peft_init_lora_weights": "eva"}).refused
    assert [(item.option, item.why) for item in refused] == [
        ("peft_init_lora_weights", "distft has gaussian, orthogonal, olora and pissa")
    ]


def test_fused_losses_are_the_chunked_one(imported: Import) -> None:
    """Not Liger's kernels, which need its package and a GPU."""
    plugins = ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]
    draft = imported({**AXOLOTL, "liger_fused_linear_cross_entropy": True, "plugins": plugins})
    assert "training.use_liger_kernel" not in draft.fields
    why = {item.option: item.why for item in draft.dropped}
    assert (
        why["liger_fused_linear_cross_entropy"]
        == why["plugins"]
        == "training.loss: chunked does the same, with every model"
    )
    kernels = imported({**AXOLOTL, "liger_fused_linear_cross_entropy": True, "liger_rope": True})
    assert kernels.fields["training.use_liger_kernel"] is True
