"""LLaMA-Factory's v1 trainer: its YAML, and the YAML of data sets that it names. Names and defaults:
src/llamafactory/v1/config/*.py and the plugins' parameters; what they become:
core/base_trainer.py, core/data_engine.py, core/rendering/, core/utils/batching.py, plugins/ (ff6d4d1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distft.config.schema_text import show
from distft.errors import RecipeError
from distft.importers import common, freezing
from distft.importers.common import SPEED
from distft.importers.datasets import DataSet, Format, set_formats, simplest, sources, with_share
from distft.importers.options import Options, read_yaml
from distft.importers.sharding import SPLIT, TUNING, needs_groups, read_deepspeed, set_strategy
from distft.importers.tables import table

NAME = "LLaMA-Factory v1"
KEYS = {"train_dataset", "peft_config", "dist_config", "kernel_config", "quant_config", "optim_config", "model_class"}
_ADAMW_DECAY = 0.01  # torch's, of all weights
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt"}  # plugins/data_plugins/converter.py


def read(options: Options) -> None:
    """All of a file."""
    _model(options)
    _adapter(options)
    _quantization(options)
    _data(options)
    _training(options)
    _parallelism(options)
    for name in ("llama_factory_v1", "logging"):
        table(name).apply(options)
    options.finish((), NAME)


def _model(options: Options) -> None:
    if common.base_model(options, "model") is None:
        return
    if options.text("model_class") not in (None, "llm"):
        options.refuse("model_class", "distft trains causal language models alone")
    elif options.has("model_class"):
        options.drop("model_class", "AutoModelForCausalLM finds the class")
    if value := options.text("flash_attn"):
        common.attention(options, "flash_attn", value)
    if template := options.text("custom_chat_template"):
        common.jinja(options, "custom_chat_template", template)
    kernels = options.group("kernel_config")
    names = [name.strip() for name in (kernels.text("name") or "").split(",")]
    if "liger_kernel" in names:
        kernels.set("training.use_liger_kernel", "name", True)
    elif kernels.data:
        kernels.drop("name", SPEED)
    kernels.drop_all(dict.fromkeys(("include_kernels", "chunk_size", "require_logits"), SPEED))
    kernels.finish((), "kernel_config")


def _adapter(options: Options) -> None:
    """plugins/model_plugins/peft.py, LoraParams."""
    draft, group = options.draft, options.group("peft_config")
    kind = group.text("name")
    if not group.data:
        draft.set("lora", None, "peft_config", "null", options.line("peft_config"))
        return
    if kind == "freeze":
        _freeze(group)
        return
    if kind != "lora":
        group.refuse("name", "distft trains all weights, a part of them, LoRA or OFT")
        group.taken |= set(group.data)
        return
    for name, field, default in (("r", "lora.r", 8), ("lora_alpha", "lora.lora_alpha", 16)):
        if (value := group.integer(name)) is not None:
            group.set(field, name, value)
        draft.default(field, default, name)
    common.plain_number(group, "lora_dropout", "lora.lora_dropout", 0.05)
    if isinstance(group.data.get("target_modules"), str) and group.data["target_modules"] != "all":
        group.data["target_modules"] = [group.data["target_modules"]]  # a name, where peft takes a regular expression
    common.target_modules(group, "target_modules")
    draft.default("lora.target_modules", "all-linear", "target_modules")
    for name in ("use_rslora", "use_dora"):
        if group.flag(name):
            group.set(f"lora.{name}", name, True)
    common.modules_to_save(group, "modules_to_save")
    adapters = group.texts("adapter_name_or_path")
    if len(adapters) > 1:
        group.refuse("adapter_name_or_path", "distft starts from one adapter; merge the others first")
    elif adapters:
        group.set("lora.start_from", "adapter_name_or_path", draft.model_path(adapters[0]))
    export = ("export_dir", "export_size", "export_hub_model_id", "infer_dtype", "export_legacy_format")
    group.drop_all(dict.fromkeys(export, "`distft merge` merges a run's adapter"))
    group.finish((), "peft_config")


def _freeze(group: Options) -> None:
    """FreezeParams, of the same file."""
    group.set("lora", "name", None)
    given = (group.take(f"freeze_{name}_modules") for name in ("trainable", "extra"))
    modules, extra = (value.split(",") if isinstance(value, str) else value or [] for value in given)
    freezing.layers(group, [name.strip() for name in modules] or ["all"], [name.strip() for name in extra])
    group.drop_all({"cast_trainable_params_to_fp32": "trained weights are float32"})
    group.finish((), "peft_config")


def _quantization(options: Options) -> None:
    """plugins/model_plugins/quantization.py, BnbParams: 4 bits, unless `auto` says nothing."""
    draft, group = options.draft, options.group("quant_config")
    if not group.data:
        return
    name, bits = group.text("name"), group.integer("quantization_bit")
    if name not in ("bnb", "auto") or bits not in (None, 4, 8):
        group.refuse("name", "distft quantizes with bitsandbytes, to 4 or 8 bits")
    elif bits == 8:
        group.set("model.quantization", "quantization_bit", "int8")
    elif bits == 4 or name == "bnb":
        group.set("model.quantization", "quantization_bit" if bits else "name", "nf4")
        draft.warn("quant_config.compute_dtype: distft computes in training.mixed_precision, LLaMA-Factory in float16")
    if draft.fields.get("model.quantization") and draft.fields.get("lora", True) is None:
        group.refuse("name", "quantized weights can be trained with adapters alone")
    if (kind := group.text("quantization_type")) not in (None, "nf4"):
        group.refuse("quantization_type", f"distft has nf4, not {kind}")
    if group.flag("double_quantization") is False:
        group.drop("double_quantization", "distft quantizes the constants of nf4 too")
        draft.warn("double_quantization: the base differs by the rounding of nf4's constants")
    group.drop_all({"compute_dtype": "training.mixed_precision is used"})
    group.finish((), "quant_config")


# ---- data


def _data(options: Options) -> None:
    draft = options.draft
    common.max_length(options, "cutoff_len", 2048)
    draft.default("data.long_rows", "truncate", "cutoff_len")
    _batching(options)
    # core/data_engine.py, _prefix_cuts: a row for each answer, which is its last turn and keeps its thought
    draft.default("data.train_on", "all_with_reasoning", "train_dataset")
    draft.warn(
        "data.chat_template: the tokenizer's own, as LLaMA-Factory v1 takes it; but there each answer is a row of its "
        "own, enable_thinking is on where it has a thought, and a tokenizer without a template gets ChatML: compare "
        "the rows with `distft data`"
    )
    path = options.text("train_dataset")
    if path is None:
        draft.problems.append(f"train_dataset is missing ({draft.file.name})")
        return
    described, entries = _described(options, path), list[Any]()
    formats = []
    for one in described:
        entries += _entries(one)
        formats.append(Format(one, "converter", _format(one)))
    if entries:
        options.set("data.train", "train_dataset", simplest(entries))
    set_formats(draft, formats)
    for one in described:
        one.finish((), "a data set")


def _batching(options: Options) -> None:
    """plugins/trainer_plugins/batching.py."""
    strategy = options.text("batching_strategy") or "normal"
    if strategy == "dynamic_padding_free":
        options.set("data.packing", "batching_strategy", "auto")
        options.draft.warn(
            "batching_strategy: a step has as many tokens; LLaMA-Factory fills micro-batches with rows as they come, "
            "distft packs them into rows of cutoff_len"
        )
    elif strategy in ("normal", "padding_free"):
        if options.has("batching_strategy"):
            options.drop("batching_strategy", "a step has the same rows; " + SPEED)
    else:
        options.refuse(
            "batching_strategy",
            "how many rows a step has would depend on their padding; dynamic_padding_free is data.packing",
        )
    options.draft.default("data.packing", False, "batching_strategy")


def _described(options: Options, path: str) -> list[Options]:
    """core/data_engine.py, _get_dataset_info: a YAML of data sets, or a data set."""
    draft, steps = options.draft, (Path(path).name,)
    found = draft.locate(path)
    if not path.endswith(".yaml"):
        return [Options(draft, {"path": path, **({"source": "local"} if found else {})}, steps=("train_dataset",))]
    if found is None:
        where = options.where("train_dataset")
        draft.problems.append(f"train_dataset: no such file: {path}{draft.near(path)} ({where}); download it")
        return []
    try:
        data = read_yaml(found).data
    except RecipeError as error:
        draft.problems.append(f"train_dataset: {error}")
        return []
    group = Options(draft, data, steps=steps)
    return [group.group(name) for name in data]


def _entries(one: Options) -> list[Any]:
    """The entries of data.train for a data set. Of `size` and `weight`: plugins/data_plugins/loader.py."""
    draft, path = one.draft, one.text("path")
    size, weight, source = one.integer("size"), one.number("weight"), one.text("source") or "hf_hub"
    if source not in ("hf_hub", "local"):
        one.refuse("source", "distft reads files and Hugging Face's hub alone")
    if one.flag("streaming"):
        one.refuse("streaming", "distft does not stream: a run has a fixed number of rows")
    if path is None:
        draft.problems.append(f"{one.path('path')} is missing ({draft.file.name})")
        return []
    found = sources(draft, DataSet(path, one.text("split")), one.path("split"))
    if found is None:
        one.refuse("split", "data.train takes a whole split, or a share of it")
    if not (size or weight):
        return found or []
    draft.warn(
        f"{one.path('size' if size else 'weight')}: the rows are drawn by training.seed, none of them twice where "
        "there are enough; LLaMA-Factory draws with repetition"
    )
    share = {"rows": int(size * (weight or 1))} if size else {"epochs": weight}
    return with_share(found or [], share)


def _format(one: Options) -> dict[str, Any]:
    draft, converter = one.draft, one.text("converter")
    if converter == "pair":
        one.refuse("converter", "distft trains on examples alone; this needs preferences")
        return {}
    if converter not in _FORMATS:
        one.refuse(
            "converter",
            "distft does not read rows in LLaMA-Factory's own form (content of type and value); write them as messages",
        )
        return {}
    if converter == "alpaca":
        draft.warn(
            f"{one.path('converter')}: LLaMA-Factory puts no line break between instruction and input, and reads no "
            "history"
        )
    return {"data.format": _FORMATS[converter]}


# ---- training


def _training(options: Options) -> None:
    """config/training_args.py; core/base_trainer.py: torch's AdamW at a constant rate, the mean over all tokens."""
    draft = options.draft
    _batch(options)
    common.duration(options, "num_train_epochs", 3)
    common.plain_number(options, "learning_rate", "training.learning_rate", 1e-4)
    common.plain_number(options, "max_grad_norm", "training.max_grad_norm", 1.0)
    draft.default("training.lr_scheduler_type", "constant", "lr_scheduler_config")
    _optimizer(options.group("optim_config"))
    draft.default("training.optim", "adamw_torch", "optim_config")
    draft.default("training.weight_decay", _ADAMW_DECAY, "optim_config")
    common.norms_decay(draft)
    if (seed := options.integer("seed")) is not None:
        options.set("training.seed", "seed", seed)
    draft.default("training.seed", 42, "seed")
    if (checkpointing := options.flag("enable_activation_checkpointing")) is not None:
        options.set("training.gradient_checkpointing", "enable_activation_checkpointing", checkpointing)
    for name in ("save_steps", "save_total_limit"):
        if value := options.integer(name):
            options.set(f"checkpoint.{name}", name, value)
    if folder := options.text("output_dir"):
        options.set("output_dir", "output_dir", folder)


def _optimizer(group: Options) -> None:
    """plugins/trainer_plugins/optimizers/optimizer.py, create_muon_optimizer."""
    draft, name = group.draft, group.text("name")
    if not group.data:
        return
    if name != "muon":
        group.refuse("name", "distft does not have this optimizer")
        group.taken |= set(group.data)
        return
    group.set("training.optim", "name", "muon")
    if draft.fields.get("lora", True) is not None:
        group.refuse("name", "distft's Muon is for the model's own matrices; here adapters have AdamW")
    common.plain_number(group, "wd", "training.weight_decay", 0.1)
    for option, ours in (("momentum", 0.95), ("ns_steps", 5), ("nesterov", True)):
        if group.take(option) not in (None, ours):
            group.refuse(option, f"distft's Muon has {show(ours)}, as torch's")
        elif group.has(option):
            group.drop(option, "distft's Muon has the same")
    betas = group.take("adamw_betas")
    first, second = betas if isinstance(betas, list) and len(betas) == 2 else (0.9, 0.95)
    draft.set("trainer.overrides.adam_beta1", first, "optim_config.adamw_betas", betas)
    draft.fields["trainer.overrides.adam_beta2"] = second
    if (epsilon := group.number("adamw_eps")) is not None and epsilon != 1e-8:
        group.set("trainer.overrides.adam_epsilon", "adamw_eps", epsilon)
    group.drop_all({"lr": "learning_rate is used", "adamw_eps": "distft's is the same"})
    group.finish((), "Muon")


def _batch(options: Options) -> None:
    """core/utils/batching.py: global_batch_size, or one micro-batch on each group of cp_size GPUs."""
    micro, total, size = (options.integer(name) for name in ("micro_batch_size", "global_batch_size", "cp_size"))
    if size is not None:
        options.drop("cp_size", SPLIT)
    options.drop_all({"cp_mode": SPLIT})
    if total:
        options.set("training.global_batch_size", "global_batch_size", total)
        if micro is not None:
            options.drop("micro_batch_size", "distft chooses it: global_batch_size says how many rows a step has")
    else:
        shared = {"cp_size": size} if size and size > 1 else {}
        options.draft.global_batch_size({"micro_batch_size": micro or 1}, shared)


def _parallelism(options: Options) -> None:
    """plugins/trainer_plugins/distributed/: FSDP2 computes in bf16, DeepSpeed as its config says, DDP in the weights'
    own precision."""
    draft, group, bf16 = options.draft, options.group("dist_config"), options.flag("bf16")
    kind = group.text("name")
    if not group.data:
        set_strategy(options, "dist_config", "ddp")
    elif kind == "deepspeed":
        read_deepspeed(group, "config_file")
    elif kind in ("fsdp2", "fsdpturbo"):
        set_strategy(group, "name", "fsdp", "all" if group.flag("offload_params") else "none")
        if group.is_on("dcp_path"):
            group.refuse("dcp_path", "distft starts from a model as transformers saves it")
        group.drop_all({"dcp_path": "not set", "ep_size": SPLIT})
        tuning = "reshard_after_forward pin_memory ep_dispatcher fsdp_ignored_modules hook_modules fsdp_implementation"
        group.drop_all(dict.fromkeys(tuning.split(), TUNING))
    else:
        group.refuse("name", "distft has DDP, DeepSpeed's ZeRO and FSDP2")
    group.finish((), "dist_config")
    replicas, shards = options.integer("mp_replicate_size") or 1, options.integer("mp_shard_size")
    if replicas > 1:
        needs_groups(draft, shards or (draft.gpus or 1) // replicas, replicas, options, "mp_replicate_size")
    options.drop_all({"mp_replicate_size": TUNING, "mp_shard_size": TUNING})
    if kind in ("fsdp2", "fsdpturbo") and bf16 is False:
        options.set("training.mixed_precision", "bf16", "no")
    elif not group.data and draft.fields.get("lora", True) is None:
        draft.default("training.mixed_precision", "no", "dist_config")
        options.drop_all({"bf16": "without dist_config, LLaMA-Factory computes in float32, as the weights are"})
    elif bf16 is not None and kind in ("fsdp2", "fsdpturbo"):
        options.set("training.mixed_precision", "bf16", "bf16")
    else:
        draft.default("training.mixed_precision", "bf16", "bf16")
        options.drop_all({"bf16": "LLaMA-Factory reads it with FSDP2 alone"})
