"""transformers' TrainingArguments, which LLaMA-Factory and TRL take by their own names (transformers 5.23,
training_args.py, which has the defaults too)."""

from __future__ import annotations

from typing import Any

from distft.importers import common, low_rank
from distft.importers.options import Options
from distft.importers.sharding import read_deepspeed, read_fsdp
from distft.importers.tables import table

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch_fused",
    "gradient_checkpointing": False,
    "precision": "no",
    "save_steps": 500,
}
_END = "distft evaluates before and after training, and every training.eval_steps"
_SAVES = "without checkpoint.save_steps, the run saves at its end"


def read(options: Options, defaults: dict[str, Any], shared: dict[str, int] | None = None, alone: str = "") -> None:
    """All of transformers' arguments.

    Args:
        defaults: as in DEFAULTS.
        shared: how many GPUs work on the same rows.
        alone: as of Draft.global_batch_size.
    """
    draft = options.draft
    micro = options.integer("per_device_train_batch_size")
    accumulation = options.integer("gradient_accumulation_steps")
    draft.global_batch_size(
        {
            "per_device_train_batch_size": micro or defaults["per_device_train_batch_size"],
            "gradient_accumulation_steps": accumulation or 1,
        },
        shared or {},
        "" if micro else f" (per_device_train_batch_size is {draft.kind}'s default)",
        alone,
    )
    common.duration(options, "num_train_epochs", defaults["num_train_epochs"])
    rate = options.number("learning_rate")
    if rate is not None:
        options.set("training.learning_rate", "learning_rate", rate)
    draft.default("training.learning_rate", defaults["learning_rate"], "learning_rate")
    common.plain_number(options, "weight_decay", "training.weight_decay", 0.0)
    common.plain_number(options, "max_grad_norm", "training.max_grad_norm", 1.0)
    seed = options.integer("seed")
    if seed is not None:
        options.set("training.seed", "seed", seed)
    draft.default("training.seed", 42, "seed")
    common.optimizer(options, "optim", defaults["optim"])
    for name, usual in (("adam_beta1", 0.9), ("adam_beta2", 0.999), ("adam_epsilon", 1e-8)):
        value = options.number(name)
        if value is not None and value != usual:
            options.set(f"trainer.overrides.{name}", name, value)
        elif value is not None:
            options.drop(name, "transformers' default")
    low_rank.transformers(options)
    common.schedule(
        options, "lr_scheduler_type", options.group("lr_scheduler_kwargs").data, defaults["lr_scheduler_type"]
    )
    _warmup(options)
    _precision(options, defaults["precision"])
    checkpointing = options.flag("gradient_checkpointing")
    if checkpointing is None:
        checkpointing = options.flag("activation_checkpointing")
    options.taken.add("activation_checkpointing")
    if checkpointing is not None:
        options.set("training.gradient_checkpointing", "gradient_checkpointing", checkpointing)
    if options.flag("use_liger_kernel"):
        options.set("training.use_liger_kernel", "use_liger_kernel", True)
    _checkpoints(options)
    _reporting(options)
    read_deepspeed(options, "deepspeed")
    _fsdp(options)
    if folder := options.text("output_dir"):
        options.set("output_dir", "output_dir", folder)
    _compile(options)
    for name in ("arguments", "logging"):
        table(name).apply(options)


def _warmup(options: Options) -> None:
    steps, ratio = options.number("warmup_steps"), options.number("warmup_ratio")
    if steps:
        common.warmup(options, "warmup_steps", steps)
        if ratio is not None:
            options.drop("warmup_ratio", "warmup_steps is used")
    elif ratio is not None:
        options.set("training.warmup_ratio", "warmup_ratio", float(ratio))
    if not steps:
        options.draft.default("training.warmup_ratio", 0.0, "warmup_steps")


def _precision(options: Options, default: str) -> None:
    bf16, fp16 = options.flag("bf16"), options.flag("fp16")
    if bf16:
        options.set("training.mixed_precision", "bf16", "bf16")
    elif fp16:
        options.set("training.mixed_precision", "fp16", "fp16")
    elif bf16 is False and default == "bf16":
        options.set("training.mixed_precision", "bf16", "no")
    else:
        options.draft.default("training.mixed_precision", default, "bf16")
    common.tf32(options)


def _compile(options: Options) -> None:
    """A backend or a mode turns it on, too (training_args.py, __post_init__)."""
    given = [n for n in ("torch_compile", "torch_compile_backend", "torch_compile_mode") if options.is_on(n)]
    if given and options.data.get("torch_compile_backend") in (None, "inductor"):
        common.compiled(options, given[0])


def _checkpoints(options: Options) -> None:
    strategy, steps = options.take("save_strategy"), options.number("save_steps")
    if str(strategy).lower() in ("no", "epoch", "best", "false"):
        options.taken.discard("save_strategy")
        if steps is not None:
            options.drop("save_steps", _SAVES)
    elif steps and steps < 1:
        options.drop("save_steps", _SAVES)
    else:
        if steps:
            options.set("checkpoint.save_steps", "save_steps", int(steps))
        options.draft.default("checkpoint.save_steps", 500, "save_steps")
    if limit := options.integer("save_total_limit"):
        options.set("checkpoint.save_total_limit", "save_total_limit", limit)
    steps = options.number("eval_steps")
    if steps and steps >= 1:
        options.set("training.eval_steps", "eval_steps", int(steps))
    elif steps:
        options.drop("eval_steps", _END)


def _reporting(options: Options) -> None:
    value = options.take("report_to")
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    names = [str(name) for name in names if str(name).lower() not in ("none", "")]
    if names:
        options.set("training.report_to", "report_to", names)


def _fsdp(options: Options) -> None:
    flags = options.take("fsdp")
    if isinstance(flags, bool):
        flags = "full_shard" if flags else None
    flags = flags.replace(",", " ").split() if isinstance(flags, str) else flags if isinstance(flags, list) else []
    config = options.take("fsdp_config")
    if isinstance(config, str):
        options.refuse("fsdp_config", "write the settings of that file here, or set parallelism.strategy: fsdp")
        return
    group = options.group("fsdp_config")
    wrap = options.take("fsdp_transformer_layer_cls_to_wrap")
    if wrap is not None:
        options.drop("fsdp_transformer_layer_cls_to_wrap", "distft wraps the model's blocks")
    if flags or group.data:
        read_fsdp([str(flag) for flag in flags], group, options, "fsdp" if flags else "fsdp_config")
