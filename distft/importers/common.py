"""What several tools have in common: transformers' arguments, peft's settings, tokenizers and chat templates."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from importlib import resources
from typing import Any, get_args

from distft.config.recipe import Optim
from distft.config.schema_text import show
from distft.importers.draft import Draft
from distft.importers.options import Options

SPEED = "affects speed only"
MEMORY = "affects memory and speed only"
# transformers' names of optimizers that are the same as one of distft's (training_args.py, OptimizerNames;
# trainer_optimizer.py), ...
_SAME_OPTIMIZER = {
    "adamw_8bit": "adamw_bnb_8bit",
    "adamw_hf": "adamw_torch",
    "adamw_apex_fused": "adamw_torch_fused",
    "adamw_torch_npu_fused": "adamw_torch_fused",
    "adamw_torch_xla": "adamw_torch",
    "paged_adamw": "paged_adamw_32bit",
}
# ... and of those that are the same but for how their states are stored.
_STORED_OTHERWISE = {
    "adamw_torch_8bit": ("adamw_bnb_8bit", "torchao's states have 8 bits, too, in blocks of 256"),
    "ao_adamw_8bit": ("adamw_bnb_8bit", "torchao's states have 8 bits, too, in blocks of 256"),
    "adamw_torch_4bit": ("adamw_bnb_8bit", "torchao's states have 4 bits: these are more exact, and twice as large"),
    "ao_adamw_4bit": ("adamw_bnb_8bit", "torchao's states have 4 bits: these are more exact, and twice as large"),
}
# Schedules of transformers that need no field of their own (optimization.py, TYPE_TO_SCHEDULER_FUNCTION).
_OWN_SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
_OTHER_SCHEDULES = (
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)


def plain_number(options: Options, name: str, field: str, default: float) -> None:
    """A number that both tools mean the same by."""
    value = options.number(name)
    if value is not None:
        options.set(field, name, float(value))
    options.draft.default(field, default, name)


def norms_decay(draft: Draft) -> None:
    """A warning for optimizers of all trained weights alike."""
    decay = draft.fields["training.weight_decay"]
    if decay and draft.fields.get("lora", True) is None:
        draft.warn(f"training.weight_decay: {draft.kind} lets norms decay, too, by {decay}; distft does not")


def bf16_weights(options: Options, name: str) -> None:
    """A tool that trains bf16 weights where this option says so. Call it when optimizer and strategy are known."""
    draft, value = options.draft, options.data.get(name)
    if draft.fields.get("lora", True) is not None:
        return
    optim, strategy = draft.fields.get("training.optim", "adamw_torch_fused"), draft.fields.get("parallelism.strategy")
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        draft.warn(
            f"{name}: {draft.kind} trains 16-bit weights; distft's are float32 for {optim}: more exact, and larger"
        )
    elif str(strategy).startswith("zero"):
        draft.warn(f"{name}: DeepSpeed's master weights are float32 all the same, and so are distft's")
    else:
        draft.set("training.master_weights", "none", name, value, options.line(name))
        draft.warn(
            f"{name}: {draft.kind} loses what bf16 rounds off the weights at each step; distft keeps it for the next "
            "one (Kahan summation), in 2 bytes a weight"
        )


def optimizer(options: Options, name: str, default: str) -> None:
    value = options.text(name)
    if value is None:
        options.draft.default("training.optim", default, name)
        return
    if value in get_args(Optim):
        options.set("training.optim", name, value)
    elif value in _SAME_OPTIMIZER:
        options.set("training.optim", name, _SAME_OPTIMIZER[value])
    elif value in _STORED_OTHERWISE:
        instead, why = _STORED_OTHERWISE[value]
        options.set("training.optim", name, instead)
        options.draft.warn(f"{options.path(name)}: {value} becomes bitsandbytes' {instead}; {why}")
    else:
        options.refuse(name, f"distft has {', '.join(get_args(Optim))}")


def schedule(options: Options, name: str, kwargs: Mapping[str, Any], default: str) -> None:
    """training.lr_scheduler_type, or another of transformers' schedules through trainer.overrides."""
    value = options.text(name)
    if value is None:
        options.draft.default("training.lr_scheduler_type", default, name)
        return
    if value in _OWN_SCHEDULES and not kwargs:
        options.set("training.lr_scheduler_type", name, value)
    elif value == "warmup_stable_decay" and "num_decay_steps" not in kwargs:
        options.refuse(name, "its number of decay steps is missing (lr_scheduler_kwargs: num_decay_steps)")
    elif value in _OWN_SCHEDULES + _OTHER_SCHEDULES:
        options.set("trainer.overrides.lr_scheduler_type", name, value)
        if kwargs:
            options.draft.fields["trainer.overrides.lr_scheduler_kwargs"] = dict(kwargs)
    else:
        options.refuse(name, f"distft has {', '.join(_OWN_SCHEDULES + _OTHER_SCHEDULES)}")


def warmup(options: Options, name: str, steps: float, is_default: bool = False) -> None:
    """A number of warm-up steps; below 1 it is a fraction of the run (transformers 5, get_warmup_steps)."""
    draft = options.draft
    field, to = ("training.warmup_steps", int(steps)) if steps >= 1 else ("training.warmup_ratio", float(steps))
    if is_default:
        draft.default(field, to, name)
    else:
        options.set(field, name, to)


def attention(options: Options, name: str, value: str) -> None:
    """The implementation. All compute the same; `auto` does not end a launch where FlashAttention is not installed."""
    if value in ("sdpa", "eager"):
        options.set("model.attn_implementation", name, value)
    else:
        options.drop(name, "the same attention: auto takes the newest FlashAttention that is installed, else SDPA")


def activation_offloading(options: Options, name: str) -> None:
    """Where gradient checkpointing is on: distft offloads what it keeps."""
    if not options.is_on(name):
        options.taken.add(name)
    elif options.draft.fields.get("training.gradient_checkpointing"):
        options.taken.add(name)
        options.set("training.activation_offloading", name, True)
    else:
        options.drop(name, "affects memory and speed only; distft offloads what gradient checkpointing keeps")


def tf32(options: Options) -> None:
    """TF32 is about products of float32 matrices: there are none to speak of in mixed precision."""
    value = options.take("tf32")
    if value is True and options.draft.fields.get("training.mixed_precision") == "no":
        options.set("trainer.overrides.tf32", "tf32", True)
    elif value is not None:
        options.drop("tf32", "affects products of float32 matrices only, and training is in mixed precision")


def compiled(options: Options, name: str) -> None:
    """An option that turns torch.compile on, with inductor. Call it once the strategy is known. What else it may say,
    and the options beside it, are left for the table of the tool: they affect speed only."""
    if options.draft.fields.get("parallelism.strategy") == "zero3":
        options.drop(name, f"{SPEED}; training.compile does not work under zero3")
    else:
        options.set("training.compile", name, True)
    options.taken.add(name)


def model_class(options: Options, name: str) -> None:
    value = options.text(name)
    if value is None:
        return
    if value == "AutoModelForCausalLM" or re.fullmatch(r"\w+(ForCausalLM|LMHeadModel)", value):
        options.drop(name, "AutoModelForCausalLM finds the class")
    else:
        options.refuse(name, "distft trains causal language models alone, as AutoModelForCausalLM loads them")


def tokenizer_class(options: Options, name: str) -> None:
    if options.text(name) is not None:
        options.drop(name, "AutoTokenizer finds the class")


def special_tokens(group: Options) -> None:
    """Padding and end tokens are fields; the others are the tokenizer's own."""
    if pad := group.text("pad_token"):
        group.set("model.pad_token", "pad_token", pad)
    if eos := group.text("eos_token"):
        group.set("model.eos_token", "eos_token", eos)
    for name in ("bos_token", "unk_token"):
        if token := group.text(name):
            group.drop(name, "the tokenizer's own is used")
            group.draft.warn(f"{group.path(name)}: distft uses the tokenizer's own, which {token} must be")
    if group.is_on("additional_special_tokens"):
        add_tokens(group, "additional_special_tokens", group.texts("additional_special_tokens"))


def add_tokens(options: Options, name: str, tokens: list[str]) -> None:
    """Tokens for model.add_tokens, beside those of other options."""
    before = options.draft.fields.get("model.add_tokens", [])
    options.set("model.add_tokens", name, list(dict.fromkeys([*before, *tokens])))


def duration(options: Options, epochs_name: str, default: float) -> None:
    """max_steps, which goes before epochs; `default` epochs where neither is said."""
    steps, epochs = options.integer("max_steps"), options.number(epochs_name)
    if steps and steps > 0:
        options.set("training.max_steps", "max_steps", steps)
        if epochs is not None:
            options.drop(epochs_name, "max_steps says when training ends")
        return
    if epochs is not None:
        options.set("training.num_train_epochs", epochs_name, float(epochs))
    options.draft.default("training.num_train_epochs", default, epochs_name)


def max_length(options: Options, name: str, default: int) -> bool:
    """The longest row, in tokens. Whether the file says it."""
    length = options.integer(name)
    if length:
        options.set("data.max_length", name, length)
    options.draft.default("data.max_length", default, name)
    return bool(length)


def target_modules(options: Options, name: str) -> None:
    value = options.take(name)
    if value in ("all-linear", "all_linear", ["all-linear"], "all", ["all"]):
        options.set("lora.target_modules", name, "all-linear")
    elif isinstance(value, str):
        options.set("lora.target_modules", name, value)
    elif targets := options.texts(name):
        options.set("lora.target_modules", name, targets)


def modules_to_save(options: Options, name: str) -> None:
    """Layers that are trained whole."""
    value = options.take(name)
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else options.texts(name)
    if names:
        options.set("lora.modules_to_save", name, names)


def loraplus(options: Options) -> None:
    """LoRA+, as peft, axolotl and LLaMA-Factory spell it."""
    if ratio := options.number("loraplus_lr_ratio"):
        options.set("lora.loraplus_lr_ratio", "loraplus_lr_ratio", ratio)
    rate = options.number("loraplus_lr_embedding")
    if rate and ratio:
        options.set("lora.loraplus_lr_embedding", "loraplus_lr_embedding", rate)
    elif rate:
        options.drop("loraplus_lr_embedding", "there is no loraplus_lr_ratio")


def bnb_options(group: Options) -> None:
    """Settings of BitsAndBytesConfig: distft's own are nf4 with double quantization."""
    same = {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"}
    for name, value in group.data.items():
        if name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage") or same.get(name) == value:
            group.drop(name, "distft sets it")
        else:
            group.refuse(name, "distft quantizes to nf4 with double quantization")


def train_on_everything(options: Options, name: str) -> None:
    options.set("data.train_on", name, "everything")


def jinja(options: Options, name: str, value: str) -> None:
    """A chat template: a file, or its text, which is written beside the recipe."""
    draft = options.draft
    found = None if "\n" in value or "{" in value else draft.locate(value)
    if found is not None:
        options.set("data.chat_template", name, draft.relative(found))
    elif "{" in value:
        draft.set_template(value, options.path(name), line=options.line(name))
    else:
        draft.problems.append(f"{options.path(name)}: no such file: {value}{draft.near(value)} ({options.where(name)})")


def named_template(options: Options, name: str, value: str, own: Collection[str]) -> None:
    """A template that a tool has under a name.

    Args:
        own: those of them that are in templates/, and are written beside the recipe. For others the tokenizer's own is
            used, which may differ.
    """
    draft = options.draft
    if value in own:
        text = (resources.files(__package__) / "templates" / f"{value}.jinja").read_text(encoding="utf-8")
        draft.set_template(text, options.path(name), value, options.line(name))
        return
    options.drop(name, "the tokenizer's own chat template is used")
    draft.warn(
        f"{options.path(name)}: {draft.kind}'s own template {show(value)} may differ from the tokenizer's, which is "
        "used; `distft data` shows the rows as they are trained"
    )


def base_model(options: Options, name: str, *revisions: str) -> str | None:
    """The model as the file names it, with its revision and whether its code is trusted. None where it names none."""
    draft = options.draft
    path = options.text(name)
    if path is None:
        draft.problems.append(f"{name} is missing ({draft.file.name})")
        return None
    options.set("model.name_or_path", name, draft.model_path(path))
    for option in revisions:
        if (revision := options.text(option)) and revision != "main":
            options.set("model.revision", option, revision)
    if options.flag("trust_remote_code"):
        options.set("model.trust_remote_code", "trust_remote_code", True)
    return path
