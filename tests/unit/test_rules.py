"""Every rule applies to what it is about and not to the case next to it; where rules are applied and explained."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from tiny import Tiny

from distft import extras, rules
from distft.cli import main
from distft.config.cluster import Cluster
from distft.config.recipe import Recipe, ScriptSettings
from distft.errors import PlanError
from distft.hardware.devices import Device, named_device
from distft.hardware.topology import Topology
from distft.jobs.target import Target, plan_recipe, plan_script
from distft.models import kinds, packing
from distft.models.architecture import Sizes
from distft.models.attention import NO_FLASH, NO_SDPA, NO_SDPA_FROM_5_21, no_flash_attention, planned_attention
from distft.models.layout import Tensor
from distft.models.shapes import ModelShape
from distft.planner.plan import make_plan
from distft.planner.search import Where
from distft.rules import upstream
from distft.rules.core import Case, RecipeCase, Rule, ScriptCase
from distft.rules.trainer_overrides import PLANNED, SCHEDULES, WITHOUT_EFFECT

ROOT = Path(__file__).parents[2]
NAMES = {rule.name: rule for rule in rules.RULES}
CPU = Device("cpu", "cpu", 2**33, cores=2)
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8}
OWN_CODE = {"model_type": "acme", "auto_map": {"AutoModelForCausalLM": "modeling_acme.Acme"}, "num_experts": 8}


PLAIN_LAYERS = (
    Tensor("model.embed_tokens.weight", (320, 64), "embedding"),
    Tensor("model.layers.0.self_attn.q_proj.weight", (64, 64), "linear"),
    Tensor("lm_head.weight", (320, 64), "output"),
)


IMAGES = (*PLAIN_LAYERS, Tensor("model.visual.blocks.0.attn.qkv.weight", (96, 32), "linear"))


def gpu(name: str) -> Device:
    return named_device(name, 1)


def zero(**options: Any) -> dict[str, Any]:
    """deepspeed.overrides with these below zero_optimization."""
    return {"overrides": {"zero_optimization": options}}


def over(**options: Any) -> dict[str, Any]:
    return {"overrides": options}


def saving(*names: str) -> dict[str, Any]:
    return {"lora__modules_to_save": list(names)}


def make_case(
    strategy: str = "ddp",
    offload: str = "none",
    nodes: int = 1,
    ranks: int = 2,
    shard: int | None = None,
    device: Device | str = "A100-80GB",
    config: dict[str, Any] | None = None,
    head_dim: int = 128,
    parameters: int = 8_000_000_000,
    trained: int = 40_000_000,
    merged: str | None = None,
    tied: bool = False,
    script: dict[str, Any] | None = None,
    bandwidth: float | None = None,
    checkpointing: bool | None = None,
    micro: int | None = None,
    accumulation: int | None = None,
    tensors: tuple[Tensor, ...] = (),
    train_only: list[str] | None = None,
    **recipe: Any,
) -> Case:
    """A case; `recipe` has dotted keys with `__` for the dot. With `script`, for your own script."""
    topology = Topology(nodes, ranks)
    if shard is None:
        shard = {"ddp": 1, "hsdp": ranks}.get(strategy, topology.world_size)
    where = {
        "strategy": strategy,
        "offload": offload,
        "shard_size": shard,
        "topology": topology,
        "device": gpu(device) if isinstance(device, str) else device,
    }
    if script is not None:
        return ScriptCase(**where, settings=ScriptSettings.model_validate({"name": "script", **script}))
    tree: dict[str, Any] = {"name": "test", "model": {"name_or_path": "model"}, "data": {"train": "data"}}
    for key, value in recipe.items():
        *groups, last = key.split("__")
        target = tree
        for group in groups:
            target = target.setdefault(group, {})
        target[last] = value
    model = ModelShape(
        "model",
        parameters,
        trained,
        parameters * 9 // 10,
        head_dim=head_dim,
        vocab_size=320,
        sizes=Sizes(tie_word_embeddings=tied),
        tensors=tensors or PLAIN_LAYERS,
        config={"model_type": "llama"} if config is None else config,
        peft_experts=merged,
        train_only=None if train_only is None else frozenset(train_only),
    )
    return RecipeCase(
        **where,
        settings=Recipe.model_validate(tree),
        model=model,
        bandwidth=bandwidth,
        gradient_checkpointing=checkpointing,
        micro_batch_size=micro,
        accumulation=accumulation,
    )


Z1, Z2, Z3, FSDP = ({"strategy": name} for name in ("zero1", "zero2", "zero3", "fsdp"))
QLORA = {"model__quantization": "nf4"}
INT8 = {"model__quantization": "int8"}
NEW_TOKENS = {"model__add_tokens": ["<|im_end|>"]}
MUON = {"training__optim": "muon", "lora": None}
NO_MASTERS = {"training__master_weights": "none", "training__mixed_precision": "bf16", "lora": None}
GALORE = {"training__optim": "galore_adamw", "lora": None}
EXPERTS = (*PLAIN_LAYERS, Tensor("model.layers.0.mlp.experts.down_proj", (4, 64, 64), "experts"))
CHOSEN = (*PLAIN_LAYERS, Tensor("model.layers.0.mlp.gate.e_score_correction_bias", (4,), "param"))
PART = {"training__train_only": ["lm_head"]}
REENTRANT = {"use_reentrant": True}
FLASH = {"model__attn_implementation": "flash_attention_2"}
FLASH4 = {"model__attn_implementation": "flash_attention_4", "device": "H100"}
FLEX = {"model__attn_implementation": "flex_attention"}
VARLEN = {"model__attn_implementation": "varlen"}
SDPA = {"model__attn_implementation": "sdpa"}
CPU_ADAM = {"zero_force_ds_cpu_optimizer": True}

# Rule → cases that break it, each with the change that fixes it. `installed` are versions to pretend.
TABLE: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "quantization-needs-lora": [({**QLORA, "lora": None}, {"lora": {}}), ({**INT8, "lora": None}, {"lora": {}})],
    "int8-cannot-be-sharded": [
        ({**Z3, **INT8}, QLORA),
        ({**FSDP, **INT8}, Z2),
        ({"strategy": "hsdp", "nodes": 2, **INT8}, {"strategy": "zero1"}),
    ],
    "activation-offloading-needs-checkpointing": [
        ({"training__activation_offloading": True, "checkpointing": False}, {"checkpointing": True})
    ],
    "train-only-needs-no-lora": [(PART, {"lora": None})],
    "train-only-needs-plain-checkpointing": [
        ({**PART, "lora": None, "trainer": over(gradient_checkpointing_kwargs=REENTRANT)}, {"checkpointing": False})
    ],
    "new-tokens-must-be-trained": [
        (
            {**NEW_TOKENS, "lora": None, "train_only": ["lm_head.weight"]},
            {"train_only": ["lm_head.weight", "model.embed_tokens.weight"]},
        )
    ],
    "new-tokens-need-plain-embeddings": [
        ({**NEW_TOKENS, "lora__target_modules": ["embed_tokens", "q_proj"]}, {"lora__target_modules": ["q_proj"]}),
        ({**NEW_TOKENS, "lora__target_modules": ["lm_head"]}, {"model__add_tokens": []}),
    ],
    "new-tokens-need-an-output-layer-without-bias": [
        ({**NEW_TOKENS, "tensors": (*PLAIN_LAYERS, Tensor("lm_head.bias", (320,), "bias"))}, {"lora": None}),
    ],
    "new-tokens-need-both-ends": [
        ({**NEW_TOKENS, **saving("lm_head")}, saving("lm_head", "embed_tokens")),
        ({**NEW_TOKENS, **saving("embed_tokens")}, {"model__add_tokens": []}),
    ],
    "saved-layers-are-not-quantized": [
        ({**QLORA, **saving("q_proj")}, {"model__quantization": None}),
        ({**INT8, **saving("q_proj", "lm_head")}, saving("embed_tokens", "lm_head")),
    ],
    "initial-weights-need-plain-layers": [
        ({**QLORA, "lora__init_lora_weights": "pissa"}, {"model__quantization": None}),
        ({**INT8, "lora__init_lora_weights": "orthogonal"}, {"lora__init_lora_weights": "gaussian"}),
        ({"lora__init_lora_weights": "olora", "lora__use_dora": True}, {"lora__use_dora": False}),
        (
            {"lora__init_lora_weights": "pissa_niter_4", "lora__target_modules": ["q_proj", "lm_head"]},
            {"lora__target_modules": ["q_proj"]},
        ),
        ({"lora__init_lora_weights": "orthogonal", "lora__r": 7}, {"lora__r": 8}),
        ({"lora__init_lora_weights": "pissa", "lora__r": 65}, {"lora__r": 64}),
    ],
    "constrained-rotations-need-whole-weights": [
        ({**strategy, "lora__oft": {"coft": True}}, {"strategy": "ddp"}) for strategy in (Z1, Z2, Z3, FSDP)
    ],
    "rotations-have-no-rows-of-new-tokens": [
        ({**NEW_TOKENS, "lora__oft": {}}, {"lora__oft": None}),
        ({**NEW_TOKENS, "lora__oft": {}}, saving("lm_head", "embed_tokens")),
    ],
    "int8-has-no-dora": [({**INT8, "lora__use_dora": True}, QLORA)],
    "offload-needs-a-strategy-that-can": [
        ({"offload": "optimizer"}, Z1),
        ({**Z2, "offload": "all"}, Z3),
        ({**FSDP, "offload": "optimizer"}, {"offload": "all"}),
        ({"script": {}, "offload": "all"}, Z3),
    ],
    "fsdp-offload-needs-a-gpu": [({**FSDP, "offload": "all", "device": CPU}, {"device": "A100-80GB"})],
    "fsdp-needs-adamw": [
        ({**FSDP, "training__optim": "adamw_bnb_8bit"}, Z2),
        ({**FSDP, "training__optim": "paged_adamw_32bit"}, {"training__optim": "adamw_torch"}),
        ({**FSDP, "trainer": over(optim="lion_8bit")}, {"trainer": over(optim="adamw_torch_fused")}),
    ],
    "matrix-optimizers-need-whole-matrices": [
        ({**Z2, "offload": "optimizer", "training__optim": "adafactor"}, {"training__optim": "adamw_bnb_8bit"}),
        ({**FSDP, **GALORE}, {"strategy": "ddp"}),
        ({**FSDP, "trainer": over(optim="galore_adafactor")}, {"strategy": "ddp"}),
    ],
    "low-rank-optimizers-need-the-models-matrices": [({"training__optim": "apollo_adamw"}, {"lora": None})],
    "low-rank-optimizers-need-a-layer": [
        ({**GALORE, "training__optim_target_modules": ["self_atn"]}, {"training__optim_target_modules": ["self_attn"]}),
        ({**GALORE, **PART, "train_only": ["lm_head.weight"]}, {"train_only": None}),
    ],
    "optim-args-are-of-low-rank-optimizers": [
        ({"training__optim_args": {"rank": 8}}, {"training__optim": "galore_adamw"}),
        ({"training__optim_target_modules": ["mlp"]}, {"training__optim": "galore_adamw"}),
        ({**GALORE, "training__optim_args": {"scale_type": "tensor"}}, {"training__optim": "apollo_adamw"}),
    ],
    "muon-is-not-for-zero": [
        ({**MUON, **Z1}, FSDP),
        ({**MUON, **Z3}, {"strategy": "ddp"}),
        ({**MUON, **Z2}, {"training__optim": "adamw_torch"}),
    ],
    "muon-needs-its-states-on-the-gpu": [({**MUON, **FSDP, "offload": "all"}, {"offload": "none"})],
    "muon-needs-the-models-matrices": [({"training__optim": "muon"}, {"lora": None})],
    "master-weights-none-needs-no-lora": [(NO_MASTERS | {"lora": {}}, {"lora": None})],
    "master-weights-none-needs-bf16": [
        ({**NO_MASTERS, "training__mixed_precision": other}, {"training__mixed_precision": "bf16"})
        for other in ("fp16", "no")
    ],
    "master-weights-none-needs-adamw": [
        ({**NO_MASTERS, "training__optim": "adafactor"}, {"training__optim": "adamw_torch"}),
        ({**NO_MASTERS, "trainer": over(optim="lion_8bit")}, {"training__master_weights": "float32"}),
    ],
    "master-weights-none-is-not-offloaded-by-zero": [
        ({**NO_MASTERS, **Z2, "offload": "optimizer"}, {"offload": "none"}),
        ({**NO_MASTERS, **Z3, "offload": "all"}, FSDP),
    ],
    "layerwise-optimizers-need-one-rank": [
        ({"trainer": over(optim="galore_adamw_layerwise")}, {"ranks": 1}),
        ({"trainer": over(optim="galore_adamw_layerwise"), "ranks": 1, "accumulation": 2}, {"accumulation": 1}),
    ],
    "forced-cpu-adam-needs-adamw": [
        (
            {**Z2, "offload": "optimizer", "deepspeed": over(**CPU_ADAM), "training__optim": "adamw_bnb_8bit"},
            {"training__optim": "adamw_torch_fused"},
        ),
    ],
    "hsdp-needs-whole-groups": [
        ({"strategy": "hsdp", "ranks": 6, "shard": 4}, {"shard": 3}),
        ({"strategy": "hsdp", "ranks": 4}, {"shard": 2}),
    ],
    "bf16-needs-ampere": [({"device": "V100-32GB"}, {"device": "A10G"}), ({"device": "T4"}, {"device": CPU})],
    "fp16-needs-a-gpu": [
        ({"device": CPU, "training__mixed_precision": "fp16"}, {"device": "T4"}),
        (
            {"device": CPU, "script": {"training": {"mixed_precision": "fp16"}}},
            {"script": {"training": {"mixed_precision": "bf16"}}},
        ),
    ],
    "flash-attention-needs-ampere": [
        ({**FLASH, "device": "V100-16GB", "training__mixed_precision": "fp16"}, {"device": "A10G"}),
        ({**FLASH, "device": CPU}, {"model__attn_implementation": "auto"}),
        ({**VARLEN, "device": "T4", "training__mixed_precision": "fp16"}, {"device": "A10G"}),
        ({**FLASH4, "device": "A100-80GB"}, {"device": "H100"}),
        ({**FLASH4, "device": "RTX-5090"}, {"device": "B200"}),
        ({**FLEX, "device": CPU}, {"model__attn_implementation": "auto"}),
    ],
    "flash-attention-needs-16-bit": [
        ({**FLASH, "training__mixed_precision": "no"}, {"training__mixed_precision": "bf16"}),
        ({**VARLEN, "training__mixed_precision": "no"}, {"device": CPU}),
    ],
    "flash-attention-needs-small-heads": [
        ({**FLASH, "head_dim": 257}, {"head_dim": 256}),
        ({**VARLEN, "head_dim": 257}, {"device": CPU}),
        ({**FLASH4, "head_dim": 192}, {"head_dim": 128}),
    ],
    "new-flash-attention-has-no-dropout": [
        ({**FLASH4, "config": {"model_type": "llama", "attention_dropout": 0.1}}, FLASH),
    ],
    "compile-is-not-for-zero3": [({**Z3, "training__compile": True}, {"training__compile": False})],
    "compile-needs-whole-nf4-layers": [({"training__compile": True, **QLORA, **FSDP}, {"strategy": "zero2"})],
    "compile-needs-inputs-on-the-gpu": [
        (
            {"training__compile": True, "training__activation_offloading": True},
            {"training__activation_offloading": False},
        ),
    ],
    "compile-needs-layers-that-can-be-traced": [
        ({"training__compile": True, **INT8, "checkpointing": True}, {"checkpointing": False}),
        ({"training__compile": True, "lora__use_dora": True, "checkpointing": True}, {"lora__use_dora": False}),
    ],
    "compile-unrolls-recurrences": [
        ({"training__compile": True, "config": {"model_type": "mamba"}}, {"config": {"model_type": "llama"}}),
    ],
    "compile-may-unroll-recurrent-layers": [
        ({"training__compile": True, "config": {"model_type": "qwen3_next"}}, {"config": {"model_type": "qwen3"}}),
        ({"training__compile": True, "config": {"model_type": "jamba"}}, {"training__compile": False}),
    ],
    "compile-was-not-tried-with-liger": [
        ({"training__compile": True, "training__use_liger_kernel": True}, {"training__compile": False}),
    ],
    "liger-needs-a-gpu": [({"training__use_liger_kernel": True, "device": CPU}, {"device": "T4"})],
    "zero3-frees-frozen-weights-too-early": [
        ({**Z3, "checkpointing": True, "installed": {"deepspeed": "0.19.3"}}, {"installed": {"deepspeed": "0.19.4"}}),
        ({**Z3, "checkpointing": True, "installed": {"deepspeed": "0.18.0"}}, {"lora": None}),
        (
            {**Z3, **PART, "lora": None, "checkpointing": True, "installed": {"deepspeed": "0.18.0"}},
            {"training__train_only": []},
        ),
        (
            {**Z3, "checkpointing": True, "installed": {"deepspeed": "0.19.3"}},
            {"trainer": over(gradient_checkpointing_kwargs={"use_reentrant": True})},
        ),
    ],
    # ---- models
    "model-must-be-a-causal-lm": [({"config": {"model_type": "t5"}}, {"config": {"model_type": "bloom"}})],
    "model-type-must-be-installed": [({"config": {"model_type": "llama9"}}, {"config": {"model_type": "bloom"}})],
    "remote-code-must-be-trusted": [({"config": OWN_CODE}, {"model__trust_remote_code": True})],
    "quantization-needs-layers-that-are-called": [
        ({"config": {"model_type": "mamba"}, "model__quantization": "nf4"}, {"config": {"model_type": "mamba2"}}),
        (
            {"config": {"model_type": "mamba", "quantization_config": {"load_in_8bit": True}}},
            {"config": {"model_type": "mamba"}},
        ),
    ],
    "sdpa-needs-a-model-that-has-it": [
        (
            {**SDPA, "config": {"model_type": name}, "device": device},
            {"model__attn_implementation": instead},
        )
        for name, device, instead in (("gptj", CPU, "eager"), ("bloom", "T4", "auto"), ("gpt_oss", CPU, "auto"))
    ],
    "sdpa-has-no-softcapping": [
        (
            {**SDPA, "config": {"model_type": "gemma2"}, "installed": {"transformers": "5.21.0"}},
            {"installed": {"transformers": "5.20.1"}},
        ),
    ],
    "flash-attention-needs-a-model-that-has-it": [
        ({**FLASH, "config": {"model_type": "llama4"}}, {"config": {"model_type": "llama"}})
    ],
    "varlen-needs-a-model-that-can-use-it": [
        ({**VARLEN, "config": {"model_type": "gpt_bigcode"}}, {"config": {"model_type": "llama"}}),
        ({**VARLEN, "config": {"model_type": "llama", "attention_dropout": 0.1}}, {"config": {"model_type": "llama"}}),
    ],
    "checkpointing-needs-a-model-that-has-it": [
        ({"config": {"model_type": "jetmoe"}, "checkpointing": True}, {"checkpointing": False})
    ],
    "quantization-needs-plain-layers": [
        ({"config": {"model_type": "falcon"}, "model__quantization": "nf4"}, {"config": {"model_type": "llama"}}),
    ],
    "packing-needs-separate-documents": [
        ({"config": {"model_type": "gpt_oss"}}, {"data__packing": False}),
        ({"config": {"model_type": "qwen3_next"}}, {"config": {"model_type": "qwen3"}}),
        ({"config": {"model_type": "jamba"}, **FLASH}, {"data__packing": False}),
        ({"config": {"model_type": "gpt_oss"}}, FLASH),
        ({"config": {"model_type": "mamba"}, **FLASH}, {"data__packing": False}),
    ],
    "packing-relies-on-remote-code": [
        ({"config": OWN_CODE, "model__trust_remote_code": True}, {"data__packing": False})
    ],
    "zero3-experts-need-a-leaf-module": [
        ({**Z3, "config": OWN_CODE, "model__trust_remote_code": True}, Z2),
        (
            {**Z3, "config": OWN_CODE, "model__trust_remote_code": True},
            {"deepspeed": zero(leaf_module={"classes": ["AcmeMoe"]})},
        ),
    ],
    "experts-are-not-quantized": [({**QLORA, "config": MIXTRAL}, {"config": {"model_type": "llama"}})],
    "all-linear-fails-on-merged-experts": [
        ({"merged": "names", "installed": {"peft": "0.19.1"}}, {"installed": {"peft": "0.20.0"}}),
        ({"merged": "names", "installed": {"peft": "0.19.1"}}, {"lora__target_modules": ["q_proj"]}),
    ],
    "quantized-checkpoints-need-lora": [
        ({"config": {"quantization_config": {"quant_method": name}}, "lora": None}, {"lora": {}})
        for name in ("mxfp4", "fp8", "bitsandbytes")
    ],
    "weights-are-quantized-once": [
        ({**QLORA, "config": {"quantization_config": {"quant_method": "fp8"}}}, {"model__quantization": None}),
        (
            {**INT8, "config": {"quantization_config": {"load_in_4bit": True}}},
            {"config": {"quantization_config": {"load_in_8bit": True}}},
        ),
    ],
    "quantized-checkpoints-must-be-trainable": [
        (
            {"config": {"quantization_config": {"quant_method": name}}},
            {"config": {"quantization_config": {"quant_method": "mxfp4"}}},
        )
        for name in ("awq", "gptq", "compressed-tensors", "modelopt", "higgs")
    ],
    "fp8-checkpoints-need-bf16": [
        (
            {"config": {"quantization_config": {"quant_method": "fp8"}}, "training__mixed_precision": "no"},
            {"training__mixed_precision": "bf16"},
        )
    ],
    "checkpoints-are-dequantized": [
        (
            {"config": {"quantization_config": {"quant_method": "mxfp4"}}},
            {"config": {"quantization_config": {"load_in_4bit": True}}},
        )
    ],
    "fsdp-does-not-shard-uint8": [
        ({**FSDP, "config": {"quantization_config": {"load_in_4bit": True}}}, Z3),
        (
            {**FSDP, "config": {"quantization_config": {"load_in_4bit": True}}},
            {"config": {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}}},
        ),
    ],
    "int8-checkpoints-cannot-be-sharded": [({**Z3, "config": {"quantization_config": {"load_in_8bit": True}}}, Z2)],
    "max-length-beyond-positions": [
        ({"config": {"n_positions": 1024}, "data__max_length": 1025}, {"data__max_length": 1024}),
        (
            {"config": {"max_position_embeddings": 1024}, "data__max_length": 2048},
            {"config": {"max_position_embeddings": 1024, "rope_scaling": {"factor": 4.0}}},
        ),
    ],
    # ---- overrides
    "deepspeed-keys-must-exist": [
        ({**Z2, "deepspeed": over(zero_optimisation={})}, {"deepspeed": over(zero_optimization={})}),
        (
            {**Z2, "script": {"deepspeed": over(gradient_cliping=1)}},
            {"script": {"deepspeed": over(gradient_clipping=1)}},
        ),
    ],
    "zero-keys-must-exist": [
        ({**Z2, "deepspeed": zero(reduce_bucketsize=1)}, {"deepspeed": zero(reduce_bucket_size=1)})
    ],
    "the-strategy-sets-the-stage": [({**Z2, "deepspeed": zero(stage=3)}, Z3)],
    "offload-is-planned": [
        ({**Z2, "deepspeed": zero(offload_optimizer={"device": "cpu"})}, {"offload": "optimizer"}),
        ({**Z3, "offload": "all", "deepspeed": zero(offload_param={"device": "none"})}, {"offload": "optimizer"}),
        ({**FSDP, "fsdp": over(offload_params=True)}, {"offload": "all"}),
    ],
    "round-robin-mixes-up-parameters": [
        (
            {**Z2, "offload": "optimizer", "deepspeed": zero(round_robin_gradients=True)},
            {"deepspeed": zero(round_robin_gradients=False)},
        )
    ],
    "nvme-needs-zero3-and-a-path": [
        (
            {"offload": "optimizer", **Z2, "deepspeed": zero(offload_optimizer={"device": "nvme", "nvme_path": "/x"})},
            Z3,
        ),
        (
            {"offload": "all", **Z3, "deepspeed": zero(offload_param={"device": "nvme"})},
            {"deepspeed": zero(offload_param={"device": "nvme", "nvme_path": "/x"})},
        ),
    ],
    "partial-offload-needs-zero3-and-cpu-adam": [
        (
            {**Z3, "offload": "optimizer", "deepspeed": zero(offload_optimizer={"ratio": 0.5})},
            {"deepspeed": over(zero_optimization={"offload_optimizer": {"ratio": 0.5}}, **CPU_ADAM)},
        ),
        (
            {
                **Z2,
                "offload": "optimizer",
                "deepspeed": over(zero_optimization={"offload_optimizer": {"ratio": 0.5}}, **CPU_ADAM),
            },
            Z3,
        ),
    ],
    "deepspeed-must-agree-with-the-recipe": [
        ({**Z2, "deepspeed": over(gradient_clipping=0.5)}, {"training__max_grad_norm": 0.5}),
        ({**Z2, "deepspeed": over(bf16={"enabled": False})}, {"training__mixed_precision": "no"}),
        ({**Z2, "deepspeed": over(train_batch_size=16)}, {"deepspeed": over(train_batch_size="auto")}),
        (
            {**NO_MASTERS, **Z2, "deepspeed": over(data_types={"grad_accum_dtype": "fp32"})},
            {"deepspeed": over(data_types={"grad_accum_dtype": "bf16"})},
        ),
        ({**Z2, "deepspeed": over(gradient_accumulation_steps=4), "accumulation": 2}, {"accumulation": 4}),
    ],
    "zero3-averages-gradients": [({**Z3, "deepspeed": over(gradient_allreduce_op="sum")}, Z2)],
    "summed-gradients-grow-with-the-world-size": [
        ({**Z2, "deepspeed": over(gradient_allreduce_op="sum")}, {"deepspeed": over(gradient_allreduce_op="mean")})
    ],
    "reduce-scatter-takes-no-prescaling": [
        ({**Z2, "deepspeed": over(prescale_gradients=True)}, Z1),
        (
            {**Z3, "deepspeed": over(gradient_predivide_factor=2.0)},
            {"deepspeed": over(gradient_predivide_factor=2.0, zero_optimization={"reduce_scatter": False})},
        ),
    ],
    "gradient-norm-is-needed": [
        ({**Z2, "deepspeed": zero(compute_grad_norm=False)}, {"training__max_grad_norm": 0.0}),
        ({**Z3, "deepspeed": zero(compute_grad_norm=False), "training__max_grad_norm": 0.0}, Z2),
        (
            {**Z1, "deepspeed": zero(compute_grad_norm=False), "training__max_grad_norm": 0.0},
            {"training__mixed_precision": "fp16"},
        ),
        (
            {**Z2, "offload": "optimizer", "script": {"deepspeed": zero(compute_grad_norm=False)}},
            {"offload": "none"},
        ),
    ],
    "low-precision-masters-need-cpu-adam": [
        (
            {**Z2, "deepspeed": over(bf16={"bf16_master_weights_and_grads": True})},
            {"deepspeed": over(bf16={"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True})},
        ),
        (
            {**Z2, "offload": "optimizer", "deepspeed": over(fp16={"fp16_master_weights_and_grads": True})},
            {"deepspeed": over(fp16={"fp16_master_weights_and_grads": True}, **CPU_ADAM)},
        ),
        (
            {**Z2, "deepspeed": over(bf16={"bf16_optimizer_states": True})},
            {"deepspeed": over(bf16={"bf16_optimizer_states": False})},
        ),
    ],
    "hpz-groups-divide-the-ranks": [
        ({**Z3, "ranks": 6, "deepspeed": zero(zero_hpz_partition_size=4)}, {"ranks": 8}),
        ({**Z2, "ranks": 8, "deepspeed": zero(zero_hpz_partition_size=4)}, Z3),
    ],
    "the-optimizer-belongs-in-the-recipe": [
        ({**Z2, "deepspeed": over(optimizer={"type": "Adam"})}, {"deepspeed": over()})
    ],
    "zero3-scripts-must-gather-to-save": [
        ({**Z3, "script": {"deepspeed": zero(stage3_gather_16bit_weights_on_model_save=False)}}, Z2)
    ],
    "fsdp-keys-must-exist": [
        ({**FSDP, "fsdp": over(fsdp_ofload_params=True)}, {"fsdp": over()}),
        ({**FSDP, "script": {"fsdp": over(min_params=1)}}, {"script": {"fsdp": over(min_num_params=1)}}),
    ],
    "recipes-use-fsdp2": [
        ({**FSDP, "fsdp": over(fsdp_version=1)}, {"fsdp": over(fsdp_version=2)}),
        ({**FSDP, "fsdp": over(version="1")}, {"fsdp": over(version="2")}),
    ],
    "fsdp2-has-no-fsdp1-keys": [
        ({**FSDP, "fsdp": over(fsdp_use_orig_params=True)}, {"fsdp": over()}),
        (
            {**FSDP, "script": {"fsdp": over(backward_prefetch="BACKWARD_PRE")}},
            {"script": {"fsdp": over(backward_prefetch="BACKWARD_PRE", fsdp_version=1)}},
        ),
    ],
    "reshard-after-forward-has-two-spellings": [
        (
            {**FSDP, "fsdp": over(reshard_after_forward="FULL_SHARD")},
            {"fsdp": over(reshard_after_forward=False)},
        ),
        (
            {**FSDP, "script": {"fsdp": over(fsdp_version=1)}},
            {"script": {"fsdp": over(fsdp_version=1, reshard_after_forward="FULL_SHARD")}},
        ),
    ],
    "fsdp2-has-no-local-state-dict": [
        ({**FSDP, "fsdp": over(state_dict_type="LOCAL_STATE_DICT")}, {"fsdp": over(state_dict_type="FULL_STATE_DICT")})
    ],
    "sharded-state-dicts-save-no-model": [
        (
            {**FSDP, "script": {"fsdp": over(state_dict_type="SHARDED_STATE_DICT")}},
            {"script": {"fsdp": over(state_dict_type="FULL_STATE_DICT")}},
        )
    ],
    "checkpointing-is-set-once": [
        (
            {**FSDP, "fsdp": over(fsdp_activation_checkpointing=True), "checkpointing": True},
            {"checkpointing": False},
        )
    ],
    "activation-offload-needs-checkpointing": [
        (
            {**FSDP, "fsdp": over(activation_checkpointing_offload=True)},
            {"fsdp": over(activation_checkpointing_offload=True, activation_checkpointing=True)},
        )
    ],
    "weights-are-read-by-unit": [({**FSDP, "fsdp": over(cpu_ram_efficient_loading=True)}, {"fsdp": over()})],
    "one-unit-gathers-all-weights": [
        ({**FSDP, "fsdp": over(auto_wrap_policy="NO_WRAP")}, {"fsdp": over(auto_wrap_policy="TRANSFORMER_BASED_WRAP")})
    ],
    "trainer-arguments-must-exist": [({"trainer": over(log_steps=5)}, {"trainer": over(logging_steps=5)})],
    "planned-arguments-belong-in-the-recipe": [
        ({"trainer": over(per_device_train_batch_size=4)}, {"trainer": over(neftune_noise_alpha=5.0)}),
        ({"trainer": over(load_best_model_at_end=True)}, {"trainer": over()}),
        ({**MUON, "trainer": over(optim="adamw_torch")}, {"trainer": over()}),
        (
            {
                "trainer": over(liger_kernel_config={"fused_linear_cross_entropy": True}),
                "training__use_liger_kernel": True,
            },
            {"trainer": over(liger_kernel_config={"rope": True})},
        ),
    ],
    "trainer-arguments-must-have-an-effect": [
        ({"trainer": over(train_sampling_strategy="group_by_length")}, {"trainer": over(dataloader_num_workers=2)}),
        ({"trainer": over(push_to_hub=True)}, {"trainer": over()}),
        ({**Z2, "trainer": over(ddp_bucket_cap_mb=50)}, {"strategy": "ddp"}),
        ({**Z2, "trainer": over(ddp_timeout=50)}, FSDP),
        ({"trainer": over(optim_args="a=1")}, {"trainer": over(optim_args="momentum=0.9", optim="sgd")}),
        ({"trainer": over(optim_target_modules=["q"])}, {"trainer": over()}),
        ({"trainer": over(liger_kernel_config={"rope": True})}, {"training__use_liger_kernel": True}),
        (
            {"trainer": over(label_smoothing_factor=0.1), "training__loss_type": "dft"},
            {"training__loss_type": "nll"},
        ),
        (
            {"trainer": over(gradient_checkpointing_kwargs={"use_reentrant": True}), "checkpointing": False},
            {"checkpointing": True},
        ),
    ],
    "trainer-optimizer-must-exist": [
        ({"trainer": over(optim="muon")}, {"trainer": over(optim="sgd")}),
        ({"trainer": over(optim="galore_adamw")}, {"trainer": over(optim="sgd")}),
        ({"trainer": over(optim="schedule_free_adamw")}, {"trainer": over(optim="lion_8bit")}),
    ],
    "trainer-schedule-must-exist": [
        ({"trainer": over(lr_scheduler_type="wsd")}, {"trainer": over(lr_scheduler_type="inverse_sqrt")}),
        ({"trainer": over(lr_scheduler_type="reduce_lr_on_plateau")}, {"trainer": over()}),
        (
            {"trainer": over(lr_scheduler_type="warmup_stable_decay")},
            {"trainer": over(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 2})},
        ),
        (
            {"trainer": over(lr_scheduler_kwargs={"min_lr": 1e-6})},
            {"trainer": over(lr_scheduler_kwargs={"min_lr": 1e-6}, lr_scheduler_type="cosine_with_min_lr")},
        ),
        ({"trainer": over(lr_scheduler_kwargs="num_cycles=1")}, {"trainer": over(lr_scheduler_kwargs=None)}),
    ],
    "loader-arguments-need-workers": [
        (
            {"trainer": over(dataloader_prefetch_factor=4)},
            {"trainer": over(dataloader_prefetch_factor=4, dataloader_num_workers=2)},
        ),
    ],
    "accelerator-config-leaves-batches-alone": [
        (
            {"trainer": over(accelerator_config={"split_batches": True})},
            {"trainer": over(accelerator_config={"non_blocking": True})},
        ),
    ],
    "tf32-needs-ampere": [({"trainer": over(tf32=True), "device": "T4"}, {"device": "A10G"})],
    "trackers-must-be-known": [
        ({"training__report_to": ["tensorbord"]}, {"training__report_to": ["tensorboard"]}),
        ({"training__report_to": ["wandb", "x"]}, {"training__report_to": []}),
    ],
    "overrides-of-another-strategy": [
        ({"deepspeed": over(gradient_clipping=1.0)}, Z2),
        ({**Z2, "fsdp": over(reshard_after_forward=False)}, FSDP),
        ({"script": {"fsdp": over(reshard_after_forward=False)}}, FSDP),
    ],
    # ---- advice
    "adapters-over-slow-links": [
        ({**Z3, "nodes": 2, "bandwidth": 12.5}, {"bandwidth": 50.0}),
        ({**FSDP, "nodes": 2, "bandwidth": 12.5}, {"strategy": "hsdp"}),
        ({**FSDP, "nodes": 2, "bandwidth": 12.5}, {"lora": None}),
    ],
    "offload-costs-memory-under-zero3-with-nf4": [({**Z3, **QLORA, "offload": "all"}, {"offload": "none"})],
    "plain-adamw-steps-slowly-on-the-host": [
        ({**Z2, "offload": "optimizer", "training__optim": "adamw_torch"}, {"offload": "none"}),
        ({**Z2, "offload": "optimizer", "training__optim": "adamw_torch"}, {"training__optim": "adamw_torch_fused"}),
    ],
    "adapters-have-little-to-offload": [
        ({**Z2, "offload": "optimizer"}, {"offload": "none"}),
        ({**Z2, "offload": "optimizer"}, {"lora": None}),
        ({**Z2, "offload": "optimizer"}, {"trained": 1_000_000_000}),
    ],
    "accumulation-repeats-gathers": [
        ({**Z3, "training__micro_batch_size": 1, "micro": 1, "accumulation": 16}, Z2),
        (
            {**FSDP, "training__micro_batch_size": 1, "micro": 1, "accumulation": 16},
            {"training__micro_batch_size": "auto"},
        ),
    ],
    "one-rank-has-nothing-to-shard": [
        ({**Z2, "ranks": 1}, {"ranks": 2}),
        ({**Z3, "ranks": 1, "script": {}}, {"offload": "all"}),
    ],
    "hsdp-groups-stay-in-a-node": [
        ({"strategy": "hsdp", "nodes": 4, "ranks": 4, "shard": 8}, {"shard": 4}),
        ({"strategy": "hsdp", "nodes": 2, "ranks": 6, "shard": 4, "script": {}}, {"shard": 3}),
    ],
    "shard-size-is-for-hsdp": [
        (
            {**FSDP, "parallelism__hsdp_shard_size": 2, "parallelism__strategy": "fsdp"},
            {"parallelism__strategy": "auto"},
        ),
        (
            {"script": {"parallelism": {"hsdp_shard_size": 2, "strategy": "zero2"}}},
            {"script": {"parallelism": {"hsdp_shard_size": 2, "strategy": "hsdp"}}},
        ),
    ],
    "bf16-where-the-gpu-has-it": [({"training__mixed_precision": "fp16"}, {"device": "T4"})],
    "bf16-models-overflow-in-fp16": [
        (
            {"config": {"dtype": "bfloat16"}, "training__mixed_precision": "fp16", "device": "T4"},
            {"config": {"dtype": "float16"}},
        ),
        ({"config": {"torch_dtype": "bfloat16"}, "training__mixed_precision": "fp16"}, {"config": {}}),
    ],
    "float32-wastes-a-gpu": [
        ({"training__mixed_precision": "no"}, {"device": CPU}),
        ({"training__mixed_precision": "no"}, {"trainer": over(tf32=True)}),
    ],
    "int8-is-slow-before-turing": [({**INT8, "device": "V100-32GB"}, {"device": "T4"})],
    "paging-needs-a-gpu": [
        ({"training__optim": "paged_adamw_32bit", "device": CPU}, {"device": "A10G"}),
        ({**Z2, "training__optim": "paged_adamw_32bit", "offload": "optimizer"}, {"offload": "none"}),
    ],
    "muon-leaves-experts-to-adamw": [({**MUON, "tensors": EXPERTS}, {"tensors": PLAIN_LAYERS})],
    "biases-that-choose-experts-are-rounded": [({**NO_MASTERS, "tensors": CHOSEN}, {"tensors": PLAIN_LAYERS})],
    "muon-needs-a-matrix": [({**MUON, **PART, "train_only": ["lm_head.weight"]}, {"train_only": None})],
    "eager-attention-keeps-all-scores": [
        ({"model__attn_implementation": "eager", "data__max_length": 4096}, {"data__max_length": 4095}),
        ({"model__attn_implementation": "eager", "data__max_length": 8192}, {"config": {"model_type": "gpt_oss"}}),
    ],
    "rotations-of-another-size": [
        ({"lora__oft": {"oft_block_size": 48}}, {"lora__oft": {"oft_block_size": 16}}),
        ({"lora__oft": {"r": 3}}, {"lora__oft": None}),
    ],
    "tied-embeddings-take-no-adapter": [
        ({"tied": True, "lora__target_modules": ["q_proj", "lm_head"]}, {"tied": False}),
        ({"tied": True, "lora__target_modules": ["model.embed_tokens"]}, {"lora__target_modules": "all-linear"}),
    ],
    "tied-embeddings-come-apart": [({"tied": True, **saving("embed_tokens")}, {"tied": False})],
    "modules-to-save-have-no-adapter": [
        (
            {"lora__modules_to_save": ["q_proj"], "lora__target_modules": ["q_proj", "v_proj"]},
            {"lora__target_modules": ["v_proj"]},
        ),
        (
            {"lora__modules_to_save": ["q_proj"], "lora__target_modules": r".*\.[qv]_proj"},
            {"lora__target_modules": "all-linear"},
        ),
    ],
    "some-layers-get-no-adapter": [
        ({"tensors": IMAGES}, {"tensors": PLAIN_LAYERS}),
        ({"tensors": IMAGES, "lora__target_modules": ["qkv", "q_proj"]}, {"lora__target_modules": ["q_proj"]}),
    ],
    "only-the-language-model-is-trained": [
        ({"tensors": IMAGES, "lora": None}, {"tensors": PLAIN_LAYERS}),
        (
            {"tensors": IMAGES, "lora": None, "train_only": [tensor.name for tensor in IMAGES]},
            {"train_only": ["lm_head.weight"]},
        ),
    ],
    "adapters-gain-little-from-8-bit": [
        ({"training__optim": "adamw_bnb_8bit"}, {"training__optim": "adamw_torch"}),
        ({"training__optim": "paged_adamw_8bit"}, {"trained": 400_000_000}),
    ],
}
PAIRS = [
    pytest.param(name, breaks, breaks | fix, id=f"{name}-{number}")
    for name, pairs in TABLE.items()
    for number, (breaks, fix) in enumerate(pairs)
]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that packages are installed in these versions; None: not installed."""
    installed = extras.installed()

    def versions(**wanted: str | None) -> None:
        found = {name: version for name, version in (installed | wanted).items() if version}
        monkeypatch.setattr(extras, "installed", lambda: found)

    return versions


def fired(changes: dict[str, Any], pretend: Any) -> dict[str, str]:
    """Name of each rule that applies to a case → its message."""
    pretend(**changes.get("installed", {}))
    case = make_case(**{key: value for key, value in changes.items() if key != "installed"})
    errors, warnings = rules.broken(case), rules.unwise(case)
    assert {rule.kind for rule, _ in errors} <= {"error"}
    assert {rule.kind for rule, _ in warnings} <= {"warning"}
    return {rule.name: text for rule, text in errors + warnings}


@pytest.mark.parametrize(("name", "breaks", "fixed"), PAIRS)
def test_a_rule_applies_but_not_to_the_case_next_to_it(
    name: str, breaks: dict[str, Any], fixed: dict[str, Any], pretend: Any
) -> None:
    found = fired(breaks, pretend)
    assert name in found, found
    assert found[name].endswith(f"; {NAMES[name].fix}")
    assert ": " in found[name].partition(";")[0]
    assert "\n" not in found[name]
    assert name not in fired(fixed, pretend)


def test_every_rule_has_both_sides() -> None:
    assert TABLE.keys() == NAMES.keys()
    assert all(len(fix) == 1 for pairs in TABLE.values() for _, fix in pairs), "more than one change"
    assert len(NAMES) == len(rules.RULES) >= 30


def test_plain_cases_break_no_rule(pretend: Any) -> None:
    for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"):
        for model in ({}, QLORA, {"lora": None, "trained": 8_000_000_000}):
            assert fired({"strategy": strategy, "nodes": 2, "checkpointing": True, **model}, pretend) == {}
            assert fired({"strategy": strategy, "nodes": 2, "script": {}}, pretend) == {}


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.name)
def test_a_rule_has_its_source(rule: Rule) -> None:
    assert rule.kind in ("error", "warning")
    assert len(rule.source) > 15 and len(rule.explanation) > 40 and rule.fix and rule.when
    assert not {rule.source[-1], rule.fix[-1], rule.when[-1]} & {".", ";", " "}
    assert rule.explanation.endswith((".", ".)"))
    scripts = any("script" in breaks for breaks, _ in TABLE[rule.name])
    assert rule.for_scripts or not scripts


def test_what_attention_auto_means() -> None:
    """One answer for the rules, the planner and the ranks."""
    why = [no_flash_attention("cpu", None, "bf16", {}), no_flash_attention("cuda", 7.5, "fp16", {})]
    why += [no_flash_attention("cuda", 8.0, "no", {}), no_flash_attention("cuda", 8.0, "bf16", {})]
    assert why == ["no GPU", "the GPU is older than Ampere", "float32", None]
    assert no_flash_attention("cuda", None, "fp16", {}) is None  # a GPU of which only the memory is known
    gemma4 = {"model_type": "gemma4", "text_config": {"head_dim": 256, "global_head_dim": 512}}
    why = [no_flash_attention("cuda", 9.0, "bf16", config) for config in ({"model_type": "llama4"}, gemma4)]
    assert why[0] == "llama4 models have no FlashAttention"
    assert why[1] == "heads of 512; flash_attention_2 has kernels for up to 256"
    assert make_case(config=gemma4).attention == "sdpa"
    assert make_case().attention == "auto"
    assert make_case(device="T4", training__mixed_precision="fp16").attention == "sdpa"
    assert (planned_attention("auto"), planned_attention("eager")) == ("sdpa", "eager")
    newest = [no_flash_attention("cuda", capability, "bf16", {}, "flash_attention_4") for capability in (8.9, 9.0)]
    assert newest == ["the GPU is older than Hopper", None]
    dropout = {"attention_dropout": 0.1}
    why = [no_flash_attention("cuda", 9.0, "bf16", dropout, f"flash_attention_{version}") for version in (2, 3, 4)]
    assert why == [None] + ["it has no dropout, and config.json asks for it in attention"] * 2
    for name in ("gpt_oss", "falcon_mamba", "gemma2"):  # which have no SDPA
        case = make_case(config={"model_type": name}, device=CPU, data__packing=False)
        assert case.attention == planned_attention("auto", name) == "eager"
        assert not [rule.name for rule, _ in rules.broken(case) if "sdpa" in rule.name]


def test_what_the_ranks_make_of_attention_auto(caplog: pytest.LogCaptureFixture) -> None:
    from distft.train.model import choose_attention

    recipe = make_case(data__packing=False).recipe
    with caplog.at_level("INFO", "distft"):
        assert [choose_attention(recipe, {"model_type": name}) for name in ("llama", "gemma2")] == ["sdpa", "eager"]
    assert caplog.messages[-1] == "attention: eager (no GPU; gemma2 models have no sdpa)"


def test_all_errors_at_once() -> None:
    case = make_case(strategy="zero3", model__quantization="int8", lora=None, device="V100-32GB")
    with pytest.raises(PlanError) as error:
        rules.apply(case)
    lines = str(error.value).splitlines()
    names = [line.rpartition("[")[2].rstrip("]") for line in lines]
    assert {"quantization-needs-lora", "int8-cannot-be-sharded", "bf16-needs-ampere"} == {*names}
    assert names == [rule.name for rule, _ in rules.broken(case)]
    assert lines[0] == (
        "model.quantization: int8 weights cannot be trained; add `lora:`, or remove model.quantization "
        "[quantization-needs-lora]"
    )
    assert rules.apply(make_case()) is None


def test_unknown_keys_get_the_nearest(pretend: Any) -> None:
    found = fired({**Z2, "deepspeed": over(gradient_cliping=1, zzz=1)}, pretend)["deepspeed-keys-must-exist"]
    assert found.startswith("deepspeed.overrides: unknown key gradient_cliping (did you mean gradient_clipping?), zzz;")


def test_seconds_over_slow_links(pretend: Any) -> None:
    found = fired({**Z3, "nodes": 2, "bandwidth": 10.0}, pretend)["adapters-over-slow-links"]
    # 8e9 weights of 2 bytes, half of them from the other node, twice: 16 GB at 10 GB/s.
    assert "across 2 nodes, about 1.6 s per micro-batch at network.bandwidth 10 GB/s" in found


# ---- versions


def test_packages_that_are_not_installed_break_no_rule(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    versioned = {rule.name for rule in rules.RULES if rule.versions}
    assert len(versioned) == 3
    for name in versioned:
        breaks = dict(TABLE[name][0][0])
        package = next(iter(breaks["installed"]))
        assert name in fired(breaks, pretend)
        assert name not in fired({**breaks, "installed": {package: None}}, pretend)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    caches = (extras.source, kinds._table, kinds._types)
    for cached in caches:
        cached.cache_clear()
    try:
        for name in (
            *("model-must-be-a-causal-lm", "model-type-must-be-installed"),
            *("trainer-arguments-must-exist", "trackers-must-be-known"),
        ):
            assert name not in fired(TABLE[name][0][0], pretend)
    finally:
        for cached in caches:
            cached.cache_clear()


def test_quick_and_light() -> None:
    """No torch, no transformers, no importlib.metadata, though a rule asks for a version."""
    program = """
import sys, types
from distft.rules import RULES, broken, unwise
from distft.rules import RecipeCase
from distft.hardware.devices import Device
from distft.hardware.topology import Topology
group = types.SimpleNamespace
recipe = group(
    model=group(quantization=None, attn_implementation="auto", trust_remote_code=False, add_tokens=[]),
    lora=group(use_dora=False, target_modules="all-linear", modules_to_save=[], exclude_modules=None,
               init_lora_weights=True, layers_to_transform=None, oft=None),
    data=group(packs=True, max_length=2048),
    training=group(mixed_precision="bf16", optim="adamw_torch", use_liger_kernel=False, compile=False, report_to=[],
                   train_only=[], loss_type="nll", optim_args=None, optim_target_modules="all-linear",
                   micro_batch_size="auto", max_grad_norm=1.0, global_batch_size=8, is_pure_bf16=False,
                   activation_offloading=False),
    parallelism=group(strategy="zero3", hsdp_shard_size="auto"),
    deepspeed=group(overrides={}), fsdp=group(overrides={}), trainer=group(overrides={}),
    optim="adamw_torch", low_rank=None)
sizes = group(tie_word_embeddings=False)
config = {"model_type": "llama"}
model = group(config=config, head_dim=128, parameters=100, trainable_parameters=10, peft_experts=None, sizes=sizes,
              left_out_layers={}, other_inputs=frozenset(), train_only=None, tensors=())
def case(checkpointing):
    return RecipeCase(strategy="zero3", offload="none", shard_size=2, topology=Topology(1, 2), settings=recipe,
                      device=Device("cuda", "H100", 2**36, 9.0), model=model,
                      gradient_checkpointing=checkpointing)
assert len(RULES) >= 30
before = set(sys.modules)
assert broken(case(False)) == unwise(case(False)) == []
broken(case(True))
print(sorted({"torch", "transformers", "deepspeed", "importlib.metadata"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["[]"], done.stdout + done.stderr


def test_under_a_millisecond() -> None:
    case = make_case(strategy="zero3", nodes=2, deepspeed=zero(stage=3), checkpointing=False, bandwidth=50.0)
    best = 1.0
    for _ in range(50):
        start = time.perf_counter()
        rules.broken(case)
        rules.unwise(case)
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3


# ---- what the rules know, against the installed packages


def fields_of(path: str, name: str) -> Iterator[tuple[str, str | None]]:
    """Fields of a class in a source file: name, and the alias that a pydantic Field gives it."""
    package, _, below = path.partition("/")
    source = Path(importlib.util.find_spec(package).origin).parent / below
    found = next(n for n in ast.walk(ast.parse(source.read_text())) if getattr(n, "name", "") == name)
    for node in found.body:
        if isinstance(node, ast.AnnAssign):
            keywords = node.value.keywords if isinstance(node.value, ast.Call) else []
            yield node.target.id, next((word.value.value for word in keywords if word.arg == "alias"), None)


def newest(**packages: str) -> bool:
    """Whether what is installed is as new as what the lists were made with."""
    return all(extras.within(metadata.version(name), [(">=", version)]) for name, version in packages.items())


def test_keys_are_the_packages() -> None:
    fields = list(fields_of("deepspeed/runtime/zero/config.py", "DeepSpeedZeroConfig"))
    names = {word for pair in fields for word in pair if word}
    assert names <= upstream.ZERO_KEYS
    arguments = {name for name, _ in fields_of("transformers/training_args.py", "TrainingArguments")}
    assert {name for name in arguments if not name.startswith("_")} - {"framework"} == upstream.trainer_arguments()
    if newest(deepspeed="0.19.8", transformers="5.23"):
        assert names == upstream.ZERO_KEYS
        assert PLANNED.keys() <= arguments
    folder = Path(importlib.util.find_spec("deepspeed").origin).parent
    texts = "".join(path.read_text() for path in folder.rglob("*.py") if path.name in DEEPSPEED_FILES)
    assert [key for key in upstream.DEEPSPEED_KEYS if f'"{key}"' not in texts and f"'{key}'" not in texts] == []
    if newest(accelerate="1.15"):
        text = (Path(importlib.util.find_spec("accelerate").origin).parent / "utils/dataclasses.py").read_text()
        plugin = text[text.index("class FullyShardedDataParallelPlugin") :]
        keys = (upstream.FSDP_KEYS | upstream.FSDP1_KEYS) - FSDP_ALIASES
        assert [key for key in keys if f'"{key.removeprefix("fsdp_").upper()}"' not in plugin] == []


DEEPSPEED_FILES = ("constants.py", "config.py", "precision_config.py", "comm/config.py")
# Names that accelerate's config accepts besides those it reads.
FSDP_ALIASES = {"fsdp_transformer_layer_cls_to_wrap", "fsdp_backward_prefetch_policy", "fsdp_state_dict_type"}


def test_what_distft_writes_is_known() -> None:
    from distft.strategies.accelerate import fsdp_config
    from distft.strategies.deepspeed import portable_config

    for strategy in ("zero1", "zero2", "zero3"):
        config = portable_config(strategy=strategy, offload="optimizer")
        assert config.keys() <= upstream.DEEPSPEED_KEYS
        assert config["zero_optimization"].keys() <= upstream.ZERO_KEYS
    assert fsdp_config(offload="none", device_type="cuda").keys() <= upstream.FSDP_KEYS


def test_model_types_are_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    assert set(NAMES) == kinds._table("CAUSAL_LM")
    assert kinds.CAUSAL_IF.keys() | kinds.NOT_TEXT.keys() <= set(NAMES)
    if newest(transformers="5.23"):
        for names in (NO_SDPA, upstream.NO_CHECKPOINTING):
            assert names <= set(NAMES)
        assert set(NAMES) >= packing.BY_MASK | packing.BY_STATE | packing.NO_ATTENTION
        assert set(NAMES) >= NO_FLASH


def test_which_types_have_which_attention() -> None:
    """By the classes of every type that transformers trains as a causal language model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as MODELS

    types = sorted(kinds._table("CAUSAL_LM") & {*CONFIG_MAPPING})
    classes = {name: MODELS[CONFIG_MAPPING[name]] for name in types}
    flash = {name for name, cls in classes.items() if not cls._supports_flash_attn}
    sdpa = {name for name, cls in classes.items() if not cls._supports_sdpa}
    checkpointing = {name for name, cls in classes.items() if not cls.supports_gradient_checkpointing}
    if newest(transformers="5.23"):
        assert flash == NO_FLASH & {*types}
        assert sdpa == (NO_SDPA | NO_SDPA_FROM_5_21) & {*types}
        assert checkpointing == upstream.NO_CHECKPOINTING & {*types}


# ---- through the planner and the command line


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def written(tiny: Tiny, folder: Path, **changes: Any) -> str:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny.recipe(**changes)))
    return str(file)


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_plan_has_the_warnings(tiny: Tiny, tmp_path: Path) -> None:
    path = written(tiny, tmp_path, parallelism__strategy="zero2", data__max_length=512)
    _, plan = plan_recipe(path)
    rule_names = [text.rpartition("[")[2] for text in plan.warnings]
    assert "max-length-beyond-positions]" in rule_names
    assert "one-rank-has-nothing-to-shard]" in rule_names
    _, plan = plan_recipe(path, ["data.max_length=256"], Target(1, 2))
    assert [text for text in plan.warnings if "[" in text] == []


def test_a_plan_checks_what_it_derived(tiny: Tiny, tmp_path: Path) -> None:
    """Accumulation is known only at the end, and bandwidth only from the profile."""
    changes = {"parallelism__strategy": "zero3", "training__micro_batch_size": 1, "training__mixed_precision": "bf16"}
    path = written(tiny, tmp_path, **changes)
    cluster = Cluster.model_validate(
        {"runs_dir": "/runs", "node": {"gpus_per_node": 2, "gpu": "H100"}, "network": {"bandwidth": 12.5}}
    )
    _, plan = plan_recipe(path, (), Target(2, 2, cluster))
    assert len(plan.warnings) == 2
    assert "[adapters-over-slow-links]" in plan.warnings[0]
    assert "micro_batch_size: 1 makes 2 micro-batches per step" in plan.warnings[1]
    with pytest.raises(PlanError, match=r"gradient_accumulation_steps is 4, the recipe's 2;.*with-the-recipe\]"):
        plan_recipe(path, ["deepspeed.overrides.gradient_accumulation_steps=4"], Target(2, 2, cluster))


def test_make_plan_without_a_profile(tiny: Tiny, tmp_path: Path) -> None:
    from distft.config.loading import load_recipe

    recipe = load_recipe(written(tiny, tmp_path))
    assert make_plan(recipe, Where(Topology(1, 2), CPU)).warnings == ()
    with pytest.raises(PlanError, match="bf16-needs-ampere"):
        bf16 = recipe.model_copy(update={"training": recipe.training.model_copy(update={"mixed_precision": "bf16"})})
        make_plan(bf16, Where(Topology(1, 2), gpu("T4")))


def test_validate_prints_warnings(tiny: Tiny, tmp_path: Path) -> None:
    path = written(tiny, tmp_path, parallelism__strategy="zero2")
    done = run("validate", path)
    assert done.exit_code == 0
    warning = "parallelism.strategy: zero2 on one rank shards nothing; use parallelism.strategy: ddp, or auto"
    assert f"warning: {warning} [one-rank-has-nothing-to-shard]\n" in done.stderr
    first, steps = json.loads(run("validate", path, "--json").stdout)["warnings"]
    assert first == f"{warning} [one-rank-has-nothing-to-shard]"
    assert steps.startswith("this run makes only 4 optimizer steps")


def test_validate_and_render_refuse(tiny: Tiny, tmp_path: Path) -> None:
    path = written(tiny, tmp_path, deepspeed={"overrides": {"gradient_cliping": 1}}, parallelism__strategy="zero2")
    for command in (("validate", path), ("render", path, "-o", str(tmp_path / "out")), ("launch", path, "--dry-run")):
        done = run(*command)
        assert done.exit_code == 2
        assert "did you mean gradient_clipping?" in done.stderr
    assert not (tmp_path / "out").exists()


def test_your_own_scripts(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("print('hello')\n")
    sets = ["parallelism.strategy=zero3", "deepspeed.overrides.zero_optimization.stage=2"]
    with pytest.raises(PlanError, match=r"stage: got 2, and the strategy is zero3; .* \[the-strategy-sets-the-stage\]"):
        plan_script([str(script)], sets)
    saves = "deepspeed.overrides.zero_optimization.stage3_gather_16bit_weights_on_model_save=false"
    _, plan, _ = plan_script([str(script)], [sets[0], saves], Target(1, 2))
    assert [text.rpartition("[")[2] for text in plan.warnings] == ["zero3-scripts-must-gather-to-save]"]
    done = run("launch", "--set", sets[0], "--set", saves, "--dry-run", "--", str(script))
    assert "warning: deepspeed.overrides.zero_optimization.stage3_gather" in done.output
    done = run("launch", "--set", sets[0], "--set", sets[1], "--dry-run", "--", str(script))
    assert done.exit_code == 2


# ---- distft rules


def test_the_list() -> None:
    done = run("rules")
    assert done.exit_code == 0
    lines = done.stdout.strip().splitlines()
    assert len(lines) == len(NAMES)
    rows = [line.split(None, 2) for line in lines]
    assert {name: (kind, when) for kind, name, when in rows} == {
        rule.name: (rule.kind, rule.when) for rule in rules.RULES
    }
    assert [kind for kind, _, _ in rows] == sorted(kind for kind, _, _ in rows)
    answer = json.loads(run("rules", "--json").stdout)
    assert [entry["name"] for entry in answer["rules"]] == [name for _, name, _ in rows]


@pytest.mark.parametrize("name", ["int8-cannot-be-sharded", "[int8-cannot-be-sharded]", "int8_cannot_be_sharded"])
def test_one_rule(name: str) -> None:
    text = " ".join(run("rules", name).stdout.split())
    rule = NAMES["int8-cannot-be-sharded"]
    assert text.startswith("int8-cannot-be-sharded (error) why ")
    for part in (rule.explanation, rule.when, rule.fix, rule.source, "versions all"):
        assert part in text
    assert json.loads(run("rules", name, "--json").stdout)["explanation"] == rule.explanation


def test_versions_are_shown() -> None:
    assert "versions deepspeed<0.19.4" in " ".join(run("rules", "zero3-frees-frozen-weights-too-early").stdout.split())


def test_an_unknown_rule() -> None:
    done = run("rules", "int8-cannot-be-shard")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no such rule: int8-cannot-be-shard; did you mean int8-cannot-be-sharded, ")
    assert "fsdp-needs-adamw" in run("rules", "fsdp").stderr
    assert run("rules", "qqqqqq").stderr == "error: no such rule: qqqqqq; distft rules lists them\n"


def test_the_reference_has_every_rule() -> None:
    text = (ROOT / "docs" / "rules.md").read_text()
    assert text.count("\n### ") == len(NAMES)
    for rule in rules.RULES:
        assert f"\n### {rule.name}\n" in text
        assert rule.fix in text and rule.source in text


# What a person may give in trainer.overrides, some of it with conditions.
TAKEN = [
    *("lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args", "optim_target_modules"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "neftune_noise_alpha", "tf32"),
    *("gradient_checkpointing_kwargs", "liger_kernel_config", "full_determinism", "torch_empty_cache_steps"),
    "accelerator_config",
    *("logging_steps", "logging_first_step", "log_on_each_node", "log_level", "log_level_replica", "disable_tqdm"),
    *("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("include_num_input_tokens_seen", "skip_memory_metrics", "debug", "per_device_eval_batch_size"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_timeout"),
]


def test_every_argument_of_transformers_is_decided() -> None:
    """A new one of another version fails here, until it is decided."""
    arguments = upstream.trainer_arguments()
    decided = [*TAKEN, *PLANNED, *WITHOUT_EFFECT]
    assert len(decided) == len(set(decided))
    assert sorted(arguments - set(decided)) == []


def test_schedules_and_their_arguments() -> None:
    """The table is that of the installed transformers, and what it takes can be made."""
    import inspect

    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    of_distft = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        if name.value in ("reduce_lr_on_plateau", "greedy"):  # they follow evaluations of Trainer's
            continue
        assert inspect.signature(function).parameters.keys() - of_distft == SCHEDULES[name.value], name


GPT_OSS = {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2}
OWN_CLASS = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}


@pytest.mark.parametrize(
    ("changes", "sets", "why"),
    [
        ({}, [], None),
        (GPT_OSS, ["model.attn_implementation=eager"], "the attention of gpt_oss does not see where"),
        (OWN_CLASS, ["model.trust_remote_code=true"], "the model's own code may let"),
        (OWN_CLASS, [], None),  # transformers' class
    ],
)
def test_packing_auto(tiny: Tiny, tmp_path: Path, changes: dict[str, Any], sets: list[str], why: str | None) -> None:
    """It packs what the model keeps apart; where it does not pack, every command that plans says so."""
    shutil.copytree(tiny.path / "model", tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    file = written(tiny, tmp_path, model__name_or_path=str(tmp_path / "model"), data__packing="auto")
    recipe, plan = plan_recipe(file, sets)
    assert recipe.data.packing is (why is None)
    said = [text for text in plan.warnings if "rows are not packed" in text]
    assert len(said) == (why is not None) and all(str(why) in text for text in said)
    shown = run("plan", file, *(word for text in sets for word in ("--set", text)))
    assert ("rows are not packed" in " ".join(shown.output.split())) is (why is not None), shown.output
