"""torchtune's YAML: components by name, with their arguments, and OmegaConf's ${references}. Names and defaults:
recipes/*_finetune_*.py, torchtune/datasets/*.py, torchtune/models/*/_model_builders.py (bd2a0fc)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from distft.config.schema_text import show
from distft.importers import common
from distft.importers.datasets import DataSet, read_split, simplest, sources
from distft.importers.draft import Draft, Left
from distft.importers.options import Options
from distft.importers.sharding import SPLIT, set_strategy
from distft.importers.tables import table

NAME = "torchtune"
_COMPONENT = "_component_"
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_MOST_NESTED = 20

_OPTIMIZERS = {
    "torch.optim.AdamW": "adamw_torch",
    "bitsandbytes.optim.AdamW": "adamw_torch",
    "bitsandbytes.optim.AdamW8bit": "adamw_bnb_8bit",
    "bitsandbytes.optim.PagedAdamW": "paged_adamw_32bit",
    "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
}
_ADAMW_DECAY = 0.01  # of torch's and bitsandbytes' AdamW
_SAME_LOSSES = ("LinearCrossEntropyLoss", "CEWithChunkedOutputLoss", "CrossEntropyLoss")
_SAMPLES = {"alpaca_dataset": "tatsu-lab/alpaca", "alpaca_cleaned_dataset": "yahma/alpaca-cleaned"}
_EXAMPLES = "distft trains on examples alone; this needs preferences or a reward"
# Tokenizers whose prompt_template is none, so that messages are put together without a word between
# (torchtune/models/*/_tokenizer.py). The others write a chat format of their own.
_PLAIN_TOKENIZERS = ("llama2_tokenizer", "gemma_tokenizer", "gemma2_tokenizer")
# Its names of layers → transformers' (torchtune/models/convert_weights.py).
_LAYERS = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")


def resolved(data: dict[str, Any], draft: Draft) -> dict[str, Any]:
    """The data with every ${reference} replaced by what it names; those that name nothing are problems."""

    def look_up(path: str) -> Any:
        value: Any = data
        for step in path.split("."):
            if not isinstance(value, dict) or step not in value:
                raise KeyError(path)
            value = value[step]
        return value

    def fill(value: Any, depth: int) -> Any:
        if depth > _MOST_NESTED:
            raise KeyError("references in a circle")
        if isinstance(value, dict):
            return {key: fill(inner, depth) for key, inner in value.items()}
        if isinstance(value, list):
            return [fill(inner, depth) for inner in value]
        if not isinstance(value, str) or "${" not in value:
            return value
        if whole := _REFERENCE.fullmatch(value):
            return fill(look_up(whole[1]), depth + 1)
        done = _REFERENCE.sub(lambda match: str(fill(look_up(match[1]), depth + 1)), value)
        if "${" in done:
            raise KeyError(value)
        return done

    result: dict[str, Any] = {}
    for key, value in data.items():
        try:
            result[key] = fill(value, 0)
        except KeyError as error:
            draft.problems.append(f"{key}: cannot resolve {show(error.args[0])} ({draft.file.name})")
    return result


def read(options: Options) -> None:
    """All of a file."""
    referred = set(re.findall(r"\$\{([\w-]+)", str(options.data)))
    options.data = resolved(options.data, options.draft)
    component = _component(options.group("model"))
    if component is None or any(options.is_on(name) for name in ("teacher_model", "policy_model", "ppo_batch_size")):
        options.draft.refused.append(
            Left("model", None, "not a file for fine-tuning on examples", options.line("model"))
        )
        return
    _model(options, component)
    _data(options)
    _training(options)
    _parallelism(options)
    parts = options.data.get("compile")
    if options.is_on("compile") and (not isinstance(parts, dict) or parts.get("model", True)):
        common.compiled(options, "compile")
    if logger := _component(options.group("metric_logger")):
        tracker = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard", "CometLogger": "comet_ml"}
        if name := tracker.get(logger.rpartition(".")[2]):
            options.set("training.report_to", "metric_logger", [name])
        else:
            options.drop("metric_logger", "every step is in metrics.jsonl")
    if options.is_on("quantizer"):
        options.refuse("quantizer", "distft does not train with simulated quantization")
    options.taken |= {"quantizer", "model", "tokenizer", "checkpointer", "optimizer", "lr_scheduler", "loss", "dataset"}
    table("torchtune").apply(options)
    options.drop_all(dict.fromkeys(sorted(referred & set(options.data)), "filled in where it is referred to"))
    options.finish((), NAME)


def _component(options: Options) -> str | None:
    return options.text(_COMPONENT)


# ---- model


def _model(options: Options, component: str) -> None:
    draft, model, checkpointer = options.draft, options.group("model"), options.group("checkpointer")
    model.taken.add(_COMPONENT)
    name = component.rpartition(".")[2]
    if "vision" in component or "multimodal" in component or "llama4" in component:
        model.refuse(_COMPONENT, "distft trains causal language models on text alone")
    if "classifier" in component:
        model.refuse(_COMPONENT, "distft trains causal language models alone")
    folder = checkpointer.text("checkpoint_dir")
    kind = (_component(checkpointer) or "").rpartition(".")[2]
    if folder is None:
        draft.problems.append(f"checkpointer.checkpoint_dir is missing ({draft.file.name})")
        return
    if kind != "FullModelHFCheckpointer":
        checkpointer.refuse(_COMPONENT, "distft reads models in transformers' layout")
    draft.set(
        "model.name_or_path",
        draft.model_path(folder.rstrip("/") or folder),
        "checkpointer.checkpoint_dir",
        folder,
        checkpointer.line("checkpoint_dir"),
    )
    if checkpointer.is_on("adapter_checkpoint"):
        checkpointer.refuse("adapter_checkpoint", "distft starts from adapters in peft's layout")
    table("torchtune_checkpointer").apply(checkpointer)
    checkpointer.finish((), "torchtune's checkpointer")
    if "lora" in name:
        _lora(model, name)
    else:
        draft.set("lora", None, "model._component_", component, model.line(_COMPONENT))
        if model.is_on("quantize_base"):
            model.refuse("quantize_base", "quantized weights can be trained with adapters alone")
    model.finish(_ARCHITECTURE, "torchtune's models")


_ARCHITECTURE = ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "embed_dim", "max_seq_len", "attn_dropout")


def _lora(model: Options, name: str) -> None:
    """models/*/_model_builders.py: lora_rank 8, lora_alpha 16, no dropout, no layers of the MLP."""
    draft = model.draft
    fused = "phi3" in name or "phi4" in name
    targets = []
    for layer in model.texts("lora_attn_modules"):
        if layer in _LAYERS:
            targets.append(_LAYERS[layer])
        else:
            model.refuse("lora_attn_modules", f"{layer} is no layer of its models")
    if model.flag("apply_lora_to_mlp"):
        targets += _MLP
    if model.flag("apply_lora_to_output"):
        targets.append("lm_head")
    if fused and targets:
        model.refuse("lora_attn_modules", "transformers has one layer for q, k and v here, torchtune one for each")
    elif targets:
        draft.set("lora.target_modules", targets, "model.lora_attn_modules", model.data.get("lora_attn_modules"))
    else:
        draft.problems.append(f"model.lora_attn_modules is missing ({draft.file.name})")
    for option, field, default in (("lora_rank", "lora.r", 8), ("lora_alpha", "lora.lora_alpha", 16)):
        value = model.integer(option) if option == "lora_rank" else model.number(option)
        if value is not None:
            model.set(field, option, value)
        draft.default(field, default, option)
    common.plain_number(model, "lora_dropout", "lora.lora_dropout", 0.0)
    if model.flag("use_dora") or "dora" in name:
        draft.set("lora.use_dora", True, "model.use_dora")
    if model.flag("quantize_base") or "qlora" in name or "qdora" in name:
        draft.set("model.quantization", "nf4", "model._component_", model.data.get(_COMPONENT))
        draft.warn(
            "model.quantization: torchtune's nf4 is torchao's; bitsandbytes' rounds its constants in another way"
        )


# ---- data


def _data(options: Options) -> None:
    draft, tokenizer = options.draft, options.group("tokenizer")
    length = tokenizer.integer("max_seq_len")
    data_set = options.take("dataset")
    if isinstance(data_set, list):
        options.refuse("dataset", "distft reads all data sets of a recipe in one format; name one")
        return
    group = options.group("dataset")
    packs = group.flag("packed")
    if packs is not None:
        group.set("data.packing", "packed", packs and "auto")
    draft.default("data.packing", False, "dataset.packed")
    if length:
        tokenizer.set("data.max_length", "max_seq_len", length)
        draft.default("data.long_rows", "truncate", "tokenizer.truncation_type")
    else:
        draft.default("data.max_length", 2048, "tokenizer.max_seq_len")
        draft.warn(
            "data.max_length: torchtune has no limit here; with long_rows: error, rows above 2048 tokens end the launch"
        )
        draft.default("data.long_rows", "error", "tokenizer.max_seq_len")
    _format(options, group, tokenizer)
    _sources(options, group)
    if options.flag("shuffle") is False or options.has("shuffle"):
        options.drop("shuffle", "rows are always shuffled")


def _format(options: Options, group: Options, tokenizer: Options) -> None:
    """torchtune/datasets/*.py: the prompt of a data set, and what of it is trained."""
    draft = options.draft
    builder = (_component(group) or "").rpartition(".")[2]
    written = (_component(tokenizer) or "").rpartition(".")[2]
    plain = written in _PLAIN_TOKENIZERS and not tokenizer.is_on("prompt_template")
    trains_prompt = group.flag("train_on_input")
    columns = group.group("column_map").data
    if builder in _SAMPLES:
        # AlpacaToMessages: Stanford's prompt is the user's message, whatever the tokenizer makes of it.
        draft.set("data.format", "alpaca_prompt" if plain else "alpaca_chat", "dataset._component_", builder)
        trains_prompt = True if trains_prompt is None else trains_prompt
    elif builder == "text_completion_dataset":
        draft.set("data.format", "text", "dataset._component_", builder)
        column = group.text("column")
        columns = {"text": column} if column and column != "text" else {}
        if group.flag("add_eos") is False:
            group.drop("add_eos", "distft ends every text with the token for it")
            draft.warn("dataset.add_eos: distft trains the end of every text, too")
        trains_prompt = None
    elif builder == "instruct_dataset":
        draft.set("data.format", "prompt_completion", "dataset._component_", builder)
        columns = {"prompt": columns.get("input", "input"), "completion": columns.get("output", "output")}
        if not plain:
            group.refuse(_COMPONENT, "prompt and completion become turns of a chat; write the rows as messages")
    elif builder == "chat_dataset":
        _chat(group)
        columns = {}
    else:
        why = _EXAMPLES if "paired" in builder or "preference" in builder or "hh_rlhf" in builder else None
        group.refuse(_COMPONENT, why or "distft does not know the prompts of this data set; write the rows as messages")
    if columns and "data.format" in draft.fields:
        draft.set("data.columns", dict(columns), "dataset.column_map", None)
    if trains_prompt:
        default = "" if group.has("train_on_input") else " (torchtune's default)"
        draft.set("data.train_on", "everything", f"dataset.train_on_input{default}", True)
    if not plain and draft.fields.get("data.format") in ("alpaca_chat", "messages", "sharegpt"):
        draft.warn(
            f"tokenizer: {written} writes a chat format of its own, which may differ from the model's chat template, "
            "which is used; `distft data` shows the rows as they are trained"
        )
    if tokenizer.is_on("prompt_template"):
        tokenizer.refuse("prompt_template", "distft renders messages by a chat template in Jinja (data.chat_template)")
    table("torchtune_tokenizer").apply(tokenizer)
    tokenizer.finish((), "torchtune's tokenizers")


def _chat(group: Options) -> None:
    """torchtune/datasets/_chat.py: conversation_style is openai or sharegpt."""
    style = group.text("conversation_style")
    column = group.text("conversation_column")
    kind, usual = ("sharegpt", "conversations") if style == "sharegpt" else ("messages", "messages")
    group.draft.set("data.format", kind, "dataset.conversation_style", style)
    if column and column != usual:
        group.draft.set("data.columns", {"messages": column}, "dataset.conversation_column", column)
    if group.text("new_system_prompt"):
        group.refuse("new_system_prompt", "distft adds no system message; put it into the rows or the chat template")


def _sources(options: Options, group: Options) -> None:
    """The rows of `dataset`. Those of `dataset_val` are held out, where they are the rest of the same split."""
    draft = options.draft
    found, split = _source(group), group.text("split")
    validation = options.group("dataset_val")
    every = options.integer("run_val_every_n_steps")
    if every:
        options.set("training.eval_steps", "run_val_every_n_steps", every)
    if validation.data and found is not None:
        other = _source(validation)
        train, held = read_split(split or "train"), read_split(validation.text("split") or "train")
        if other == found and train and held and train.split == held.split and (train.end, held.end) == (held.start, 1):
            options.set("data.eval", "dataset_val", held.fraction)
            draft.warn("data.eval: the rows are held out by a hash of their content, not the last ones")
            split = train.split
        elif every:
            options.refuse("dataset_val", "data.eval takes rows of another file, or a fraction; this is a slice")
        else:
            options.drop("dataset_val", "run_val_every_n_steps is not set, so it is not read")
    elif validation.data:
        options.taken.add("dataset_val")
    if found is not None:
        files = tuple(group.texts("data_files"))
        entries = sources(draft, DataSet(found, split, group.text("name"), files=files), "dataset.split")
        if entries is None:
            group.refuse("split", "data.train takes a whole split, or a share of it")
        else:
            draft.set("data.train", simplest(entries), "dataset.source", found, group.line("source"))
    table("torchtune_dataset").apply(group)
    group.finish(("new_system_prompt", "conversation_style", "conversation_column"), "torchtune's data sets")


def _source(group: Options) -> str | None:
    return group.text("source") or _SAMPLES.get((_component(group) or "").rpartition(".")[2])


# ---- training


def _training(options: Options) -> None:
    draft = options.draft
    shared = {}
    for name in ("tensor_parallel_dim", "context_parallel_dim"):
        if (size := options.integer(name) or 1) > 1:
            shared[name] = size
            options.drop(name, SPLIT)
    parts = {
        "batch_size": options.integer("batch_size") or 1,
        "gradient_accumulation_steps": options.integer("gradient_accumulation_steps") or 1,
    }
    draft.global_batch_size(parts, shared, alone=_one_gpu(draft))
    epochs, most = options.integer("epochs") or 1, options.integer("max_steps_per_epoch")
    if most:
        draft.set(
            "training.max_steps",
            most * epochs,
            f"max_steps_per_epoch {most} x epochs {epochs}",
            None,
            options.line("epochs"),
        )
    else:
        options.set("training.num_train_epochs", "epochs", epochs)
    _optimizer(options)
    _schedule(options)
    loss = (_component(options.group("loss")) or "LinearCrossEntropyLoss").rpartition(".")[2]
    if loss in _SAME_LOSSES:
        options.drop("loss", "the same loss, computed in another way")
    else:
        options.refuse("loss", "distft has the losses nll, dft and eaft")
    clip = options.take("clip_grad_norm")
    if isinstance(clip, (int, float)) and not isinstance(clip, bool):
        options.set("training.max_grad_norm", "clip_grad_norm", float(clip))
    draft.default("training.max_grad_norm", 0.0, "clip_grad_norm")
    seed = options.integer("seed")
    if seed is not None:
        options.set("training.seed", "seed", seed)
    draft.default("training.seed", 42, "seed")
    dtype = options.text("dtype") or "bf16"
    if dtype in ("bf16", "fp16", "fp32"):
        options.set("training.mixed_precision", "dtype", "no" if dtype == "fp32" else dtype)
        if dtype == "fp16" and draft.fields.get("lora", True) is None:
            draft.warn("dtype: torchtune trains 16-bit weights; distft's are float32: more exact, and larger")
        elif dtype == "bf16":
            common.bf16_weights(options, "dtype")
    else:
        options.refuse("dtype", "distft has bf16, fp16 and fp32")
    checkpointing = options.flag("enable_activation_checkpointing")
    if checkpointing is not None:
        options.set("training.gradient_checkpointing", "enable_activation_checkpointing", checkpointing)
    common.activation_offloading(options, "enable_activation_offloading")
    if steps := options.integer("save_every_n_steps"):
        options.set("checkpoint.save_steps", "save_every_n_steps", steps)
    if folder := options.text("output_dir"):
        options.set("output_dir", "output_dir", folder)


def _one_gpu(draft: Draft) -> str:
    """What says that a file is for a recipe of torchtune's that runs on one GPU: its name, or the command in its first
    comment, which its examples and their copies have."""
    if "single_device" in draft.file.name:
        return f"{draft.file.name} is for a recipe of torchtune's on one GPU"
    command = re.search(r"^#\s*tune run (\w+_single_device)\b", draft.file.read_text(), re.MULTILINE)
    return f"{command[1]}, which {draft.file.name} is for, runs on one GPU" if command else ""


def _optimizer(options: Options) -> None:
    draft, group = options.draft, options.group("optimizer")
    component = _component(group)
    if component is None:
        draft.problems.append(f"optimizer is missing ({draft.file.name})")
        return
    name = _OPTIMIZERS.get(component)
    fused = group.flag("fused")
    if name is None:
        group.refuse(_COMPONENT, f"distft has {', '.join(_OPTIMIZERS)}")
    else:
        group.set("training.optim", _COMPONENT, "adamw_torch_fused" if fused and name == "adamw_torch" else name)
    rate = group.number("lr")
    if rate is None:
        rate = 1e-3  # torch's
    group.set("training.learning_rate", "lr", rate)
    common.plain_number(group, "weight_decay", "training.weight_decay", _ADAMW_DECAY)
    common.norms_decay(draft)
    betas = group.take("betas")
    if isinstance(betas, list) and len(betas) == 2:
        draft.set("trainer.overrides.adam_beta1", betas[0], "optimizer.betas", betas)
        draft.fields["trainer.overrides.adam_beta2"] = betas[1]
    if (epsilon := group.number("eps")) is not None:
        group.set("trainer.overrides.adam_epsilon", "eps", epsilon)
    group.drop_all({"foreach": common.SPEED})
    group.finish(("amsgrad", "betas"), "torchtune's optimizers")


def _schedule(options: Options) -> None:
    """torchtune/training/lr_schedulers.py; without one the rate is constant."""
    group = options.group("lr_scheduler")
    name = (_component(group) or "").rpartition(".")[2]
    if not name:
        options.draft.default("training.lr_scheduler_type", "constant", "lr_scheduler")
        return
    if name != "get_cosine_schedule_with_warmup" or group.number("num_cycles") not in (None, 0.5):
        group.refuse(_COMPONENT, "distft has torchtune's get_cosine_schedule_with_warmup, and a constant rate")
        group.taken |= set(group.data)
        return
    group.set("training.lr_scheduler_type", _COMPONENT, "cosine")
    group.set("training.warmup_steps", "num_warmup_steps", group.integer("num_warmup_steps") or 0)
    group.finish((), "torchtune's schedules")


def _parallelism(options: Options) -> None:
    shards = options.integer("data_parallel_shard_dim")
    replicas = options.integer("data_parallel_replicate_dim") or 1
    if options.flag("fsdp_cpu_offload"):
        set_strategy(options, "fsdp_cpu_offload", "fsdp", "all")
    elif replicas > 1 and shards and shards > 1:
        set_strategy(options, "data_parallel_replicate_dim", "hsdp")
        options.set("parallelism.hsdp_shard_size", "data_parallel_shard_dim", shards)
    elif replicas > 1:
        set_strategy(options, "data_parallel_replicate_dim", "ddp" if shards == 1 else "hsdp")


def is_torchtune(data: Mapping[str, Any]) -> bool:
    """Whether some component is one of torchtune's own."""
    return any(isinstance(value, dict) and _COMPONENT in value for value in data.values())
