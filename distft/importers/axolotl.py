"""axolotl's YAML. Names and defaults: src/axolotl/utils/schemas/*.py; what they become: core/builders/base.py and
causal.py, loaders/*.py (axolotl 0.17, commit 067b021)."""

from __future__ import annotations

import re

from distft.config.recipe import INITIAL_WEIGHTS
from distft.importers import axolotl_data, axolotl_training, common, freezing
from distft.importers.common import SPEED
from distft.importers.draft import Left
from distft.importers.options import Options
from distft.importers.sharding import needs_groups, read_deepspeed, read_fsdp
from distft.importers.tables import table

NAME = "axolotl"
_LEGACY_ATTENTION = (
    "flash_attention",
    "sdp_attention",
    "flex_attention",
    "xformers_attention",
    "eager_attention",
    "sage_attention",
)
CHUNKED = "training.loss: chunked does the same, with every model"
_PLUGINS = {
    "CutCrossEntropyPlugin": CHUNKED,
    "LigerPlugin": "training.use_liger_kernel, where one of its options is on",
    "SwanLabPlugin": "no effect on what is trained; training.report_to: [swanlab]",
    "LMEvalPlugin": "no benchmarks are run after training",
    "KernelsPlugin": SPEED,
    "ExpertParallelPlugin": SPEED,
}


def read(options: Options) -> None:
    """All of a file."""
    _model(options)
    _lora(options)
    axolotl_data.read(options)
    axolotl_training.read(options)
    _parallelism(options)
    _weights(options)
    _plugins(options)
    if options.is_on("torch_compile") and options.data.get("torch_compile_backend") in (None, "inductor"):
        common.compiled(options, "torch_compile")
    for name in ("axolotl", "logging"):
        table(name).apply(options)
    options.finish(_LEGACY_ATTENTION, NAME)


def _weights(options: Options) -> None:
    """core/builders/base.py, _configure_precision_settings: `full` is without autocast. loaders/model.py loads weights
    in bf16 for `true`, too, and keeps norms and embeddings in float32; FSDP and DeepSpeed make them all float32."""
    draft = options.draft
    if options.data.get("bf16") == "full":
        common.bf16_weights(options, "bf16")
        return
    usual = {"lora": False, "training.mixed_precision": "bf16", "parallelism.strategy": "ddp"}
    if {name: draft.fields.get(name, other) for name, other in usual.items()} == usual | {"lora": None}:
        draft.warn(
            "bf16: axolotl's weights are bf16 here, but for norms and embeddings, and distft's float32: more exact, "
            "and larger; training.master_weights: none is nearer to it"
        )


def _model(options: Options) -> None:
    path = common.base_model(options, "base_model", "revision_of_model", "model_revision")
    if path is None:
        return
    common.model_class(options, "model_type")
    common.tokenizer_class(options, "tokenizer_type")
    if options.take("base_model_config") == path:
        options.drop("base_model_config", "the model's own")
    if options.take("tokenizer_config") == path:
        options.drop("tokenizer_config", "the model's own")
    for name in ("base_model_config", "tokenizer_config"):
        if options.data.get(name) != path:
            options.taken.discard(name)
    _attention(options)
    _tokens(options)
    parts = {part.removeprefix("^").removesuffix(".*") for part in options.texts("unfrozen_parameters")}
    if parts and options.is_on("adapter"):
        options.refuse("unfrozen_parameters", "distft trains adapters, or weights of the model")
    elif parts >= {"model.language_model", "lm_head"}:
        options.drop("unfrozen_parameters", "the whole language model is trained, and distft loads nothing else")
    elif parts:
        freezing.unfrozen_parameters(options, "unfrozen_parameters")


def _attention(options: Options) -> None:
    name = next((name for name in ("attn_implementation", *_LEGACY_ATTENTION) if options.is_on(name)), None)
    for other in ("attn_implementation", *_LEGACY_ATTENTION):
        options.taken.add(other)
    if name is None:
        return
    legacy = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
    value = options.text(name) if name == "attn_implementation" else legacy.get(name, name)
    if value == "fp8":
        options.refuse(name, "distft computes attention in bf16, fp16 or float32")
    elif value is not None:
        common.attention(options, name, value)


def _tokens(options: Options) -> None:
    draft = options.draft
    for name in ("special_tokens", "tokens"):
        if isinstance(options.data.get(name), list):
            common.add_tokens(options, name, options.texts(name))
            continue
        group = options.group(name)
        common.special_tokens(group)
        group.finish((), f"axolotl's {name}")
    if eot := options.texts("eot_tokens"):
        options.drop("eot_tokens", "distft trains the token that the chat template prints at the end of a turn")
        draft.warn(
            f"eot_tokens: {', '.join(eot)} must be what the chat template prints at the end of an answer, as `distft "
            "data` shows it"
        )


# loaders/adapter.py: passed to peft as they are.
_OF_SOME_LAYERS = {
    "lora_exclude_modules": "exclude_modules",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_layers_to_transform": "layers_to_transform",
}


def _lora(options: Options) -> None:
    draft, adapter = options.draft, options.text("adapter")
    is_4bit, is_8bit = options.flag("load_in_4bit"), options.flag("load_in_8bit")
    if adapter is None:
        draft.set("lora", None, "adapter", "null", options.line("adapter"))
        for name in ("load_in_4bit", "load_in_8bit"):
            if options.is_on(name):
                options.refuse(name, "quantized weights can be trained with adapters alone")
        _drop_rest(options, ("lora_", "peft_", "loraplus_"), "there is no adapter")
        return
    if adapter not in ("lora", "qlora"):
        options.refuse("adapter", "of axolotl's adapters distft has lora and qlora")
        return
    # loaders/model.py: nf4 with double quantization; 8 bit for `adapter: lora` only.
    if is_4bit:
        options.set("model.quantization", "load_in_4bit", "nf4")
        common.bnb_options(options.group("bnb_config_kwargs"))
    elif is_8bit:
        options.set("model.quantization", "load_in_8bit", "int8")
    elif adapter == "qlora":
        draft.problems.append("adapter: qlora needs load_in_4bit: true, as axolotl does")
    rank = options.integer("lora_r")
    if rank is not None:
        options.set("lora.r", "lora_r", rank)
    draft.default("lora.r", 8, "lora_r")  # peft's LoraConfig
    alpha = options.number("lora_alpha")
    if alpha is not None:
        options.set("lora.lora_alpha", "lora_alpha", alpha)
    draft.default("lora.lora_alpha", 8, "lora_alpha")
    if options.number("lora_dropout"):
        options.set("lora.lora_dropout", "lora_dropout", options.number("lora_dropout"))
    draft.default("lora.lora_dropout", 0.0, "lora_dropout")
    _targets(options)
    if options.flag("peft_use_dora"):
        options.set("lora.use_dora", "peft_use_dora", True)
    if options.flag("peft_use_rslora"):
        options.set("lora.use_rslora", "peft_use_rslora", True)
    if start := options.text("lora_model_dir"):
        options.set("lora.start_from", "lora_model_dir", draft.model_path(start))
    common.modules_to_save(options, "lora_modules_to_save")
    common.loraplus(options)
    for name, field in _OF_SOME_LAYERS.items():
        if options.is_on(name) or options.data.get(name) == 0:  # block 0
            options.set(f"lora.{field}", name, options.take(name))
        options.taken.add(name)
    weights = options.take("peft_init_lora_weights")
    if weights and re.fullmatch(INITIAL_WEIGHTS, str(weights)):
        options.set("lora.init_lora_weights", "peft_init_lora_weights", weights)
    elif weights not in (None, True):
        options.refuse("peft_init_lora_weights", "distft has gaussian, orthogonal, olora and pissa")


def _targets(options: Options) -> None:
    """loaders/adapter.py: the union of the names and, with lora_target_linear, of all linear layers."""
    given, linear = options.take("lora_target_modules"), options.flag("lora_target_linear")
    if linear:
        options.set("lora.target_modules", "lora_target_linear", "all-linear")
        if given:
            options.drop("lora_target_modules", "lora_target_linear has them all")
    elif given:
        common.target_modules(options, "lora_target_modules")
    else:
        options.draft.refused.append(
            Left("lora_target_modules", None, "missing: peft would choose by the type of the model; name them")
        )


def _drop_rest(options: Options, prefixes: tuple[str, ...], why: str) -> None:
    for name, value in options.data.items():
        if name.startswith(prefixes) and name not in options.taken:
            if value is not None and name not in table("axolotl").dropped:
                options.drop(name, why)
            options.taken.add(name)


# ---- parallelism


def _parallelism(options: Options) -> None:
    read_deepspeed(options, "deepspeed")
    flags = options.take("fsdp")
    config = options.group("fsdp_config")
    flags = flags.split() if isinstance(flags, str) else flags if isinstance(flags, list) else []
    if flags or config.data:
        read_fsdp([str(flag) for flag in flags], config, options, "fsdp" if flags else "fsdp_config")
    options.drop_all({"fsdp_version": "distft uses FSDP2, which trains the same"})
    draft, names = options.draft, ("dp_shard_size", "dp_replicate_size", *axolotl_training.SHARED)
    sizes = {name: size for name in names if (size := options.integer(name) or 1) > 1}
    shards, replicas = sizes.get("dp_shard_size", 1), sizes.get("dp_replicate_size", 1)
    if shards > 1 or replicas > 1:
        name = "dp_replicate_size" if replicas > 1 else "dp_shard_size"
        needs_groups(draft, shards, replicas, options, name)
        draft.needs_gpus(sizes)


def _plugins(options: Options) -> None:
    for plugin in options.texts("plugins"):
        last = plugin.rpartition(".")[2]
        if last in _PLUGINS:
            options.draft.dropped.append(Left("plugins", plugin, _PLUGINS[last], options.line("plugins")))
        else:
            why = "distft runs no plugins; this one may change what is trained"
            options.draft.refused.append(Left("plugins", plugin, why, options.line("plugins")))
    fused = ("liger_fused_linear_cross_entropy", "liger_cross_entropy")
    for name in filter(options.is_on, fused):
        options.drop(name, CHUNKED)
    ours = (*fused, "liger_use_token_scaling")
    kernels = [name for name in options.data if name.startswith("liger_") and name not in ours and options.is_on(name)]
    if kernels:
        options.set("training.use_liger_kernel", kernels[0], True)
        options.taken |= set(kernels)
    if options.is_on("liger_use_token_scaling"):
        options.refuse("liger_use_token_scaling", "distft has the losses nll, dft and eaft")
    options.taken |= {name for name in options.data if name.startswith("liger_")}
    if options.is_on("quantize_moe_experts"):
        options.drop("quantize_moe_experts", "experts are not quantized: the base is more exact, and larger")
        options.draft.warn("quantize_moe_experts: distft keeps experts in 16 bits, in four times the memory of 4 bits")
    options.taken.add("quantize_moe_experts")
