"""axolotl's YAML. Names and defaults: src/axolotl/utils/schemas/*.py; what they become: core/builders/base.py and
causal.py, loaders/*.py, utils/config/__init__.py, prompt_strategies/ (axolotl 0.17, commit 067b021)."""

from __future__ import annotations

from typing import Any

from distft.config.schema_text import show
from distft.importers import common
from distft.importers.common import MEMORY, SPEED
from distft.importers.datasets import DataSet, merge_formats, simplest, sources
from distft.importers.draft import Left
from distft.importers.options import Options
from distft.importers.sharding import SPLIT, needs_groups, read_deepspeed, read_fsdp
from distft.importers.tables import table

NAME = "axolotl"
_ALPACA_TYPES = ("alpaca", "alpaca:instruct")
# Those of utils/chat_templates/templates/ that are in templates/ here.
_TEMPLATES = ("chatml", "gemma", "llama3", "phi_3")
_LEGACY_ATTENTION = (
    "flash_attention",
    "sdp_attention",
    "flex_attention",
    "xformers_attention",
    "eager_attention",
    "sage_attention",
)
_ROLES = {"human": "user", "gpt": "assistant"}  # that the strategy chat_template knows by itself

_RL = "distft trains on examples alone; this needs preferences or a reward"


_PLUGINS = {
    "CutCrossEntropyPlugin": MEMORY,
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
    _data(options)
    _training(options)
    _parallelism(options)
    _plugins(options)
    for name in ("axolotl", "logging"):
        table(name).apply(options)
    options.finish(_LEGACY_ATTENTION, NAME)


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


def _lora(options: Options) -> None:
    draft, adapter = options.draft, options.text("adapter")
    is_4bit, is_8bit = options.flag("load_in_4bit"), options.flag("load_in_8bit")
    if adapter is None:
        draft.set("lora", None, "adapter", "null", options.line("adapter"))
        for name in ("load_in_4bit", "load_in_8bit"):
            if options.is_on(name):
                options.refuse(name, "quantized weights can be trained with adapters alone")
        _drop_rest(options, ("lora_", "peft_"), "there is no adapter")
        return
    if adapter not in ("lora", "qlora"):
        options.refuse("adapter", "distft has LoRA alone")
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
    if options.is_on("lora_modules_to_save"):
        common.modules_to_save(options, "lora_modules_to_save")
    if options.take("peft_init_lora_weights") not in (None, True):
        options.refuse("peft_init_lora_weights", "adapters start as in LoRA's paper")


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


# ---- data


def _data(options: Options) -> None:
    draft = options.draft
    length = options.integer("sequence_len")
    if length:
        options.set("data.max_length", "sequence_len", length)
    draft.default("data.max_length", 512, "sequence_len")
    packs = options.flag("sample_packing")
    if packs is not None:
        options.set("data.packing", "sample_packing", packs)
    draft.default("data.packing", False, "sample_packing")
    excess = options.text("excess_length_strategy")  # utils/data/utils.py: drop
    long_rows = {"drop": "drop", "truncate": "truncate", "raise": "error"}.get(excess or "drop")
    if long_rows is None:
        draft.problems.append(f"excess_length_strategy: got {show(excess)}, need drop, truncate or raise")
    elif excess:
        options.set("data.long_rows", "excess_length_strategy", long_rows)
    draft.default("data.long_rows", "drop", "excess_length_strategy")
    if options.flag("train_on_inputs"):
        common.train_on_everything(options, "train_on_inputs")
    elif options.has("train_on_inputs"):
        options.set("data.train_on", "train_on_inputs", "all")
    data_sets = options.groups("datasets")
    if any(options.is_on(name) for name in ("rl", "reward_model", "process_reward_model")):
        options.taken |= {"test_datasets", "val_set_size", "eval_steps", "evals_per_epoch", "chat_template"}
        return  # refused as a whole
    if not data_sets and not options.is_on("pretraining_dataset"):
        draft.problems.append(f"datasets is missing ({draft.file.name})")
    _sources(options, data_sets, "datasets", "data.train")
    _evaluation(options)
    _chat_template(options, data_sets)


def _evaluation(options: Options) -> None:
    size = options.number("val_set_size")
    if size:
        if size < 1:
            options.set("data.eval", "val_set_size", float(size))
        else:
            options.refuse("val_set_size", "a number of rows; data.eval takes a fraction, such as 0.05, or a file")
    if tests := options.groups("test_datasets"):
        _sources(options, tests, "test_datasets", "data.eval")
    steps = options.number("eval_steps")
    if steps and steps >= 1:
        options.set("training.eval_steps", "eval_steps", int(steps))
    elif steps:
        options.drop("eval_steps", "a fraction of the run; distft evaluates before and after it, and every eval_steps")
    if options.is_on("evals_per_epoch"):
        options.drop("evals_per_epoch", "distft evaluates before and after training, and every training.eval_steps")
    options.taken.add("evals_per_epoch")


def _sources(options: Options, data_sets: list[Options], name: str, field: str) -> None:
    """data.train or data.eval of a list of data sets, and how their rows are read."""
    draft = options.draft
    entries: list[str | dict[str, Any]] = []
    formats: list[dict[str, Any]] = []
    for one in data_sets:
        files = one.texts("data_files")
        path = one.text("path")
        if path is None:
            draft.problems.append(f"{one.path('path')} is missing ({draft.file.name})")
            continue
        data_set = DataSet(path, one.text("split"), one.text("name"), one.text("revision"), tuple(files))
        found = sources(draft, data_set, one.path("split"))
        if found is None:
            one.refuse("split", "data.train takes a whole split, or a share of it")
        else:
            entries += found
        formats.append(_format(one))
        for key in ("split", "name", "revision", "data_files"):
            one.taken.add(key)
    if entries:
        paths = [one.data.get("path") for one in data_sets]
        if len(paths) == 1:
            draft.set(field, simplest(entries), data_sets[0].path("path"), paths[0], data_sets[0].line("path"))
        else:
            options.set(field, name, simplest(entries))
    settings = merge_formats(formats)
    if settings is None:
        options.refuse(name, "distft reads all data sets of a recipe in one format; these have several")
        return
    for key, value in settings.items():
        if draft.fields.get(key, value) != value:
            data_sets[0].refuse("type", "distft reads the rows that are trained and evaluated in one format")
        else:
            draft.set(key, value, f"{name}[0].type", data_sets[0].data.get("type"), data_sets[0].line("type"))
    for one in data_sets:
        table("axolotl_datasets").apply(one)
        one.finish((), f"axolotl's {name}")
    if settings.get("data.format") == "text":  # prompt_strategies/completion.py cuts texts into pieces
        draft.set("data.long_rows", "split", f"{name}[0].type", data_sets[0].data.get("type"))


def _format(one: Options) -> dict[str, Any]:
    """data.format, data.columns and data.roles of a data set."""
    given = one.take("type")
    if isinstance(given, dict):
        return _user_defined(one)
    if given is None:
        return {"data.format": "tokens"}  # utils/data/wrappers.py: rows that have input_ids already
    if given in _ALPACA_TYPES:
        return {"data.format": "alpaca_prompt"}
    if given == "completion":
        column = one.text("field")
        return {"data.format": "text", **({"data.columns": {"text": column}} if column and column != "text" else {})}
    if given in ("chat_template", "sharegpt"):
        return _chat(one, given)
    one.refuse("type", _why_not(str(given)))
    return {}


def _why_not(kind: str) -> str:
    if any(word in kind for word in ("dpo", "kto", "orpo", "bradley", "chosen", "rejected", "reward", "stepwise")):
        return _RL
    return "a prompt that distft does not have; write the rows as prompt and completion, or as messages"


def _user_defined(one: Options) -> dict[str, Any]:
    """Fields, and the text around them, which can be said where there is none (prompt_strategies/user_defined.py)."""
    kind = one.group("type")
    instruction = kind.text("field_instruction") or "instruction"
    answer = kind.text("field_output") or "output"
    shapes = {kind.text(name) for name in ("format", "no_input_format")}
    kind.taken |= {"field_input", "field_system", "system_format"}
    if kind.is_on("system_prompt") or shapes != {"{instruction}"}:
        one.refuse("type", "it puts text around the fields of a row; write the rows as prompt and completion")
    kind.finish(("system_prompt",), "axolotl's type")
    return {"data.format": "prompt_completion", "data.columns": {"prompt": instruction, "completion": answer}}


def _chat(one: Options, kind: str) -> dict[str, Any]:
    """prompt_strategies/chat_template.py: field_messages is `messages`, the keys are role and content."""
    draft, mapping = one.draft, one.group("message_property_mappings").data
    is_sharegpt = kind == "sharegpt"
    role = mapping.get("role") or one.text("message_field_role") or ("from" if is_sharegpt else "role")
    content = mapping.get("content") or one.text("message_field_content") or ("value" if is_sharegpt else "content")
    messages = one.text("field_messages") or ("conversations" if is_sharegpt else "messages")
    for name in ("message_field_role", "message_field_content", "field_messages"):
        one.taken.add(name)
    if more := set(mapping) - {"role", "content"}:
        one.refuse("message_property_mappings", f"distft maps role and content alone, not {', '.join(sorted(more))}")
    columns = {"messages": messages, "role": role, "content": content}
    if tools := one.text("field_tools"):
        columns["tools"] = tools
    is_sharegpt = is_sharegpt or role == "from"
    result: dict[str, Any] = {"data.format": "sharegpt" if is_sharegpt else "messages"}
    usual = {"messages": "conversations", "role": "from", "content": "value"} if is_sharegpt else {}
    columns = {key: value for key, value in columns.items() if value != usual.get(key, key)}
    if columns:
        result["data.columns"] = columns
    if roles := _roles(one):
        result["data.roles"] = roles
    _what_is_trained(one)
    for name in ("field_thinking", "template_thinking_key"):
        if (key := one.text(name)) and key not in ("reasoning_content", "reasoning", "thinking"):
            one.refuse(name, "distft knows thoughts by reasoning_content, reasoning or thinking")
    if one.is_on("drop_system_message"):
        one.refuse("drop_system_message", "distft renders the messages that a row has; remove them from the rows")
    one.taken.add("drop_system_message")
    if one.is_on("split_thinking"):
        draft.warn(
            f"{one.path('split_thinking')}: thoughts within an answer are kept where the chat template keeps them"
        )
    one.taken.add("split_thinking")
    return result


def _roles(one: Options) -> dict[str, str]:
    given = one.group("roles").data
    found: dict[str, str] = {}
    for target, names in given.items():
        for name in names if isinstance(names, list) else [names]:
            if isinstance(name, str) and name != target:
                found[name] = target
    return {name: target for name, target in found.items() if _ROLES.get(name) != target}


def _what_is_trained(one: Options) -> None:
    trained = one.texts("roles_to_train")
    if trained and not set(trained) <= {"assistant", "gpt"}:
        one.refuse("roles_to_train", "distft trains on the assistant's turns")
    for name in ("train_on_eos", "train_on_eot"):
        if one.text(name) not in (None, "turn"):
            one.refuse(name, "distft trains on the end of every turn that is trained, and of no other")
    flag = one.text("message_field_training")
    if flag and flag not in ("weight", "train", "training", "loss"):
        one.refuse("message_field_training", "distft reads weight, train, training or loss; rename the field")
    if one.is_on("message_field_training_detail"):
        one.draft.warn(f"{one.path('message_field_training_detail')}: rows that have this field are refused")
    one.taken.add("message_field_training_detail")


def _chat_template(options: Options, data_sets: list[Options]) -> None:
    """utils/chat_templates/base.py: tokenizer_default, a name of axolotl's own, or jinja with its text or file. A data
    set's own wins over the file's."""
    names = ("chat_template", "chat_template_jinja")
    own = [one for one in data_sets if any(one.is_on(name) for name in names)]
    choices = {tuple(map(repr, map(one.data.get, names))) for one in own}
    if own and (len(choices) > 1 or (len(own) < len(data_sets) and options.is_on("chat_template"))):
        own[-1].refuse("chat_template", "a recipe has one chat template; this file has several")
    else:
        group = own[0] if own else options
        name, jinja = group.text("chat_template"), group.text("chat_template_jinja")
        if jinja:
            common.jinja(group, "chat_template_jinja", jinja)
        elif name and not name.startswith("tokenizer_default"):
            common.named_template(group, "chat_template", name, _TEMPLATES)
        elif name:
            group.drop("chat_template", "the tokenizer's own is the default")
    for one in (options, *data_sets):
        one.taken |= set(names)
    if options.take("chat_template_kwargs"):
        options.refuse("chat_template_kwargs", "distft takes them from the rows (chat_template_kwargs)")


# ---- training


def _training(options: Options) -> None:
    draft = options.draft
    _batch(options)
    steps, epochs = options.integer("max_steps"), options.number("num_epochs")
    if steps and steps > 0:
        options.set("training.max_steps", "max_steps", steps)
        if epochs is not None:
            options.drop("num_epochs", "max_steps says when training ends")
    elif epochs is not None:
        options.set("training.num_train_epochs", "num_epochs", epochs)
    if "training.max_steps" not in draft.fields:
        draft.default("training.num_train_epochs", 1, "num_epochs")
    rate = options.number("learning_rate")
    if rate is None:
        draft.problems.append(f"learning_rate is missing ({draft.file.name})")
    else:
        options.set("training.learning_rate", "learning_rate", rate)
    common.plain_number(options, "weight_decay", "training.weight_decay", 0.0)
    common.plain_number(options, "max_grad_norm", "training.max_grad_norm", 1.0)  # transformers'
    seed = options.integer("seed")
    if seed is not None:
        options.set("training.seed", "seed", seed)
    draft.default("training.seed", 42, "seed")
    common.optimizer(options, "optimizer", "adamw_torch_fused")
    if options.is_on("optim_args"):
        options.refuse("optim_args", "distft passes its optimizer no other arguments")
    for name, other in (("adam_beta1", ""), ("adam_beta2", ""), ("adam_epsilon", ""), ("adam_eps", "adam_epsilon")):
        if options.number(name) is not None and name != "adam_eps":
            options.set(f"trainer.overrides.{other or name}", name, options.number(name))
    if options.has("adam_eps"):
        options.drop("adam_eps", "axolotl has no such option (it is adam_epsilon), and does not read it")
    _schedule(options)
    _precision(options)
    checkpointing = options.take("gradient_checkpointing")
    if checkpointing in (True, False, "offload", "offload_disk"):
        options.set("training.gradient_checkpointing", "gradient_checkpointing", bool(checkpointing))
        if isinstance(checkpointing, str):
            draft.warn("gradient_checkpointing: distft keeps the activations at the bounds of layers on the GPU")
    if folder := options.text("output_dir"):
        options.set("output_dir", "output_dir", folder)
    _checkpoints(options)
    _reporting(options)


def _batch(options: Options) -> None:
    """utils/config/__init__.py, normalize_config: batch_size stands for the accumulation where that is not given."""
    draft = options.draft
    micro, accumulation = options.integer("micro_batch_size"), options.integer("gradient_accumulation_steps")
    total = options.integer("batch_size")
    if accumulation is None and total and micro:
        accumulation = total // micro
    parts = {"micro_batch_size": micro or 1, "gradient_accumulation_steps": accumulation or 1}
    shared = {}
    for name in ("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree"):
        if (size := options.integer(name) or 1) > 1:
            shared[name] = size
            options.drop(name, SPLIT)
    if (options.integer("expert_parallel_size") or 1) > 1:
        options.drop("expert_parallel_size", SPLIT)
    draft.global_batch_size(parts, shared)
    options.taken.add("batch_size")


def _schedule(options: Options) -> None:
    """core/builders/base.py, _configure_warmup_and_logging, _configure_scheduler; core/trainers/mixins/scheduler.py."""
    draft = options.draft
    name = options.text("lr_scheduler")
    kwargs = options.group("lr_scheduler_kwargs").data
    ratio, constant = options.number("cosine_min_lr_ratio"), options.number("cosine_constant_lr_ratio")
    if ratio and name in (None, "cosine"):
        if constant:
            options.refuse("cosine_constant_lr_ratio", "distft's schedules are transformers'")
        options.set("trainer.overrides.lr_scheduler_type", "cosine_min_lr_ratio", "cosine_with_min_lr")
        draft.fields["trainer.overrides.lr_scheduler_kwargs"] = {"min_lr_rate": ratio}
        options.taken.add("lr_scheduler")
    else:
        common.schedule(options, "lr_scheduler", kwargs, "cosine")
    options.drop_all({"eta_min": "axolotl has no such option, and does not read it"})
    steps, share = options.number("warmup_steps"), options.number("warmup_ratio")
    if steps is not None:
        common.warmup(options, "warmup_steps", steps)
        if share is not None:
            options.drop("warmup_ratio", "warmup_steps is used")
    elif share is not None:
        options.set("training.warmup_ratio", "warmup_ratio", share)
    elif max_steps := draft.fields.get("training.max_steps"):
        common.warmup(options, "warmup_steps", min(int(0.03 * max_steps), 100), is_default=True)
    else:
        draft.default("training.warmup_ratio", 0.03, "warmup_ratio")
        draft.warn("training.warmup_ratio: axolotl's default is 0.03, but at most 100 steps; check it for a long run")


def _precision(options: Options) -> None:
    """utils/config/__init__.py, resolve_dtype."""
    bf16, fp16 = options.take("bf16"), options.flag("fp16")
    others = {name: options.flag(name) for name in ("bfloat16", "float16", "float32")}
    if bf16 in (True, "auto", "full") or (bf16 is None and not fp16 and not others["float16"]):
        name, value = "bf16", "bf16"
    elif others["bfloat16"]:
        name, value = "bfloat16", "bf16"
    elif fp16 or others["float16"]:
        name, value = ("fp16" if fp16 else "float16"), "fp16"
    else:
        name, value = "bf16", "no"
    if options.data.get(name) is None:
        options.draft.default("training.mixed_precision", value, "bf16: auto")
    else:
        options.set("training.mixed_precision", name, value)
    common.tf32(options)
    if options.flag("fp8"):
        options.drop("fp8", "computed in bf16: more exact, and slower")
        options.draft.warn("fp8: distft computes in bf16: more exact, and slower")
    options.drop_all({"fp8_enable_fsdp_float8_all_gather": "of fp8"})
    options.drop_all({"torch_dtype": "training.mixed_precision says it"})


def _checkpoints(options: Options) -> None:
    """core/builders/base.py, _configure_save_and_eval_strategy."""
    steps = options.number("save_steps")
    if steps and steps >= 1:
        options.set("checkpoint.save_steps", "save_steps", int(steps))
    elif steps:
        options.drop("save_steps", "a fraction of the run; without checkpoint.save_steps, it saves at its end")
    limit = options.integer("save_total_limit")
    if limit:
        options.set("checkpoint.save_total_limit", "save_total_limit", limit)
    at_the_end = "without checkpoint.save_steps, the run saves at its end"
    options.drop_all({"saves_per_epoch": at_the_end, "save_strategy": at_the_end})
    options.taken |= {"load_best_model_at_end", "metric_for_best_model", "greater_is_better"}
    if options.is_on("load_best_model_at_end"):
        options.refuse("load_best_model_at_end", "distft keeps the weights of the last step")


def _reporting(options: Options) -> None:
    trackers = {"use_wandb": "wandb", "use_mlflow": "mlflow", "use_tensorboard": "tensorboard", "use_comet": "comet_ml"}
    found = [tracker for name, tracker in trackers.items() if options.flag(name)]
    if options.is_on("wandb_project") and options.flag("use_wandb") is None:  # schemas/integrations.py sets it then
        found.append("wandb")
    if options.flag("use_trackio"):
        found.append("trackio")
    if found:
        options.draft.set("training.report_to", found, ", ".join(f"use_{name}" for name in found))


# ---- parallelism


def _parallelism(options: Options) -> None:
    read_deepspeed(options, "deepspeed")
    flags = options.take("fsdp")
    config = options.group("fsdp_config")
    flags = flags.split() if isinstance(flags, str) else flags if isinstance(flags, list) else []
    if flags or config.data:
        read_fsdp([str(flag) for flag in flags], config, options, "fsdp" if flags else "fsdp_config")
    options.drop_all({"fsdp_version": "distft uses FSDP2, which trains the same"})
    shards, replicas = options.integer("dp_shard_size") or 1, options.integer("dp_replicate_size") or 1
    if shards > 1 or replicas > 1:
        name = "dp_replicate_size" if replicas > 1 else "dp_shard_size"
        needs_groups(options.draft, shards, replicas, options, name)


def _plugins(options: Options) -> None:
    for plugin in options.texts("plugins"):
        last = plugin.rpartition(".")[2]
        if last in _PLUGINS:
            options.draft.dropped.append(Left("plugins", plugin, _PLUGINS[last], options.line("plugins")))
        else:
            why = "distft runs no plugins; this one may change what is trained"
            options.draft.refused.append(Left("plugins", plugin, why, options.line("plugins")))
    kernels = [name for name in options.data if name.startswith("liger_") and options.is_on(name)]
    if kernels:
        options.set("training.use_liger_kernel", kernels[0], True)
        options.taken |= set(kernels)
    if options.is_on("liger_use_token_scaling"):
        options.refuse("liger_use_token_scaling", "distft has the cross entropy as its only loss")
    options.taken |= {name for name in options.data if name.startswith("liger_")}
    if options.is_on("quantize_moe_experts"):
        options.drop("quantize_moe_experts", "experts are not quantized: the base is more exact, and larger")
        options.draft.warn("quantize_moe_experts: distft keeps experts in 16 bits, in four times the memory of 4 bits")
    options.taken.add("quantize_moe_experts")
