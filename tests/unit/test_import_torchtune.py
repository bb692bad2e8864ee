"""torchtune's files: the recipe, computed by hand, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from importing import reasons

from distft.importers.kinds import read_file

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
enable_activation_offloading: True
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
        "data.packing": "auto",
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
        "training.activation_offloading": True,
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
        ({"compile": True}, {"training.compile": True}),
        ({"compile": {"model": False, "loss": True}}, {"training.compile": None}),
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


FULL = {"model": {"_component_": "torchtune.models.llama2.llama2_7b"}}
PAGED = {"_component_": "bitsandbytes.optim.PagedAdamW8bit", "lr": 1e-4}


@pytest.mark.parametrize(
    ("changes", "masters", "said"),
    [
        (FULL, "none", "Kahan summation"),
        ({**FULL, "fsdp_cpu_offload": True}, "none", "Kahan summation"),
        ({**FULL, "optimizer": PAGED}, None, "distft's are float32 for paged_adamw_8bit"),
        ({**FULL, "dtype": "fp16"}, None, "distft's are float32: more exact"),
        ({**FULL, "dtype": "fp32"}, None, ""),
        ({}, None, ""),  # LoRA
    ],
)
def test_torchtunes_weights_are_bf16(here: Path, changes: dict[str, Any], masters: str | None, said: str) -> None:
    (here / "x.yaml").write_text(yaml.safe_dump(yaml.safe_load(TORCHTUNE) | changes))
    draft = read_file(here / "x.yaml", here, 4)
    draft.check()
    assert draft.fields.get("training.master_weights") == masters
    found = [text for text in draft.warnings if text.startswith("dtype: ")]
    assert said in found[0] if said else not found


@pytest.mark.parametrize("gpus", [None, 1, 4])
@pytest.mark.parametrize(
    ("name", "comment", "who"),
    [
        ("x_single_device.yaml", "", "x_single_device.yaml is for a recipe of torchtune's on one GPU"),
        (
            "x.yaml",
            "# To launch on a single device:\n#   tune run lora_finetune_single_device --config x\n",
            "lora_finetune_single_device, which x.yaml is for, runs on one GPU",
        ),
        (
            "x.yaml",
            "# on one: 7B_lora_single_device.yaml\n#  tune run --nproc_per_node 2 lora_finetune_distributed\n",
            "",
        ),
    ],
    ids=["name", "comment", "neither"],
)
def test_a_single_device_recipe_names_its_world(
    here: Path, name: str, comment: str, who: str, gpus: int | None
) -> None:
    (here / name).write_text(comment + TORCHTUNE)
    draft = read_file(here / name, here, gpus)
    said = [text for text in draft.warnings if text.startswith("training.global_batch_size")]
    if who:
        assert (draft.fields["training.global_batch_size"], draft.problems) == (16, [])
        assert said == ([f"training.global_batch_size: 16, without --gpus 4: {who}"] if gpus == 4 else [])
    else:
        assert (draft.fields.get("training.global_batch_size"), len(draft.problems)) == (
            gpus and 16 * gpus,
            gpus is None,
        )
        assert said == []


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
