"""LLaMA-Factory's files and their dataset_info.json: the recipe, computed by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_server import SECOND, served
from importing import Import, reasons
from running import distft

from distft.errors import RecipeError
from distft.models.freezing import named

UP_TO_11 = f"(?:{'|'.join(map(str, range(1, 12)))})"
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
        ("turns, mine", {"format": "auto", "columns": None, "roles": {"me": "user"}}),
    ],
)
def test_llama_factory_data_sets(imported: Import, described: Path, names: str, expected: dict[str, Any]) -> None:
    draft = imported({**LLAMA_FACTORY, "dataset": names})
    found = {name.removeprefix("data."): value for name, value in draft.fields.items()}
    if expected.get("columns"):  # role: role says nothing
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
        "data.packing": "auto",
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
    [limit] = [left.why for left in draft.dropped if left.option == "max_samples"]
    assert limit == "data.train takes 3 rows of each data set that may have more (rows: 3)"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stage": "dpo"}, "stage"),
        ({"dataset": "pairs"}, "ranking"),
        ({"dataset": "pictures"}, "images"),
        ({"finetuning_type": "freeze", "use_llama_pro": True}, "use_llama_pro"),
        ({"finetuning_type": "galore"}, "finetuning_type"),
        ({"use_eaft_loss": True, "eaft_alpha": 2}, "eaft_alpha"),
        ({"use_muon": True}, "use_muon"),
        ({"use_galore": True}, "use_galore"),
        ({"finetuning_type": "full", "use_galore": True, "optim": "adamw_8bit"}, "optim"),
        ({"finetuning_type": "full", "use_galore": True, "galore_proj_type": "left"}, "galore_proj_type"),
        ({"finetuning_type": "full", "use_apollo": True, "apollo_proj": "svd"}, "apollo_proj"),
        ({"finetuning_type": "full", "use_apollo": True, "apollo_scale_front": True}, "apollo_scale_front"),
        ({"lora_ranks": 8}, "lora_ranks"),
        ({"eval_dataset": "named"}, "named.formatting"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_llama_factory_refuses(imported: Import, described: Path, options: dict[str, Any], expected: str) -> None:
    assert any(name.endswith(expected) for name in reasons(imported({**LLAMA_FACTORY, **options})))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_dft_loss": True, "use_eaft_loss": True}, "dft"),
        ({"use_eaft_loss": True, "eaft_alpha": 1.0}, "eaft"),
        ({"use_dft_loss": False, "eaft_alpha": 2.0}, None),
    ],
)
def test_losses(imported: Import, described: Path, options: dict[str, Any], expected: str | None) -> None:
    draft = imported({**LLAMA_FACTORY, **options})
    assert (draft.fields.get("training.loss_type"), draft.refused) == (expected, [])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_galore": True}, {"optim": "galore_adamw", "rank": 16, "update_proj_gap": 200, "scale": 2.0}),
        (
            {"use_apollo": True, "apollo_rank": 1, "apollo_scale": 128, "apollo_scale_type": "tensor"},
            {"optim": "apollo_adamw", "rank": 1, "update_proj_gap": 200, "scale": 128.0, "scale_type": "tensor"},
        ),
        (
            {
                "use_galore": True,
                "galore_target": "mlp,self_attn",
                "galore_update_interval": 50,
                "galore_layerwise": True,
            },
            {"rank": 16, "update_proj_gap": 50, "optim_target_modules": ["mlp", "self_attn"], "max_grad_norm": 0.0},
        ),
    ],
    ids=["galore", "apollo-mini", "layerwise"],
)
def test_low_rank(imported: Import, described: Path, options: dict[str, Any], expected: dict[str, Any]) -> None:
    draft = imported({**LLAMA_FACTORY, "finetuning_type": "full", **options}, gpus=4)
    assert draft.refused == []
    names = {name.rpartition(".")[2]: value for name, value in draft.fields.items() if name.startswith("training.")}
    assert names | expected == names
    draft.check()
    single = [text for text in draft.warnings if "galore_layerwise runs on one GPU" in text]
    assert len(single) == ("galore_layerwise" in options)


@pytest.mark.parametrize(
    ("options", "masters", "said"),
    [
        ({"finetuning_type": "full"}, "none", "Kahan summation"),
        ({"finetuning_type": "full", "optim": "adafactor"}, None, "distft's are float32 for adafactor"),
        ({"finetuning_type": "full", "deepspeed": {"zero_optimization": {"stage": 3}}}, None, "DeepSpeed's master"),
        ({"finetuning_type": "lora"}, None, ""),
    ],
)
def test_pure_bf16(imported: Import, described: Path, options: dict[str, Any], masters: str | None, said: str) -> None:
    draft = imported({**LLAMA_FACTORY, **options, "pure_bf16": True}, gpus=4)
    assert draft.fields.get("training.master_weights") == masters
    assert draft.fields["training.mixed_precision"] == "bf16"
    found = [text for text in draft.warnings if text.startswith("pure_bf16: ")]
    assert said in found[0] if said else not found
    draft.check()


def test_muon(imported: Import, described: Path) -> None:
    draft = imported({**LLAMA_FACTORY, "finetuning_type": "full", "use_muon": True, "weight_decay": 0.1})
    assert (draft.fields["training.optim"], draft.refused) == ("muon", [])
    assert any("lets norms decay" in text for text in draft.warnings)


@pytest.mark.parametrize(
    ("options", "patterns"),
    [
        ({}, [r".*\.-[12]"]),
        (
            {"freeze_trainable_layers": 1, "freeze_extra_modules": "lm_head,norm"},
            [r".*\.-1", ".*lm_head.*", ".*norm.*"],
        ),
        ({"freeze_trainable_layers": -3, "freeze_trainable_modules": "all"}, [r".*\.[012]"]),
        ({"freeze_trainable_layers": 11, "freeze_trainable_modules": "mlp"}, [rf".*\.-{UP_TO_11}\.(?:mlp).*"]),
        ({"freeze_trainable_layers": 3, "use_llama_pro": True, "model_name_or_path": "pro"}, [r".*\.(?:3|7|11)"]),
    ],
)
def test_frozen_layers(
    imported: Import, described: Path, tmp_path: Path, options: dict[str, Any], patterns: list[str]
) -> None:
    """The parameters that LLaMA-Factory would train (model/adapter.py, _setup_freeze_tuning) are computed here."""
    (tmp_path / "pro").mkdir()
    (tmp_path / "pro" / "config.json").write_text('{"num_hidden_layers": 12}')
    draft = imported({**LLAMA_FACTORY, "finetuning_type": "freeze", **options})
    assert (draft.fields["training.train_only"], draft.fields["lora"], draft.refused) == (patterns, None, [])
    count, stride = options.get("freeze_trainable_layers", 2), 4
    layers = range(12 - count, 12) if count > 0 else range(-count)
    if options.get("use_llama_pro"):
        layers = range(stride - 1, 12 + stride - 1, stride)
    module = options.get("freeze_trainable_modules", "all").replace("all", "")
    parts = [f".{n}.{module}" for n in layers] + options.get("freeze_extra_modules", "").split(",")
    names = [f"model.layers.{n}.{part}.weight" for n in range(12) for part in ("mlp.up", "attn.q", "post_norm")]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert named(names, patterns) == {name for name in names if any(part and part in name for part in parts)}


def test_llama_factory_without_its_data_sets(imported: Import, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"dataset_dir: data/dataset_info.json is not here"):
        imported(LLAMA_FACTORY)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"mines": {"file_name": "x.json"}}')
    with pytest.raises(RecipeError, match=r'dataset: "mine" is not in dataset_info.json; did you mean mines\?'):
        imported(LLAMA_FACTORY)
    assert imported({**LLAMA_FACTORY, "dataset_dir": "ONLINE", "dataset": "o/n"}).fields["data.train"] == "o/n"


def test_llama_factory_descriptions_on_the_hub(tmp_path: Path) -> None:
    options = {**LLAMA_FACTORY, "dataset_dir": "REMOTE:owner/name"}
    (tmp_path / "theirs.yaml").write_text(json.dumps(options))
    info = json.dumps({"mine": {"hf_hub_url": "owner/rows"}}).encode()
    with served({SECOND: {"dataset_info.json": info}}) as hub:

        def done(offline: bool) -> str:
            env = hub.environment(tmp_path / "cache", offline=offline)
            found = distft("import", "theirs.yaml", "--gpus", "1", cwd=tmp_path, env=env).stdout
            return found.replace("\n" + 34 * " ", " ")

        assert "dataset_info.json of owner/name cannot be had from the hub here" in done(offline=True)
        for offline in (False, True):  # the second time from the cache
            assert "train: owner/rows" in done(offline)


def test_llama_factory_experts_on_the_host(imported: Import, described: Path) -> None:
    draft = imported({**LLAMA_FACTORY, "use_kt": True, "kt_weight_path": "x", "kt_non_expert_weight_path": "y"})
    assert not draft.refused
    assert {"use_kt", "kt_weight_path", "kt_non_expert_weight_path"} <= {item.option for item in draft.dropped}
    assert any(text.startswith("kt_weight_path: these are quantized experts") for text in draft.warnings)


def test_oft(imported: Import, described: Path) -> None:
    given = {**LLAMA_FACTORY, "finetuning_type": "oft", "oft_block_size": 32, "oft_target": "all", "lora_rank": 8}
    draft = imported({**given, "module_dropout": 0.1, "additional_target": "lm_head"})
    assert not draft.refused
    lora = {name: value for name, value in draft.fields.items() if name.startswith("lora")}
    assert lora == {
        "lora.oft.oft_block_size": 32,
        "lora.target_modules": "all-linear",
        "lora.modules_to_save": ["lm_head"],
    }
    dropped = {item.option: item.why for item in draft.dropped}
    assert dropped["lora_rank"] == "finetuning_type is oft"
    assert dropped["module_dropout"].startswith("peft keeps it, and drops nothing")
    blocks = imported({**given, "oft_rank": 4, "oft_block_size": 0})
    assert blocks.fields["lora.oft.r"] == 4
    assert "lora.oft.oft_block_size" not in blocks.fields
    plain = imported({**LLAMA_FACTORY, "finetuning_type": "oft"})
    assert (plain.fields["lora.oft.oft_block_size"], plain.refused) == (32, [])
    other = imported({**given, "oft_target": "q_proj,v_proj"})
    assert reasons(other) == {
        "oft_target": "LLaMA-Factory does not read it, and trains adapters on lora_target (all): make them equal"
    }
    with pytest.raises(RecipeError, match=r"oft_rank: peft takes it with oft_block_size: 0"):
        imported({**given, "oft_rank": 4})
    unused = imported({**LLAMA_FACTORY, "finetuning_type": "lora", "oft_block_size": 32})
    assert [item.option for item in unused.dropped if "oft" in item.option] == ["oft_block_size"]


def test_variants_of_lora(imported: Import, described: Path) -> None:
    given = {"pissa_init": True, "pissa_convert": True, "loraplus_lr_ratio": 16.0, "additional_target": "lm_head,norm"}
    draft = imported({**LLAMA_FACTORY, "finetuning_type": "lora", **given})
    names = ("init_lora_weights", "loraplus_lr_ratio", "modules_to_save")
    assert not draft.refused
    assert [draft.fields[f"lora.{name}"] for name in names] == ["pissa_niter_16", 16.0, ["lm_head", "norm"]]
    assert [item.option for item in draft.dropped if "pissa" in item.option] == ["pissa_convert"]
    plain = imported({**LLAMA_FACTORY, "finetuning_type": "lora", **given, "pissa_iter": -1})
    assert plain.fields["lora.init_lora_weights"] == "pissa"
