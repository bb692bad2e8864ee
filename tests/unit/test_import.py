"""`distft import`: the recipe of a file, computed by hand, and what becomes of its other options."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from distft import importers
from distft.cli import main
from distft.config.cluster import load_cluster
from distft.config.loading import load_recipe
from distft.errors import RecipeError
from distft.importers.draft import Draft
from distft.importers.kinds import read_file

Import = Callable[..., Draft]


@pytest.fixture
def imported(tmp_path: Path) -> Import:
    """Import options as a file `config.yaml` for 8 GPUs; the recipe is checked."""

    def run(options: dict[str, Any], gpus: int | None = 8) -> Draft:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(options, sort_keys=False))
        draft = read_file(file, tmp_path, gpus)
        if draft.problems:
            raise RecipeError(draft.problems)
        if not draft.refused:
            draft.check()
        return draft

    return run


def without(draft: Draft, *names: str) -> dict[str, Any]:
    return {name: value for name, value in draft.fields.items() if name not in names}


def reasons(draft: Draft) -> dict[str, str]:
    return {item.option: item.why for item in draft.refused}


# ---- axolotl

AXOLOTL = {
    "base_model": "owner/model",
    "datasets": [{"path": "owner/rows", "type": "chat_template"}],
    "learning_rate": 1e-4,
}


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
        "data.packing": True,
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
        "test_datasets[0].type": "distft reads the rows that are trained and evaluated in one format"
    }
    two[1]["type"] = "chat_template"
    assert "datasets" in reasons(imported({**AXOLOTL, "datasets": two}))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rl": "dpo"}, "distft trains on examples alone"),
        ({"processor_type": "AutoProcessor"}, "distft trains on text alone"),
        ({"loraplus_lr_ratio": 16}, "distft has one learning rate for all weights"),
        ({"optimizer": "muon"}, "distft has adamw_torch_fused, "),
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


# ---- LLaMA-Factory

LLAMA_FACTORY = {
    "model_name_or_path": "owner/model",
    "stage": "sft",
    "do_train": True,
    "dataset": "mine",
    "template": "llama3",
    "per_device_train_batch_size": 2,
}


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """dataset_info.json with a few data sets, in data/ above the file's folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "mine.json").write_text(json.dumps([{"instruction": "q", "input": "", "output": "a"}] * 5))
    info = {
        "mine": {"file_name": "mine.json"},
        "named": {"file_name": "mine.json", "columns": {"prompt": "q", "query": "c", "response": "a", "system": "s"}},
        "chats": {"hf_hub_url": "owner/chats", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
        "turns": {
            "hf_hub_url": "owner/turns",
            "subset": "en",
            "split": "test",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "tools": "functions"},
            "tags": {"role_tag": "role", "content_tag": "text", "user_tag": "me", "assistant_tag": "assistant"},
        },
        "pairs": {"hf_hub_url": "owner/pairs", "ranking": True, "columns": {"chosen": "c", "rejected": "r"}},
        "pictures": {"file_name": "mine.json", "columns": {"images": "images"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_llama_factory_defaults(imported: Import, described: Path) -> None:
    draft = imported(LLAMA_FACTORY)
    assert draft.fields == {
        "name": "config",
        "model.name_or_path": "owner/model",
        "lora.r": 8,
        "lora.lora_alpha": 16,
        "lora.lora_dropout": 0.0,
        "lora.target_modules": "all-linear",
        "data.train": "data/mine.json",
        "data.format": "alpaca",
        "data.max_length": 2048,
        "data.packing": False,
        "data.long_rows": "truncate",
        "training.global_batch_size": 16,
        "training.num_train_epochs": 3.0,
        "training.learning_rate": 5e-5,
        "training.lr_scheduler_type": "linear",
        "training.warmup_ratio": 0.0,
        "training.weight_decay": 0.0,
        "training.max_grad_norm": 1.0,
        "training.seed": 42,
        "training.optim": "adamw_torch_fused",
        "training.mixed_precision": "no",
        "checkpoint.save_steps": 500,
    }
    assert not draft.refused


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("named", {"columns": {"instruction": "q", "input": "c", "output": "a", "system": "s"}, "format": "alpaca"}),
        ("chats", {"train": "owner/chats", "format": "sharegpt"}),
        (
            "turns",
            {
                "train": [{"path": "owner/turns:test", "config": "en"}],
                "format": "messages",
                "columns": {"role": "role", "content": "text", "tools": "functions"},
                "roles": {"me": "user"},
            },
        ),
        ("mine, chats", {"train": ["data/mine.json", "owner/chats"], "format": "auto"}),
    ],
)
def test_llama_factory_data_sets(imported: Import, described: Path, names: str, expected: dict[str, Any]) -> None:
    draft = imported({**LLAMA_FACTORY, "dataset": names})
    found = {name.removeprefix("data."): value for name, value in draft.fields.items()}
    if "columns" in expected:  # role: role says nothing
        expected = expected | {"columns": {k: v for k, v in expected["columns"].items() if k != v}}
    assert {name: found.get(name) for name in expected} == expected
    assert not draft.refused


def test_llama_factory_options(imported: Import, described: Path) -> None:
    draft = imported(
        {
            **LLAMA_FACTORY,
            "finetuning_type": "lora",
            "lora_rank": 32,
            "lora_target": "q_proj,v_proj",
            "quantization_bit": 4,
            "dataset": "mine,chats",
            "max_samples": 3,
            "neat_packing": True,
            "mask_history": True,
            "val_size": 0.1,
            "gradient_accumulation_steps": 8,
            "num_train_epochs": 2,
            "lr_scheduler_type": "cosine_with_restarts",
            "warmup_ratio": 0.1,
            "bf16": True,
            "deepspeed": "examples/ds_z3_offload_config.json",
            "flash_attn": "fa2",
            "save_strategy": "epoch",
            "report_to": "none",
            "plot_loss": True,
        }
    )
    assert not draft.refused
    expected = {
        "lora.r": 32,
        "lora.lora_alpha": 64,
        "lora.target_modules": ["q_proj", "v_proj"],
        "model.quantization": "nf4",
        "data.train": [{"path": "data/mine.json", "rows": 3}, {"path": "owner/chats", "rows": 3}],
        "data.packing": True,
        "data.train_on": "last",
        "data.eval": 0.1,
        "training.global_batch_size": 128,
        "trainer.overrides.lr_scheduler_type": "cosine_with_restarts",
        "training.warmup_ratio": 0.1,
        "training.mixed_precision": "bf16",
        "parallelism.strategy": "zero3",
        "parallelism.offload": "optimizer",
    }
    assert {name: draft.fields.get(name) for name in expected} == expected
    assert "checkpoint.save_steps" not in draft.fields


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stage": "dpo"}, "stage"),
        ({"dataset": "pairs"}, "ranking"),
        ({"dataset": "pictures"}, "images"),
        ({"finetuning_type": "freeze"}, "finetuning_type"),
        ({"use_galore": True}, "use_galore"),
        ({"lora_ranks": 8}, "lora_ranks"),
        ({"eval_dataset": "turns"}, "eval_dataset"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_llama_factory_refuses(imported: Import, described: Path, options: dict[str, Any], expected: str) -> None:
    assert any(name.endswith(expected) for name in reasons(imported({**LLAMA_FACTORY, **options})))


def test_llama_factory_without_its_data_sets(imported: Import, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"dataset_dir: data/dataset_info.json is not here"):
        imported(LLAMA_FACTORY)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"mines": {"file_name": "x.json"}}')
    with pytest.raises(RecipeError, match=r'dataset: "mine" is not in dataset_info.json; did you mean mines\?'):
        imported(LLAMA_FACTORY)
    assert imported({**LLAMA_FACTORY, "dataset_dir": "ONLINE", "dataset": "o/n"}).fields["data.train"] == "o/n"


# ---- the command


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["import", *arguments])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command(here: Path) -> None:
    (here / "in").mkdir()
    (here / "in" / "rows.jsonl").write_text("")
    options = {**AXOLOTL, "datasets": [{"path": "rows.jsonl", "type": "chat_template"}], "tf32": False}
    (here / "in" / "chat.yml").write_text(yaml.safe_dump(options))
    status, out, error = run("in/chat.yml", "--gpus", "4", "-o", "recipe.yaml")
    assert status == 0, error
    assert out.endswith("wrote recipe.yaml\n")
    recipe = load_recipe("recipe.yaml")
    assert recipe.data.train == str(here / "in" / "rows.jsonl")  # relative to the recipe
    assert (recipe.name, recipe.training.global_batch_size, recipe.lora) == ("chat", 4, None)
    assert Path("recipe.yaml").read_text().startswith("# Imported from axolotl's chat.yml, --gpus 4\nname: chat\n")
    status, _, error = run("in/chat.yml", "--gpus", "4")
    assert (status, error) == (2, "error: recipe.yaml: already exists; name another file, or remove it\n")


def test_refused_options_write_nothing(here: Path) -> None:
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "relora": True, "model_config": {"a": "b\nc"}}))
    status, out, error = run("x.yml", "--gpus", "1")
    assert status == 2
    assert "relora: true" in out
    assert "x.yml: 2 options cannot be trained the same way, so nothing was written" in error
    assert not Path("recipe.yaml").exists()
    status, _, _ = run("x.yml", "--gpus", "1", "--partial")
    assert status == 0
    head = Path("recipe.yaml").read_text().splitlines()[:4]
    assert head[1] == "# Not the same training: this recipe lacks"
    assert load_recipe("recipe.yaml").model.name_or_path == "owner/model"
    assert all(line.startswith("#") for line in head)


def test_a_part_that_is_no_recipe_is_not_written(here: Path) -> None:
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "rl": "dpo"}))  # its data sets are not those of examples
    status, _, error = run("x.yml", "--gpus", "1", "--partial")
    assert status == 2
    assert "data.train: missing, need a string" in error
    assert not Path("recipe.yaml").exists()


def test_json(here: Path) -> None:
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "wandb_project": "p", "relora": True}))
    status, out, error = run("x.yml", "--gpus", "2", "--json")
    found = json.loads(out)
    assert status == 2
    assert "nothing was written" in error
    assert set(found) == {"kind", "recipe", "mapped", "dropped", "refused", "warnings", "written"}
    assert found["recipe"]["training"]["global_batch_size"] == 2
    assert [item["option"] for item in found["refused"]] == ["relora"]
    assert found["mapped"][0] == {
        "option": "base_model", "value": "owner/model", "field": "model.name_or_path", "to": "owner/model", "line": 1,
    }  # fmt: skip
    assert found["written"] == []


def test_standard_output(here: Path) -> None:
    (here / "x.yml").write_text(yaml.safe_dump(AXOLOTL))
    status, out, error = run("x.yml", "--gpus", "2", "-o", "-")
    assert status == 0
    assert yaml.safe_load(out)["data"]["train"] == "owner/rows"
    assert "learning_rate: 0.0001" in error
    assert not list(here.glob("recipe*"))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_width(here: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    long = {**AXOLOTL, "optim_args": {"a": "x" * 300}, "chat_template": "cohere", "relora": True}
    (here / "x.yml").write_text(yaml.safe_dump(long))
    _, out, error = run("x.yml", "--gpus", "2")
    assert all(len(line) <= width for line in out.splitlines())
    assert all(len(line) <= width for line in error.splitlines() if line.startswith("warning"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty, need a mapping of keys to values (x.yml:1)"),
        (b"- a\n- b\n", "got a list, need a mapping"),
        (b"just text", 'got "just text", need a mapping'),
        (b"a: [1, 2", "not valid YAML: "),
        (b"\x00\x01\xff\xfe", "not a text file in UTF-8"),
        (b"base_model: a\nbase_model: b\n", "base_model: given twice, first in line 1 (x.yml:2)"),
        (b"base_model: !!python/object:os.system x\n", "cannot read"),
        (b"base_model: &a [*a]\n", "an alias inside its own anchor"),
        (b"# " + b"x" * 300_000, "cannot read x.yml: larger than 256 KiB"),
        (b"a: 1\nb: 2\n", "x.yml: not a training file of axolotl, LLaMA-Factory, TRL, torchtune or accelerate"),
        (b"model: o/m\ntrain_dataset: x.yaml\n", "a file of LLaMA-Factory's v1 trainer, which is not read"),
        (b"base_model: 3\nlearning_rate: fast\n", "base_model: got 3 (an integer), need a string (x.yml:1)"),
        (b"base_model: o/m\nlearning_rate: 1\ndatasets: x\n", 'datasets: got "x" (a string), need a list of mappings'),
    ],
)
def test_bad_files(here: Path, content: bytes, expected: str) -> None:
    (here / "x.yml").write_bytes(content)
    status, _, error = run("x.yml", "--gpus", "2")
    assert status == 2
    assert expected in error
    assert not (here / "recipe.yaml").exists()


def test_what_is_missing(here: Path) -> None:
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "micro_batch_size": 2, "gradient_accumulation_steps": 4}))
    status, _, error = run("x.yml")
    assert status == 2
    assert error == (
        "error: --gpus is missing: x.yml says micro_batch_size 2 x gradient_accumulation_steps 4 for each GPU, and not "
        "on how many it was used; with --gpus N, training.global_batch_size is 8 x N\n"
    )
    assert "cannot read none.yml: no such file" in run("none.yml")[2]
    assert "No such option" in run("x.yml", "--gpu", "2")[2]
    assert "cannot be written" in run("x.yml", "--gpus", "1", "-o", "no/folder/r.yaml")[2]
    assert (
        "--cluster-out: axolotl's file says nothing of the machines"
        in run("x.yml", "--gpus", "1", "--cluster-out", "c.yaml")[2]
    )
    assert "need a multiple of 2 (tensor_parallel_size 2)" in _three_gpus(here)


def _three_gpus(here: Path) -> str:
    (here / "t.yml").write_text(yaml.safe_dump({**AXOLOTL, "tensor_parallel_size": 2}))
    return run("t.yml", "--gpus", "3")[2]


def test_absolute_and_absent_models(here: Path) -> None:
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "base_model": "/nowhere/model"}))
    status, _, error = run("x.yml", "--gpus", "1")
    assert status == 0
    assert "warning: model.name_or_path: /nowhere/model is not on this machine" in error
    assert yaml.safe_load(Path("recipe.yaml").read_text())["model"]["name_or_path"] == "/nowhere/model"


CONVERSATION = [
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Yes\n"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
]
# Written by hand from axolotl's templates of these names; «» marks what is trained.
RENDERED = {
    "chatml": (
        "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n«Yes\n<|im_end|>»\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n"
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«b<|eot_id|>»"
    ),
    "gemma": (
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Yes<end_of_turn>»\n"
        "<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n«b<end_of_turn>»\n"
    ),
    "phi_3": (
        "<s><|user|>\nHi <|end|>\n<|assistant|>\n«Yes\n<|end|>»\n<|user|>\na<|end|>\n<|assistant|>\n«b<|end|>»\n"
    ),
}


def test_templates(here: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    folder = Path(importers.__file__).parent / "templates"
    assert {path.stem for path in folder.iterdir()} == set(RENDERED)
    for name, expected in RENDERED.items():
        options = {**AXOLOTL, "chat_template": name, "warmup_ratio": 0.1}
        (here / f"{name}.yml").write_text(yaml.safe_dump(options))
        status, _, error = run(f"{name}.yml", "--gpus", "1", "-o", f"{name}.yaml")
        assert (status, error) == (0, "")
        template = Path(load_recipe(f"{name}.yaml").data.chat_template or "")
        assert template == here / f"{name}.jinja"
        rendered, spans = render_jinja_template(
            conversations=[CONVERSATION],
            chat_template=template.read_text(),
            return_assistant_tokens_mask=True,
            bos_token="<s>",
            eos_token="</s>",
        )
        text = rendered[0]
        for start, end in reversed(spans[0]):
            text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
        assert text == expected, name
    assert run("chatml.yml", "--gpus", "1", "-o", "again.yaml")[0] == 0  # the same template is there already
    Path("chatml.jinja").write_text("mine")
    assert "chatml.jinja: already exists" in run("chatml.yml", "--gpus", "1", "-o", "once-more.yaml")[2]
    assert not Path("once-more.yaml").exists()


def test_inline_template(here: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "chat_template": "jinja", "chat_template_jinja": template}))
    status, _, error = run("x.yml", "--gpus", "1")
    assert status == 0, error
    assert Path("x.jinja").read_text() == template
    assert load_recipe("recipe.yaml").data.chat_template == str(here / "x.jinja")


def test_start_up_is_light(here: Path) -> None:
    (here / "x.yml").write_text(yaml.safe_dump(AXOLOTL))
    command = [sys.executable, "-X", "importtime", "-m", "distft", "import", "x.yml", "--gpus", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "distft.importers.axolotl" in loaded
    assert not loaded & {"torch", "transformers", "importlib.metadata", "rich", "jinja2", "distft.planner.plan"}


# ---- TRL

TRL = {"model_name_or_path": "owner/model", "dataset_name": "owner/rows", "per_device_train_batch_size": 4}


def test_trl_defaults(imported: Import) -> None:
    draft = imported(TRL)
    assert draft.kind == "TRL"
    assert draft.fields == {
        "name": "config",
        "model.name_or_path": "owner/model",
        "lora": None,
        "data.train": "owner/rows",
        "data.train_on": "everything",
        "data.max_length": 1024,
        "data.packing": False,
        "data.long_rows": "truncate",
        "training.global_batch_size": 32,
        "training.num_train_epochs": 3.0,
        "training.learning_rate": 2e-5,
        "training.lr_scheduler_type": "linear",
        "training.warmup_ratio": 0.0,
        "training.weight_decay": 0.0,
        "training.max_grad_norm": 1.0,
        "training.seed": 42,
        "training.optim": "adamw_torch_fused",
        "training.mixed_precision": "bf16",
        "checkpoint.save_steps": 500,
    }


def test_trl_options(imported: Import) -> None:
    draft = imported(
        {
            **TRL,
            "dataset_config": "en",
            "dataset_train_split": "train[:1000]",
            "eval_strategy": "steps",
            "eval_steps": 100,
            "use_peft": True,
            "lora_target_modules": "all-linear",
            "load_in_4bit": True,
            "use_bnb_nested_quant": True,
            "assistant_only_loss": True,
            "packing": True,
            "max_length": 4096,
            "gradient_accumulation_steps": 2,
            "learning_rate": "2e-4",
            "warmup_steps": 50,
            "fp16": True,
            "gradient_checkpointing": True,
            "report_to": ["wandb"],
            "adam_beta2": 0.98,
            "logging_steps": 25,
        }
    )
    expected = {
        "data.train": [{"path": "owner/rows", "config": "en", "rows": 1000}],
        "data.eval": [{"path": "owner/rows:test", "config": "en"}],
        "data.train_on": "all",
        "data.packing": True,
        "data.max_length": 4096,
        "lora.r": 16,
        "lora.lora_alpha": 32,
        "lora.lora_dropout": 0.05,
        "lora.target_modules": "all-linear",
        "model.quantization": "nf4",
        "training.global_batch_size": 64,
        "training.learning_rate": 2e-4,
        "training.warmup_steps": 50,
        "training.mixed_precision": "fp16",
        "training.eval_steps": 100,
        "training.report_to": ["wandb"],
        "trainer.overrides.adam_beta2": 0.98,
    }
    assert {name: draft.fields.get(name) for name in expected} == expected
    assert "training.warmup_ratio" not in draft.fields
    assert not draft.refused


def test_trl_mixture(imported: Import) -> None:
    two = [{"path": "owner/a", "fraction": 0.75}, {"path": "owner/b", "split": "test", "fraction": 0.25}]
    draft = imported({"model_name_or_path": "owner/model", "datasets": two, "test_split_size": 0.1})
    assert draft.fields["data.train"] == [
        {"path": "owner/a", "weight": 0.75},
        {"path": "owner/b:test", "weight": 0.25},
    ]
    assert draft.fields["data.eval"] == 0.1
    assert draft.fields["training.global_batch_size"] == 64  # 8 a GPU by default


SCRIPT = """\
#!/bin/bash
MODEL=owner/model   # which
export OUT="$HOME/out"
echo "training $MODEL"
accelerate launch --num_processes 4 --mixed_precision bf16 \\
    trl/scripts/sft.py \\
    --model_name_or_path $MODEL --dataset_name=owner/rows \\
    --use_peft --lora_target_modules q_proj v_proj --no_bf16 \\
    --learning_rate 1e-4 --warmup-ratio 0.1 "$@"
"""


def test_command_lines(here: Path) -> None:
    (here / "train.sh").write_text(SCRIPT)
    draft = read_file(here / "train.sh", here)
    assert not draft.refused
    assert draft.fields["name"] == "train"
    assert draft.fields["training.global_batch_size"] == 32  # of --num_processes 4
    assert draft.fields["lora.target_modules"] == ["q_proj", "v_proj"]
    assert draft.fields["training.learning_rate"] == 1e-4
    assert draft.fields["training.warmup_ratio"] == 0.1
    assert draft.fields["training.mixed_precision"] == "no"
    (here / "sft.yaml").write_text(yaml.safe_dump({**TRL, "learning_rate": 1e-5}))
    (here / "fsdp.yaml").write_text(yaml.safe_dump(ACCELERATE))
    words = [
        "-o",
        "-",
        "--",
        "trl",
        "sft",
        "--config",
        "sft.yaml",
        "--accelerate_config",
        "fsdp.yaml",
        "--learning_rate",
        "3e-5",
    ]
    status, out, error = run(*words)
    assert status == 0, error
    recipe = yaml.safe_load(out)
    assert recipe["training"]["learning_rate"] == 3e-5  # the command line wins
    assert recipe["training"]["global_batch_size"] == 4 * 16
    assert recipe["parallelism"] == {"strategy": "fsdp", "offload": "none"}


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo hello\n", "no command in it runs `trl sft` or a script sft.py"),
        ("trl sft --a b\ntrl sft --a c\n", "2 commands in it train; give one after --"),
        ("trl sft --model_name_or_path $(cat x)\n", "$(cat has a value only when it runs; write the value"),
        ("trl sft --model_name_or_path $NAME/x\n", "$NAME/x has a value only when it runs; write the value"),
        ("trl sft extra --a b\n", "extra belongs to no option"),
        ("trl sft --learning_rate 1\n", "model_name_or_path is missing (train.sh)"),
        ("trl sft --model_name_or_path o/m --dataset_name o/d --lerning_rate 1\n", "did you mean learning_rate?"),
        ("trl sft --config none.yaml\n", "--config: no such file: none.yaml"),
    ],
)
def test_bad_command_lines(here: Path, script: str, expected: str) -> None:
    (here / "train.sh").write_text(script)
    status, out, error = run("train.sh", "--gpus", "1")
    assert status == 2
    assert expected in " ".join((out + error).split())
    assert run("--", "python", "other.py", "--x")[2].startswith(
        "error: command: not a command that trains; need `trl sft"
    )


# ---- torchtune

TORCHTUNE = """\
output_dir: /tmp/out
root: /tmp/models
model:
  _component_: torchtune.models.llama2.qlora_llama2_7b
  lora_attn_modules: [q_proj, v_proj, output_proj]
  apply_lora_to_mlp: True
  lora_rank: 16
tokenizer:
  _component_: torchtune.models.llama2.llama2_tokenizer
  path: ${root}/tokenizer.model
  max_seq_len: 1024
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: ${root}/llama/
  checkpoint_files: [a.safetensors]
  model_type: LLAMA2
  output_dir: ${output_dir}/x
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: True
  split: train[:90%]
dataset_val:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  split: train[90%:]
run_val_every_n_steps: 25
seed: null
shuffle: True
batch_size: 2
batch_size_val: ${batch_size}
gradient_accumulation_steps: 8
epochs: 2
max_steps_per_epoch: 100
optimizer: {_component_: torch.optim.AdamW, fused: True, lr: 3e-4}
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
clip_grad_norm: null
compile: False
metric_logger: {_component_: torchtune.training.metric_logging.WandBLogger, project: x}
device: cuda
dtype: bf16
enable_activation_checkpointing: True
"""


def test_torchtune(here: Path) -> None:
    (here / "7B_qlora.yaml").write_text(TORCHTUNE)
    draft = read_file(here / "7B_qlora.yaml", here, 4)
    assert (draft.problems, draft.refused) == ([], [])
    draft.check()
    assert draft.fields == {
        "name": "7B_qlora",
        "model.name_or_path": "/tmp/models/llama",
        "model.quantization": "nf4",
        "lora.r": 16,
        "lora.lora_alpha": 16,
        "lora.lora_dropout": 0.0,
        "lora.target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "data.train": "yahma/alpaca-cleaned",
        "data.eval": 0.1,
        "data.format": "alpaca_prompt",
        "data.train_on": "everything",  # train_on_input is true by default
        "data.max_length": 1024,
        "data.packing": True,
        "data.long_rows": "truncate",
        "training.global_batch_size": 64,
        "training.max_steps": 200,
        "training.learning_rate": 3e-4,
        "training.lr_scheduler_type": "cosine",
        "training.warmup_steps": 100,
        "training.weight_decay": 0.01,  # torch's default
        "training.max_grad_norm": 0.0,  # no clipping
        "training.optim": "adamw_torch_fused",
        "training.mixed_precision": "bf16",
        "training.gradient_checkpointing": True,
        "training.eval_steps": 25,
        "training.seed": 42,
        "training.report_to": ["wandb"],
        "output_dir": "/tmp/out",
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"tokenizer": {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "x"}},
            {"data.format": "alpaca_chat", "data.max_length": 2048, "data.long_rows": "error"},
        ),
        ({"lr_scheduler": None}, {"training.lr_scheduler_type": "constant", "training.warmup_steps": None}),
        ({"max_steps_per_epoch": None}, {"training.num_train_epochs": 2, "training.max_steps": None}),
        ({"model": {"_component_": "torchtune.models.llama2.llama2_7b"}}, {"lora": None, "model.quantization": None}),
        ({"fsdp_cpu_offload": True}, {"parallelism.strategy": "fsdp", "parallelism.offload": "all"}),
        ({"tensor_parallel_dim": 2}, {"training.global_batch_size": 32}),
        (
            {"optimizer": {"_component_": "bitsandbytes.optim.PagedAdamW8bit", "lr": 1e-4, "weight_decay": 0}},
            {"training.optim": "paged_adamw_8bit", "training.weight_decay": 0.0},
        ),
        (
            {
                "dataset": {
                    "_component_": "torchtune.datasets.chat_dataset",
                    "source": "owner/chats",
                    "conversation_column": "dialog",
                    "conversation_style": "openai",
                },
                "dataset_val": None,
            },
            {
                "data.format": "messages",
                "data.columns": {"messages": "dialog"},
                "data.train": "owner/chats",
                "data.train_on": None,
            },
        ),
        (
            {
                "dataset": {
                    "_component_": "torchtune.datasets.text_completion_dataset",
                    "source": "json",
                    "data_files": "rows.jsonl",
                    "column": "story",
                },
                "dataset_val": None,
            },
            {"data.format": "text", "data.columns": {"text": "story"}, "data.train": "rows.jsonl"},
        ),
    ],
)
def test_torchtune_options(here: Path, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    (here / "rows.jsonl").write_text("")
    (here / "x.yaml").write_text(yaml.safe_dump(yaml.safe_load(TORCHTUNE) | changes))
    draft = read_file(here / "x.yaml", here, 4)
    assert (draft.problems, draft.refused) == ([], [])
    draft.check()
    assert {name: draft.fields.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"quantizer": {"_component_": "torchtune.training.quantization.Int8"}}, "quantizer"),
        ({"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}}, "loss"),
        ({"dataset": {"_component_": "torchtune.datasets.stack_exchange_paired_dataset"}}, "dataset._component_"),
        ({"optimizer": {"_component_": "torch.optim.SGD", "lr": 1}}, "optimizer._component_"),
        ({"epohcs": 3}, "epohcs"),
    ],
)
def test_torchtune_refuses(here: Path, changes: dict[str, Any], expected: str) -> None:
    (here / "x.yaml").write_text(yaml.safe_dump(yaml.safe_load(TORCHTUNE) | changes))
    assert expected in reasons(read_file(here / "x.yaml", here, 4))


@pytest.mark.parametrize(
    "text", ["output_dir: ${nothing}", "output_dir: ${root}\nroot: ${output_dir}", "root: '${eval:1}'"]
)
def test_references_that_cannot_be_resolved(here: Path, text: str) -> None:
    given = yaml.safe_load(text)
    (here / "x.yaml").write_text(yaml.safe_dump(yaml.safe_load(TORCHTUNE) | given))
    assert any("cannot resolve" in problem for problem in read_file(here / "x.yaml", here, 4).problems)


# ---- accelerate

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
