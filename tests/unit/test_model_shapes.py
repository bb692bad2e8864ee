"""A model's parameters from its config.json, compared with what transformers and peft build (on meta)."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
import time
import warnings
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import distft
from tiny import Tiny

from distft.config.loading import load_recipe
from distft.config.recipe import NOT_OF_PEFT, Lora, Oft
from distft.errors import PlanError
from distft.models.adaptable import left_out
from distft.models.architecture import describe
from distft.models.families import FAMILIES
from distft.models.lora import adapters, lora_parameters, module_of, rank_of, shapes_of
from distft.models.oft import peft_fields
from distft.models.shapes import ModelShape, read_model_shape
from distft.models.start import check_start
from distft.train.model import peft_options

# Sizes that do not divide each other, so that none can be taken for another. No pad token: it would have to be < 101.
BASE = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
GPT = {"vocab_size": 101, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 17, "pad_token_id": None}
MOE = {"num_local_experts": 3, "num_experts_per_tok": 2}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
BIASED = {"attention_bias": True}
QWEN = {**BASE, "head_dim": 10, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
QWEN_MOE = {**BASE, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 13}
VISION = {"hidden_size": 18, "intermediate_size": 22, "num_hidden_layers": 2, "num_attention_heads": 3}
TINY: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {**BASE, "head_dim": 10, "mlp_bias": True, **BIASED, **TIED},
        {**BASE, "num_key_value_heads": None, "head_dim": None},
    ],
    "mistral": [{**BASE, **TIED, "sliding_window": 7}, {**BASE, "head_dim": 10, "sliding_window": None}],
    "ministral3": [{**BASE, **TIED}, {**BASE, "head_dim": 10, "sliding_window": 7}],
    "mixtral": [{**BASE, **MOE, "head_dim": 10}, {**BASE, **MOE, **TIED, "sliding_window": 7}],
    "qwen2": [{**BASE, **TIED}, QWEN],
    "qwen3": [{**BASE, **TIED}, {**QWEN, **BIASED}],
    "qwen2_moe": [
        {**QWEN_MOE, "shared_expert_intermediate_size": 28, "mlp_only_layers": [1]},
        {**QWEN_MOE, "shared_expert_intermediate_size": 28, "decoder_sparse_step": 2, "qkv_bias": False, **TIED},
    ],
    "qwen3_moe": [{**QWEN_MOE, "mlp_only_layers": [1], **BIASED}, {**QWEN_MOE, **TIED, "head_dim": 10}],
    "gemma": [{**BASE, "head_dim": 10}, {**BASE, **UNTIED, **BIASED}],
    "gemma2": [{**BASE, "head_dim": 10}, {**BASE, **UNTIED, **BIASED}],
    "gemma3_text": [{**BASE, "head_dim": 10}, {**BASE, **UNTIED, **BIASED, "sliding_window_pattern": 2}],
    "gemma3": [
        {
            "text_config": {**BASE, "head_dim": 10},
            "vision_config": {**VISION, "image_size": 28, "patch_size": 4, "vision_use_head": False},
            "mm_tokens_per_image": 4,
        },
        {"text_config": {**BASE, **TIED}, "vision_config": VISION, **UNTIED},
        {"text_config": {**BASE, **UNTIED}},
    ],
    "phi": [{**BASE, "qk_layernorm": True}, {**BASE, **TIED}],
    "phi3": [{**BASE, "sliding_window": 7}, {**BASE, **TIED}],
    "phimoe": [{**BASE, **MOE, **BIASED, "lm_head_bias": True}, {**BASE, **MOE, **TIED}],
    "gpt2": [{**GPT, "n_inner": 30}, {**GPT, **UNTIED}],
    "gpt_bigcode": [{**GPT, "n_inner": 30}, {**GPT, **UNTIED, "multi_query": False}],
    "gptj": [{**GPT, "n_inner": 30, "rotary_dim": 4}, {**GPT, **TIED, "rotary_dim": 4}],
    "gpt_neox": [
        {**BASE, "attention_bias": False, "num_key_value_heads": 4},
        {**BASE, **TIED, "use_parallel_residual": False},
    ],
    "falcon": [
        {**BASE, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        {**BASE, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 30},
        {**BASE, **UNTIED, "multi_query": False, "parallel_attn": False},
    ],
    "bloom": [{**BASE, "n_layer": 2, "n_head": 4}, {"vocab_size": 101, "n_embed": 24, **UNTIED}],
    "opt": [
        {**BASE, "ffn_dim": 20, "word_embed_proj_dim": 14, "max_position_embeddings": 17},
        {**BASE, "ffn_dim": 20, "enable_bias": False, "layer_norm_elementwise_affine": False, **UNTIED},
        {**BASE, "ffn_dim": 20, "do_layer_norm_before": False},
    ],
    "starcoder2": [{**BASE, "use_bias": False, "sliding_window": 7}, {**BASE, **UNTIED}],
    "olmo": [{**BASE, **BIASED}, {**BASE, **TIED}],
    "olmo2": [{**BASE, **BIASED}, {**BASE, **TIED}],
    "olmo3": [{**BASE, **BIASED}, {**BASE, **TIED, "num_hidden_layers": 5}],
    "olmoe": [{**BASE, "num_experts": 3, **BIASED}, {**BASE, "num_experts": 3, **TIED}],
    "cohere": [{**BASE, "use_qk_norm": True, **BIASED}, {**BASE, **UNTIED}],
    "cohere2": [{**BASE, **BIASED, "sliding_window_pattern": 2}, {**BASE, **UNTIED}],
    "granite": [{**BASE, **BIASED, "mlp_bias": True}, {**BASE, **TIED}],
    "granitemoe": [{**BASE, **MOE, **BIASED}, {**BASE, **MOE, **TIED}],
    "stablelm": [
        {**BASE, "use_qkv_bias": True, "qk_layernorm": True},
        {**BASE, **TIED, "use_parallel_residual": True},
    ],
    "smollm3": [
        {**BASE, **BIASED, **UNTIED, "mlp_bias": True, "use_sliding_window": True, "sliding_window": 7},
        {**BASE, "num_key_value_heads": None},
    ],
    "seed_oss": [{**BASE, "mlp_bias": True, "attention_out_bias": True}, {**BASE, "attention_bias": False, **TIED}],
    "gpt_oss": [{**BASE, **MOE, "head_dim": 10}, {**BASE, **MOE, "attention_bias": False, **TIED}],
}
# The classes' defaults, except the number of layers, which would only make the test slow.
DEFAULT = {
    family: {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 2}}
    if family == "gemma3"
    else {"n_layer" if FAMILIES[family].keys.get("num_hidden_layers") else "num_hidden_layers": 2}
    for family in FAMILIES
}
CASES = [
    pytest.param({"model_type": family, **config}, id=f"{family}-{index}")
    for family, configs in TINY.items()
    for index, config in enumerate(configs)
]
DEFAULT_CASES = [pytest.param({"model_type": family, **DEFAULT[family]}, id=family) for family in FAMILIES]


def meta_model(config: dict[str, Any]) -> Any:
    """What AutoModelForCausalLM builds from a config.json, without memory for the weights."""
    return copy.deepcopy(_meta_model(json.dumps(config)))


@functools.cache
def _meta_model(config: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config)))


def peft_model(config: dict[str, Any], options: dict[str, Any], kind: Any = None) -> Any:
    """What peft makes of a model on the meta device with these options of its LoraConfig, or of a config of `kind`."""
    from peft import LoraConfig, get_peft_model

    model = meta_model(config)
    if patterns := left_out(name for name, _ in model.named_parameters()):
        options |= {"exclude_modules": "|".join(f"(?:{pattern})" for pattern in patterns)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D's fan_in_fan_out, and of tied embeddings
        return get_peft_model(model, (kind or LoraConfig)(task_type="CAUSAL_LM", **options), low_cpu_mem_usage=True)


def peft_count(config: dict[str, Any], lora: Lora) -> int:
    """peft's own count of trainable parameters."""
    return peft_model(config, lora.model_dump(exclude=NOT_OF_PEFT)).get_nb_trainable_parameters()[0]


def our_count(config: dict[str, Any], lora: Lora) -> int:
    model = describe(config)
    return lora_parameters(lora, (*model.tensors, *model.tied), model.peft_experts)


def test_every_family_is_tested() -> None:
    assert set(TINY) == set(FAMILIES)
    assert len(FAMILIES) == 35


@pytest.mark.parametrize("config", [*CASES, *DEFAULT_CASES])
def test_names_and_shapes_are_those_of_transformers(config: dict[str, Any]) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    model, ours = meta_model(config), describe(config)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # tied ones once
    assert {tensor.name: tensor.shape for tensor in ours.tensors} == theirs
    assert len(ours.tensors) == len(theirs)
    assert ours.parameters == model.num_parameters()
    # The kinds that formulas depend on.
    classes = dict(model.named_modules())
    linear = {name for name, module in classes.items() if isinstance(module, (torch.nn.Linear, Conv1D))}
    assert {t.name.removesuffix(".weight") for t in ours.tensors if t.is_linear} == linear - {"lm_head"}
    embeddings = {f"{name}.weight" for name, module in classes.items() if isinstance(module, torch.nn.Embedding)}
    assert {tensor.name for tensor in ours.tensors if tensor.kind == "embedding"} == embeddings
    norms = {f"{name}.weight" for name, module in classes.items() if type(module).__name__.endswith("Norm")}
    assert {tensor.name for tensor in ours.tensors if tensor.kind == "norm"} == norms & theirs.keys()
    assert [t.name for t in (*ours.tensors, *ours.tied) if t.kind == "output"] == ["lm_head.weight"]
    assert len(ours.tied) == (model.lm_head.weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("config", [*CASES, *DEFAULT_CASES])
def test_sizes_are_those_of_transformers(config: dict[str, Any]) -> None:
    from transformers import AutoConfig

    whole, ours = AutoConfig.for_model(**config), describe(config).sizes
    theirs = whole.get_text_config()
    assert ours.tie_word_embeddings == whole.tie_word_embeddings
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.num_hidden_layers == len(ours.layer_types)
    if getattr(theirs, "layer_types", None) and theirs.sliding_window:
        assert list(ours.layer_types) == theirs.layer_types
    if "sliding_attention" in ours.layer_types:
        assert ours.sliding_window == theirs.sliding_window
    names = [tensor.name for tensor in describe(config).tensors]
    assert ours.gated_mlp == any(re.search(r"gate_(up_)?proj", name) for name in names)
    assert (ours.experts is not None) == any("experts" in name for name in names)
    if ours.experts:
        assert ours.experts.num_experts == getattr(theirs, "num_local_experts", None) or theirs.num_experts
        assert ours.experts.num_experts_per_tok == theirs.num_experts_per_tok
        layers = {int(name.split(".")[2]) for name in names if ".experts." in name}
        assert layers == {index for index, sparse in enumerate(ours.experts.layers) if sparse}


@pytest.mark.parametrize("config", CASES)
def test_lora_counts_are_those_of_peft(config: dict[str, Any]) -> None:
    ours = describe(config)
    if ours.peft_experts and metadata.version("peft").startswith("0.19."):
        pytest.skip("peft 0.19 fails on all-linear for these families")
    names = sorted({tensor.name.split(".")[-2] for tensor in ours.tensors if tensor.is_linear})
    for lora in (
        Lora(r=5),
        Lora(r=5, target_modules=[name for name in names if "proj" not in name or name[0] in "qvof"] or names[:1]),
        Lora(r=3, use_rslora=True, target_modules=names[-1:]),
        *([] if ours.peft_experts else [Lora(r=2, target_modules=rf".*\.\d+\..*{re.escape(names[-1])}")]),
    ):
        assert our_count(config, lora) == peft_count(config, lora), lora
    dora = Lora(r=5, use_dora=True)
    if ours.peft_experts:
        with pytest.raises(PlanError, match=r"lora.use_dora: peft does not support it on the experts"):
            our_count(config, dora)
        dora = Lora(r=5, use_dora=True, target_modules=["q_proj", "o_proj"])
    assert our_count(config, dora) == peft_count(config, dora)


ROTATIONS = [Oft(oft_block_size=8), Oft(oft_block_size=7), Oft(r=3), Oft(oft_block_size=4, block_share=True), Oft()]


@pytest.mark.parametrize("config", CASES)
def test_oft_counts_are_those_of_peft(config: dict[str, Any]) -> None:
    """Also where the blocks do not divide a width, and where experts have no adapter."""
    from peft import OFTConfig

    linear = [tensor for tensor in describe(config).tensors if tensor.is_linear]
    for oft in ROTATIONS:
        lora = Lora(oft=oft)
        if any(tensor.kind == "conv1d" for tensor in linear):
            with pytest.raises(PlanError, match=r"c_attn is a Conv1D, and OFT is for linear layers"):
                our_count(config, lora)
            continue
        theirs = peft_model(config, {"target_modules": "all-linear", **peft_fields(oft)}, OFTConfig)
        assert our_count(config, lora) == theirs.get_nb_trainable_parameters()[0], oft
        shapes = {tuple(p.shape) for p in theirs.parameters() if p.requires_grad}
        assert {shape for adapter in adapters(lora, linear) for shape in shapes_of(lora, adapter)} == shapes


def test_rotations_of_one_input() -> None:
    with pytest.raises(PlanError, match=r"blocks of one of the 24 inputs of model.layers.0.self_attn.q_proj cannot be"):
        our_count({"model_type": "llama", **BASE}, Lora(oft=Oft(r=24)))
    with pytest.raises(PlanError, match=r"model.embed_tokens is an embedding, and OFT is for linear layers"):
        our_count({"model_type": "llama", **BASE}, Lora(target_modules=["embed_tokens"], oft=Oft()))


def test_module_dropout_drops_nothing() -> None:
    """So lora.oft has no such field."""
    import torch
    from peft import OFTConfig, get_peft_model

    base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model = get_peft_model(base, OFTConfig(target_modules=["0"], oft_block_size=2, module_dropout=0.9)).train()
    torch.nn.init.normal_(model.base_model.model[0].oft_R["default"].weight)
    inputs = torch.randn(3, 8)
    assert all(torch.equal(model(inputs), model(inputs)) for _ in range(9))


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_config_class(family: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def check(spec: Any, config_class: Any) -> None:
        for name, default in spec.defaults.items():
            keys = [key for key in spec.keys.get(name, name).split() if hasattr(config_class, key)]
            if name in spec.unread or not keys:
                assert default is None or name == "vision_use_head", name  # in transformers 5.17 no field
            else:
                assert getattr(config_class, keys[0]) == default, name

    if family == "gemma3":
        check(FAMILIES[family].vision, CONFIG_MAPPING["siglip_vision_model"])
        check(FAMILIES[family], CONFIG_MAPPING["gemma3_text"])
    else:
        check(FAMILIES[family], CONFIG_MAPPING[family])


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("mixtral", ["w1", "w2", "w3"]),
        ("mixtral", ["gate", "q_proj"]),
        ("mixtral", ["w2"]),
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"]),
        ("qwen3_moe", ["q_proj", "experts.down_proj"]),
        ("olmoe", ["gate", "up_proj", "gate_proj", "v_proj"]),
        ("qwen2_moe", ["gate_proj", "up_proj", "shared_expert_gate"]),  # here the shared expert's
        ("llama", ["embed_tokens", "q_proj"]),
        ("llama", ["lm_head", "v_proj"]),  # tied here
        ("phi", ["lm_head", "embed_tokens"]),
        ("gpt2", ["wte", "wpe", "lm_head", "c_proj"]),
        ("gpt2", ["attn.c_proj"]),
        ("opt", ["project_in", "embed_positions"]),
        ("mistral", ["model.layers.1.self_attn.q_proj", "0.mlp.up_proj"]),
        ("gemma3", ["language_model.layers.0.mlp.up_proj", "out_proj", "patch_embedding"]),
        ("falcon", ["query_key_value", "nowhere"]),  # peft does not report the second
    ],
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_named_layers_are_those_of_peft(family: str, targets: list[str], use_dora: bool) -> None:
    config, lora = {"model_type": family, **TINY[family][0]}, Lora(r=5, target_modules=targets, use_dora=use_dora)
    try:
        theirs = peft_count(config, lora)
    except ValueError as error:
        assert use_dora, error
        with pytest.raises(PlanError, match="experts of a mixture"):
            our_count(config, lora)
    else:
        assert our_count(config, lora) == theirs


SOME = [
    {"exclude_modules": ["q_proj", "0.mlp.down_proj"]},
    {"exclude_modules": r".*\.1\.self_attn\..*", "target_modules": r".*(self_attn|mlp)\..*_proj"},
    {"layers_to_transform": [1]},
    {"layers_to_transform": 0, "target_modules": ["q_proj", "k_proj", "model.layers.1.mlp.down_proj"]},
    {"rank_pattern": {"q_proj": 8, r"layers\.1\..*": 3, "model.layers.0.mlp.down_proj": 1}},
    {"rank_pattern": {r".*_proj": 2}, "alpha_pattern": {"q_proj": 64}, "use_rslora": True},
    {"modules_to_save": ["embed_tokens", "0.self_attn.q_proj", "model.norm"]},
    {"modules_to_save": ["lm_head", "down_proj"], "rank_pattern": {"q_proj": 2}},
    {"rank_pattern": {"o_proj": 7}, "layers_to_transform": [1], "exclude_modules": ["k_proj"], "use_dora": True},
]


SOME_OF_GPT2 = [
    {"exclude_modules": ["attn.c_proj"], "rank_pattern": {r"h\.1\..*": 9, r"c_.*": 2}},
    {"layers_to_transform": [1], "alpha_pattern": {"mlp.c_proj": 3.5}},
]


@pytest.mark.parametrize(
    ("family", "options"),
    [*((name, options) for name in ("llama", "gemma2") for options in SOME), *(("gpt2", o) for o in SOME_OF_GPT2)],
    ids=str,
)
def test_options_for_some_layers_are_those_of_peft(family: str, options: dict[str, Any]) -> None:
    """The counts, and each layer's rank; and those of the options that training gives to peft."""
    config = {"model_type": family, **TINY[family][0]}
    ours = describe(config)
    lora = Lora(r=5, **options)
    names = sorted({module_of(tensor).rpartition(".")[2] for tensor in ours.tensors if tensor.is_linear})
    plain = peft_model(config, {"r": 5, "target_modules": names, **options})
    trained = peft_model(config, peft_options(lora, meta_model(config)))
    assert our_count(config, lora) == plain.get_nb_trainable_parameters()[0] != our_count(config, Lora(r=5))
    ranks = {module_of(t): rank_of(lora, module_of(t)) for t, _ in adapters(lora, ours.tensors)}
    assert len(set(ranks.values())) >= len(lora.rank_pattern) > 0 or set(ranks.values()) == {5}
    for wrapped in (plain, trained):
        layers = {name.removeprefix("base_model.model."): module for name, module in wrapped.named_modules()}
        assert {name: module.r["default"] for name, module in layers.items() if hasattr(module, "r")} == ranks


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"exclude_modules": ["q_proj", "qproj"]},
            "exclude_modules: got qproj, which is none of the layers",
        ),
        ({"exclude_modules": ["self_attn"]}, "exclude_modules: got self_attn, which is none of the layers"),
        ({"exclude_modules": r".*_proj"}, "exclude_modules: leaves none of the layers of lora.target_modules"),
        ({"exclude_modules": ["lm_head"]}, "exclude_modules: got lm_head, which is none of the layers"),
        ({"modules_to_save": ["lm_heed"]}, "modules_to_save: got lm_heed, and the model has no such layer; did"),
        (
            {"modules_to_save": ["mlp"]},
            "got mlp, which is no layer but contains some; name these, such as model.layers.0",
        ),
        ({"modules_to_save": ["layers"]}, "modules_to_save: got layers, which is no layer but contains some"),
        ({"modules_to_save": ["norm"]}, "got norm, which peft takes for .*layernorm as well; write model.norm"),
        ({"modules_to_save": ["q_proj"], "target_modules": ["q_proj"]}, "modules_to_save: leaves none of the layers"),
        ({"layers_to_transform": [1, 2]}, "layers_to_transform: got 2, and the model has 2 with such layers, from 0"),
        ({"layers_to_transform": 0, "target_modules": ["lm_head"]}, "got 0, and the model has no such blocks"),
        (
            {"rank_pattern": {"proj": 4}},
            "rank_pattern: got proj, which is the end of no name of a layer",
        ),
        ({"rank_pattern": {r".*": 4, "q_proj": 8}}, "got q_proj, which is the end of no name .*an earlier pattern has"),
        (
            {"alpha_pattern": {"q_proj": 4.0}, "target_modules": ["v_proj"]},
            "alpha_pattern: got q_proj, which is",
        ),
    ],
)
def test_an_option_that_would_change_nothing(options: dict[str, Any], said: str) -> None:
    config = {"model_type": "llama", **TINY["llama"][0]}
    with pytest.raises(PlanError, match=said):
        our_count(config, Lora(**options))
    with pytest.raises(PlanError, match=said):
        peft_options(Lora(**options), meta_model(config))


@pytest.mark.parametrize(
    "option", [{"exclude_modules": ["q_proj"]}, {"layers_to_transform": 1}, {"rank_pattern": {"q_proj": 4}}]
)
def test_options_for_some_layers_are_not_for_experts(option: dict[str, Any]) -> None:
    """peft has them as parameters, whose names these options do not see."""
    config = {"model_type": "mixtral", **TINY["mixtral"][0]}
    with pytest.raises(PlanError, match=f"lora.{next(iter(option))}: peft does not support it on the experts"):
        our_count(config, Lora(**option))
    lora = Lora(target_modules=["q_proj", "v_proj"], **option)
    assert our_count(config, lora) == peft_count(config, lora)


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llama", {"target_modules": ["qproj"]}, "got qproj, and the model has no such layer; it has down_proj, "),
        ("llama", {"target_modules": ["mlp"]}, "model.layers.0.mlp cannot have an adapter"),
        ("llama", {"target_modules": ["q_proj", "norm"]}, "model.norm cannot have an adapter"),
        ("granitemoe", {"target_modules": ["router"]}, "router cannot have an adapter"),
        ("olmoe", {"target_modules": ["experts"]}, "experts cannot have an adapter"),
        (
            "llama",
            {"target_modules": r"layers\.\d+\.mlp\..*"},
            "matches no layer; it must match a whole name, such as model.layers.0",
        ),
        ("llama", {"target_modules": r".*\.mlp"}, "model.layers.0.mlp cannot have an adapter"),
        ("mixtral", {"target_modules": ["w1"]}, "w1 and w3 are one parameter here"),
        ("mixtral", {"lora_dropout": 0.1}, "lora.lora_dropout: peft does not support it on the experts"),
    ],
)
def test_what_peft_refuses_is_refused(family: str, options: dict[str, Any], said: str) -> None:
    config = {"model_type": family, **TINY[family][0]}
    with pytest.raises(PlanError) as error:
        our_count(config, Lora(**options))
    assert said in str(error.value)
    with pytest.raises(ValueError, match=r"not found|not supported|Cannot convert|does not work|excluded modules"):
        peft_count(config, Lora(**options))


def test_patterns_on_merged_experts() -> None:
    """peft resolves a pattern by the names of the merged parameters, which nobody has in mind."""
    config = {"model_type": "mixtral", **TINY["mixtral"][0]}
    with pytest.raises(PlanError, match="peft has other names for the experts of this mixture; name layers: "):
        our_count(config, Lora(target_modules=r".*\.q_proj"))


# config.json as published, without what does not affect the count; and the count that the hub shows for the weights.
PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B": (
        8_030_261_248,
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    ),
    "meta-llama/Meta-Llama-3-70B": (
        70_553_706_496,
        {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
        | {"num_hidden_layers": 80, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    ),
    "meta-llama/Llama-3.2-1B": (
        1_235_814_400,
        {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}
        | {"num_hidden_layers": 16, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}
        | {"head_dim": 64},
    ),
    "Qwen/Qwen2.5-7B": (
        7_615_616_512,
        {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28}
        | {"num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
        | {"max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False},
    ),
    "Qwen/Qwen3-30B-A3B": (
        30_532_122_624,
        {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32}
        | {"num_hidden_layers": 48, "num_key_value_heads": 4, "vocab_size": 151936, "tie_word_embeddings": False}
        | {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
        | {"decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False},
    ),
    "mistralai/Mistral-7B-v0.1": (
        7_241_732_096,
        {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": 4096},
    ),
    "mistralai/Mixtral-8x7B-v0.1": (
        46_702_792_704,
        {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": None}
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    ),
    "google/gemma-2-9b": (
        9_241_705_984,
        {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16}
        | {"num_hidden_layers": 42, "num_key_value_heads": 8, "vocab_size": 256000, "head_dim": 256},
    ),
    "google/gemma-3-4b-it": (
        4_300_079_472,
        {
            "model_type": "gemma3",
            "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
            | {"num_hidden_layers": 34, "sliding_window": 1024},
            "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
            | {"num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896, "patch_size": 14}
            | {"vision_use_head": False},
        },
    ),
    "microsoft/Phi-3-mini-4k-instruct": (
        3_821_079_552,
        {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 32064, "sliding_window": 2047},
    ),
    "microsoft/phi-4": (
        14_659_507_200,
        {"model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920, "num_attention_heads": 40}
        | {"num_hidden_layers": 40, "num_key_value_heads": 10, "vocab_size": 100352, "sliding_window": None},
    ),
    "openai-community/gpt2": (
        124_439_808,
        {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257},
    ),
    "facebook/opt-350m": (
        331_196_416,
        {"model_type": "opt", "hidden_size": 1024, "ffn_dim": 4096, "num_attention_heads": 16, "vocab_size": 50272}
        | {"num_hidden_layers": 24, "word_embed_proj_dim": 512, "do_layer_norm_before": False},
    ),
    "tiiuae/falcon-7b": (
        6_921_720_704,
        {"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32}
        | {"vocab_size": 65024, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True},
    ),
    "bigscience/bloom-560m": (
        559_214_592,
        {"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "vocab_size": 250880},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    count, config = PUBLISHED[name]
    assert describe(config).parameters == count


def test_70b_takes_milliseconds() -> None:
    config, best = PUBLISHED["meta-llama/Meta-Llama-3-70B"][1], 1.0
    for _ in range(5):
        started = time.perf_counter()
        assert our_count(config, Lora(r=16)) == 207_093_760
        best = min(best, time.perf_counter() - started)
    assert best < 0.05  # 4 ms on an idle core


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "24"}, "config.json: hidden_size: got '24', need an integer >= 1"),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads: got 0"),
        ({"vocab_size": None}, "config.json: vocab_size: got None"),
        ({"num_hidden_layers": True}, "config.json: num_hidden_layers: got True"),
        ({"model_type": "gpt2", "n_embd": -1}, "config.json: n_embd: got -1"),
        ({"model_type": "gemma3", "vision_config": [1]}, "config.json: vision_config is not an object"),
    ],
)
def test_sizes_that_are_none(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError) as error:
        describe({"model_type": "llama", **BASE, **changes})
    assert said in str(error.value)


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to be changed."""
    return Path(shutil.copytree(tiny.path / "model", tmp_path / "model"))


def read(folder: Path, tiny: Tiny, need_weights: bool = False, **changes: Any) -> ModelShape:
    file = folder.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny.recipe(model__name_or_path=str(folder), **changes)))
    return read_model_shape(load_recipe(str(file)), need_weights)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def save(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)


def test_config_alone_gives_what_the_weights_give(tiny: Tiny, folder: Path) -> None:
    whole = read(folder, tiny)
    assert whole.parameters == sum(prod(tensor.shape) for tensor in whole.tensors) == 115_008
    assert whole.linear_parameters == 73_728
    assert whole.trainable_parameters == 4 * 2 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    assert (whole.hidden_size, whole.num_hidden_layers, whole.vocab_size, whole.head_dim) == (64, 2, 320, 16)
    (folder / "model.safetensors").unlink()
    assert read(folder, tiny) == whole
    assert read(folder, tiny, lora=None).trainable_parameters == 115_008
    with pytest.raises(PlanError, match=r"has no weights \(\*.safetensors\); add them"):
        read(folder, tiny, need_weights=True)


def test_what_else_lies_beside_the_weights_does_not_count(tiny: Tiny, folder: Path) -> None:
    whole = read(folder, tiny)
    save(folder / "consolidated.safetensors", {"layers.0.attention.wq.weight": (64, 64)})  # Mistral's own format
    assert read(folder, tiny) == whole
    shapes = {tensor.name: tensor.shape for tensor in whole.tensors}
    save(folder / "model.safetensors", shapes | {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)})
    assert read(folder, tiny, need_weights=True) == whole
    # Where weights and config.json disagree, the shapes of the weights count (loading them will fail).
    edit(folder / "config.json", intermediate_size=100)
    assert read(folder, tiny).tensors == whole.tensors


def test_shards(tiny: Tiny, folder: Path) -> None:
    whole = read(folder, tiny)
    shapes = {tensor.name: tensor.shape for tensor in whole.tensors}
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{1 + index % 2}.safetensors" for index, name in enumerate(shapes)}
    for file in set(files.values()):
        save(folder / file, {name: shapes[name] for name in shapes if files[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert read(folder, tiny, need_weights=True) == whole
    (folder / "model-2.safetensors").unlink()
    assert read(folder, tiny) == whole
    with pytest.raises(PlanError, match=r"lacks model-2.safetensors, listed in its index"):
        read(folder, tiny, need_weights=True)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(PlanError, match="is not an index of weights"):
        read(folder, tiny)


def test_unknown_family(tiny: Tiny, folder: Path) -> None:
    """With weights, their headers are counted; without weights, there is the simulation."""
    whole = read(folder, tiny)
    edit(folder / "config.json", model_type="fancy")
    counted = read(folder, tiny)
    for field in ("parameters", "trainable_parameters", "linear_parameters", "hidden_size", "head_dim", "vocab_size"):
        assert getattr(counted, field) == getattr(whole, field), field
    (folder / "model.safetensors").unlink()
    with pytest.raises(PlanError) as error:
        read(folder, tiny)
    assert str(error.value) == (
        f"model.name_or_path: {folder} has no weights (*.safetensors), and model_type fancy is not one of those that "
        "are planned from config.json by formula; add the weights, or plan where distft[train] is installed, which "
        "counts any transformers model"
    )


def test_hub_model_whose_config_alone_is_cached(
    tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    whole = read(folder, tiny)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(folder / "config.json"))
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump(tiny.recipe(model__name_or_path="owner/tiny")))
    recipe = load_recipe(str(tmp_path / "hub.yaml"))
    assert read_model_shape(recipe, need_weights=True).tensors == whole.tensors
    (folder / "model.safetensors").unlink()
    assert read_model_shape(recipe).tensors == whole.tensors
    with pytest.raises(PlanError, match="owner/tiny is neither a folder beside the recipe nor a readable hub model"):
        read_model_shape(recipe, need_weights=True)


MODELOPT = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}


@pytest.mark.parametrize(
    ("file", "said", "kind"),
    [
        ("hf_quant_config.json", MODELOPT, "modelopt"),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, "awq"),
    ],
)
def test_a_file_beside_says_that_weights_are_quantized(
    file: str, said: dict[str, Any], kind: str, tiny: Tiny, folder: Path, tmp_path: Path
) -> None:
    """What modelopt, AutoGPTQ and AutoAWQ write in files of their own is as good as config.json's word."""
    (folder / file).write_text(json.dumps(said))
    (folder / "model.safetensors").unlink()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(model__name_or_path=str(folder))))
    for command in ("plan", "validate", "launch"):
        done = distft(command, "recipe.yaml", cwd=tmp_path)
        assert done.returncode == 2
        assert f"its weights are quantized ({kind}), and nothing is trained on top of these" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_files_beside_that_say_nothing_of_the_weights(tiny: Tiny, folder: Path) -> None:
    """Quantized keys and values alone, a file that is no JSON; and config.json has the last word."""
    whole = read(folder, tiny).config
    cache_only = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(cache_only))
    (folder / "quant_config.json").write_text("[")
    assert read(folder, tiny).config == whole
    edit(folder / "config.json", quantization_config={"quant_method": "fp8"})
    (folder / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    assert read(folder, tiny).config["quantization_config"] == {"quant_method": "fp8"}


@pytest.mark.parametrize(
    ("leaf", "dtype", "code"),
    [("weight", "float8_e4m3fn", "F8_E4M3"), ("weight", "int32", "I32"), ("qweight", "int32", "I32")],
)
@pytest.mark.parametrize("family", ["llama", "opt"])  # planned by formula, and counted
def test_quantized_weights_that_nothing_explains(
    leaf: str, dtype: str, code: str, family: str, tiny: Tiny, folder: Path, tmp_path: Path
) -> None:
    """transformers would load the numbers without their scales, or fail in the ranks."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.{leaf}"] = tensors.pop(f"{name}.weight").to(getattr(torch, dtype))
    save_file(tensors, folder / "model.safetensors")
    edit(folder / "config.json", model_type=family)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(model__name_or_path=str(folder))))
    for command in ("plan", "validate", "launch"):
        done = distft(command, "recipe.yaml", cwd=tmp_path)
        assert done.returncode == 2
        assert f"has {name}.{leaf} in {code}, and no quantization_config in its config.json" in done.stderr
    edit(folder / "config.json", quantization_config={"quant_method": "fp8"}, model_type="llama")
    assert read(folder, tiny).parameters == 115_008


def test_buffers_of_integers_are_no_quantized_weights(tiny: Tiny, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    whole = read(folder, tiny)
    buffers = {"attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8), "position_ids": torch.arange(4)}
    save_file(load_file(folder / "model.safetensors") | buffers, folder / "model.safetensors")
    assert read(folder, tiny, need_weights=True) == whole


def test_planning_takes_no_weights_and_launching_does(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(model__name_or_path=str(folder))))
    for command in (["validate", "recipe.yaml"], ["render", "recipe.yaml", "-o", "out"]):
        done = distft(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["model"] == {
        "name": str(folder),
        "parameters": 115_008,
        "trainable_parameters": 8192,
    }
    assert distft("launch", "recipe.yaml", "--dry-run", cwd=tmp_path).returncode == 0
    done = distft("launch", "recipe.yaml", cwd=tmp_path)
    lines = (tmp_path / "recipe.yaml").read_text().splitlines()
    at = f"recipe.yaml:{next(number for number, line in enumerate(lines, 1) if 'name_or_path' in line)}"
    assert done.returncode == 2
    assert done.stderr == f"error: model.name_or_path: {folder} has no weights (*.safetensors); add them ({at})\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("kind", "fix"),
    [
        ("LORA", r"to go on with it, name its base here \(owner/base\) and set lora\.start_from: "),
        (
            "IA3",
            r"of the kind IA3, .* to train a new one, name its base here \(owner/base\); to train on top of it, merge",
        ),
        ("PROMPT_TUNING", r"of the kind PROMPT_TUNING, .* to train a new one, name its base here \(owner/base\)$"),
    ],
)
def test_adapters_in_the_wrong_place(kind: str, fix: str, tmp_path: Path) -> None:
    """An adapter's folder as the model, and an adapter that cannot be started from, are named for what they are."""
    import torch
    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": kind, "r": None, "base_model_name_or_path": "owner/base"})
    )
    save_file({"base_model.model.k_proj.ia3_l": torch.ones(4)}, tmp_path / "adapter_model.safetensors")
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    recipe.write_text(f"{{name: a, model: {{name_or_path: {tmp_path}}}, data: {{train: rows.jsonl}}}}")
    with pytest.raises(PlanError, match=fix) as error:
        read_model_shape(load_recipe(recipe))
    assert f"{tmp_path} is a peft adapter" in str(error.value)
    assert ("set lora.start_from" in str(error.value)) == (kind == "LORA")
    if kind != "LORA":
        with pytest.raises(PlanError, match=f"is an adapter of the kind {kind}, and only LORA and OFT can be started"):
            check_start(tmp_path, load_recipe(recipe), ModelShape("owner/base", 0, 4, 0))
