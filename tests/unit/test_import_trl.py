"""TRL's arguments, in YAML, on a command line and in a script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from importing import ACCELERATE, Import, reasons, run

from distft.importers.kinds import read_command, read_file

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


@pytest.mark.parametrize(
    ("options", "masters", "said"),
    [
        ({"dtype": "bfloat16"}, "none", "Kahan summation"),
        ({"torch_dtype": "bfloat16", "optim": "adafactor"}, None, "distft's are float32 for adafactor"),
        ({"dtype": "auto"}, None, "in the base's dtype"),
        ({"dtype": "float32"}, None, ""),
        ({"dtype": "bfloat16", "fsdp": "full_shard"}, None, ""),  # accelerate makes it float32
        ({"dtype": "bfloat16", "use_peft": True, "lora_target_modules": "all-linear"}, None, ""),
    ],
)
def test_the_dtype_that_a_model_is_loaded_in(
    imported: Import, options: dict[str, Any], masters: str | None, said: str
) -> None:
    draft = imported({**TRL, **options})
    assert draft.fields.get("training.master_weights") == masters
    found = [text for text in draft.warnings if "dtype: " in text]
    assert said in found[0] if said else not found


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
            "activation_offloading": True,
            "report_to": ["wandb"],
            "adam_beta2": 0.98,
            "logging_steps": 25,
        }
    )
    expected = {
        "data.train": [{"path": "owner/rows", "config": "en", "rows": 1000}],
        "data.eval": [{"path": "owner/rows:test", "config": "en"}],
        "data.train_on": "all",
        "data.packing": "auto",
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
        "training.activation_offloading": True,
        "training.eval_steps": 100,
        "training.report_to": ["wandb"],
        "trainer.overrides.adam_beta2": 0.98,
    }
    assert {name: draft.fields.get(name) for name in expected} == expected
    assert "training.warmup_ratio" not in draft.fields
    assert not draft.refused


def test_losses(imported: Import) -> None:
    found = {kind: imported({**TRL, "loss_type": kind}) for kind in ("nll", "chunked_nll", "dft", "other")}
    assert [draft.fields.get("training.loss_type") for draft in found.values()] == [None, None, "dft", None]
    assert [list(reasons(draft)) for draft in found.values()] == [[], [], [], ["loss_type"]]


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
        (
            "trl sft --a b \\\n  # --packing \\\n  --learning_rate 1\n",
            "a line begins with --learning_rate, and the command",
        ),
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


def test_low_rank_optimizers(imported: Import) -> None:
    """trainer_optimizer.py: no weight decay, and an epsilon of its own."""
    given = {"optim": "galore_adamw", "optim_target_modules": ["attn", "mlp"], "weight_decay": 0.1}
    draft = imported({**TRL, **given, "use_peft": False, "optim_args": "rank=64, update_proj_gap=100, scale=0.10"})
    assert draft.refused == []
    assert {name: value for name, value in draft.fields.items() if "optim" in name or "epsilon" in name} == {
        "training.optim": "galore_adamw",
        "training.optim_args.rank": 64,
        "training.optim_args.update_proj_gap": 100,
        "training.optim_args.scale": 0.1,
        "training.optim_target_modules": ["attn", "mlp"],
        "trainer.overrides.adam_epsilon": 1e-6,
    }
    assert draft.fields["training.weight_decay"] == 0.0
    assert any(text.startswith("training.weight_decay: 0, as transformers") for text in draft.warnings)
    for changed in ({"optim_args": "proj_type=left"}, {"optim_target_modules": r".*\\.mlp\\..*"}):
        assert reasons(imported({**TRL, **given, "use_peft": False, **changed}))


MODEL_AND_DATA = "--model_name_or_path owner/model --dataset_name owner/rows"


@pytest.mark.parametrize("option", ["torch_compile True", "torch_compile_mode default", "dynamo_backend inductor"])
def test_torch_compile(here: Path, option: str) -> None:
    (here / "train.sh").write_text(f"accelerate launch --num_processes 2 sft.py {MODEL_AND_DATA} --{option}\n")
    assert read_file(here / "train.sh", here, None).fields["training.compile"] is True


@pytest.mark.parametrize(
    ("command", "gpus"),
    [
        (f"CUDA_VISIBLE_DEVICES=0,1 trl sft {MODEL_AND_DATA} --num_processes 2", 2),
        (f"nohup uv run --with trl trl sft {MODEL_AND_DATA} --num_processes 3 > log.txt 2>&1 &", 3),
        (f"cd /x && trl sft {MODEL_AND_DATA} --num_processes 3 --packing 2>&1 | tee log.txt; echo done", 3),
        (f"accelerate launch --num_processes 4 -m trl.scripts.sft {MODEL_AND_DATA}  # it's quick", 4),
        (f"deepspeed --num_nodes 2 --num_gpus 8 --master_port 29500 sft.py {MODEL_AND_DATA}", 16),
        (f"torchrun --nnodes=2 --nproc-per-node=8 sft.py {MODEL_AND_DATA} --deepspeed ''", 16),
        (f"trl sft {MODEL_AND_DATA} --accelerate_config zero3", 8),
        (f"trl sft {MODEL_AND_DATA} --accelerate_config single_gpu", 1),
    ],
)
def test_forms_of_a_command(here: Path, command: str, gpus: int) -> None:
    """Output that goes to a file, other commands of the line and what stands before a launcher are none of its
    options."""
    (here / "train.sh").write_text(command + "\n")
    draft = read_file(here / "train.sh", here)
    assert not draft.problems + draft.refused
    assert draft.fields["training.global_batch_size"] == 8 * gpus
    assert draft.fields["data.packing"] == ("auto" if "--packing" in command else False)


def test_options_of_the_launcher(here: Path) -> None:
    """They are accelerate's config, on a command line or among TRL's options; none is passed over."""
    given = "--use_deepspeed --zero_stage 3 --offload_param_device cpu --num_machines 2 --num_processes 16"
    expected = {"parallelism.strategy": "zero3", "parallelism.offload": "all", "training.global_batch_size": 128}
    for command in (
        f"srun --ntasks 2 accelerate launch {given} --mixed_precision fp16 sft.py {MODEL_AND_DATA}",
        f"trl sft {MODEL_AND_DATA} {given} --mixed_precision fp16",
    ):
        draft = read_command(command.split(), here)
        assert not draft.problems + draft.refused
        assert {name: draft.fields.get(name) for name in expected} == expected
        assert "mixed_precision" in {item.option for item in draft.dropped}
    data = {**TRL, "accelerate_config": "fsdp2", "num_processes": 2, "per_device_train_batch_size": 1}
    (here / "sft.yaml").write_text(yaml.safe_dump(data))
    draft = read_file(here / "sft.yaml", here)
    assert not draft.refused
    assert draft.fields["parallelism.strategy"] == "fsdp"
    assert draft.fields["training.global_batch_size"] == 2
    typo = read_command(f"accelerate launch --use_deepspeed --zero_stge 3 sft.py {MODEL_AND_DATA}".split(), here, 1)
    assert "deepspeed_config.zero_stge" in reasons(typo)
    unused = read_command(f"accelerate launch --zero_stage 3 sft.py {MODEL_AND_DATA}".split(), here, 1)
    assert "deepspeed_config" in {item.option for item in unused.dropped}
    assert "parallelism.strategy" not in unused.fields


def test_numbers_in_json(here: Path) -> None:
    words = f"trl sft {MODEL_AND_DATA} --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs".split()
    draft = read_command([*words, '{"min_lr": 1e-6}'], here, 1)
    assert draft.fields["trainer.overrides.lr_scheduler_kwargs"] == {"min_lr": 1e-6}
