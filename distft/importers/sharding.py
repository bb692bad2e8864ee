"""DeepSpeed's and FSDP's settings in other tools' files → `parallelism`. How states are sharded never changes the
math, so most of them are dropped with a word.

Sources: DeepSpeed 0.19 runtime/config.py and runtime/zero/config.py; accelerate 1.15 utils/dataclasses.py
(FullyShardedDataParallelPlugin), whose names are here without their `fsdp_`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from distft.config.schema_text import clean, show
from distft.importers.draft import Draft
from distft.importers.options import Options
from distft.rules.combinations import is_bitsandbytes
from distft.rules.upstream import ZERO_KEYS

TUNING = "tunes speed and memory only"
SPLIT = "distft splits no layers or sequences across GPUs: each has more to hold (`distft plan` shows it)"
_RUNTIME = "the run's own: distft writes it from the recipe"
_DEEPSPEED_DROPPED = {
    "train_batch_size": _RUNTIME,
    "train_micro_batch_size_per_gpu": _RUNTIME,
    "gradient_accumulation_steps": _RUNTIME,
    "gradient_clipping": "training.max_grad_norm is used",
    "bf16": "training.mixed_precision is used",
    "fp16": "training.mixed_precision is used",
    "zero_allow_untested_optimizer": _RUNTIME,
    "zero_force_ds_cpu_optimizer": "the optimizer of the recipe is used on the host, too",
    "steps_per_print": "no effect on what is trained",
    "wall_clock_breakdown": "no effect on what is trained",
    "communication_data_type": TUNING,
    "seq_parallel_communication_data_type": TUNING,
    "sequence_parallel_size": SPLIT,
    "activation_checkpointing": "training.gradient_checkpointing is used",
    "compile": TUNING,
    "aio": TUNING,
    "flops_profiler": "no effect on what is trained",
    "comms_config": "no effect on what is trained",
    "comms_logger": "no effect on what is trained",
    "monitor_config": "no effect on what is trained",
    "tensorboard": "no effect on what is trained; training.report_to: [tensorboard]",
    "wandb": "no effect on what is trained; training.report_to: [wandb]",
}
_FSDP_DROPPED = {
    "version": "distft uses FSDP2, which trains the same",
    "sync_module_states": "of FSDP1; FSDP2 does it in another way",
    "use_orig_params": "of FSDP1; FSDP2 always does",
    "limit_all_gathers": "of FSDP1; FSDP2 always does",
    "cpu_ram_efficient_loading": "affects loading only; distft reads a unit at a time",
    "cpu_offload_pin_memory": TUNING,
    "state_dict_type": "affects saving only: distft's checkpoints can be read at every world size",
    "final_state_dict_type": "affects saving only: final/ is what transformers and peft load",
    "auto_wrap_policy": "distft wraps the model's blocks",
    "transformer_layer_cls_to_wrap": "distft wraps the model's blocks",
    "transformer_cls_to_wrap": "distft wraps the model's blocks",
    "min_num_params": "distft wraps the model's blocks",
    "backward_prefetch": TUNING,
    "backward_prefetch_policy": TUNING,
    "forward_prefetch": TUNING,
    "mixed_precision_policy": "training.mixed_precision is used",
    "reshard_after_forward": TUNING,
    "ignored_modules": TUNING,
    "activation_checkpointing_offload": TUNING,
}


_QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def read_deepspeed(options: Options, name: str) -> None:
    """An option that is a DeepSpeed config, or the path of one: strategy and offload."""
    draft, value = options.draft, options.take(name)
    if value is None or value == "":
        return
    if isinstance(value, str):
        config = _deepspeed_file(options, name, value)
        if config is None:
            return
        inner = Options(draft, config, steps=(Path(value).name,))
    elif isinstance(value, dict):
        inner = options.group(name)
    else:
        draft.problems.append(f"{options.path(name)}: got {show(value)}, need the path of a DeepSpeed config")
        return
    _read_deepspeed_config(inner, options, name)


def _deepspeed_file(options: Options, name: str, text: str) -> dict[str, Any] | None:
    draft = options.draft
    path = draft.locate(text)
    if path is None:
        if not (stage := re.search(r"z(?:ero)?_?([0-3])", text)):
            options.refuse(name, "this DeepSpeed config is not here, and its name says no ZeRO stage")
            return None
        draft.warn(f"{options.path(name)}: {text} is not here; the ZeRO stage and offload are those that its name says")
        offload = re.search(r"offload_(all|params?|opt)|offload", text)
        devices = {"offload_optimizer": {"device": "cpu"}} if offload else {}
        if offload and offload[1] in ("all", "param", "params"):
            devices["offload_param"] = {"device": "cpu"}
        return {"zero_optimization": {"stage": int(stage[1]), **devices}}
    try:
        config = json.loads(path.read_bytes()[: 2**18])
    except (OSError, ValueError, RecursionError) as error:
        draft.problems.append(f"{options.path(name)}: {clean(str(path))} cannot be read as JSON ({clean(str(error))})")
        return None
    if not isinstance(config, dict):
        draft.problems.append(f"{options.path(name)}: {clean(str(path))} is not a DeepSpeed config")
        return None
    return config


def _read_deepspeed_config(config: Options, options: Options, name: str) -> None:
    zero = config.group("zero_optimization")
    stage = zero.integer("stage") or 0
    devices = {what: zero.group(f"offload_{what}").take("device") for what in ("optimizer", "param")}
    if "nvme" in devices.values():
        options.draft.warn(f"{options.path(name)}: offload to NVMe becomes offload to host memory")
    on_host = [what for what, device in devices.items() if device in ("cpu", "nvme")]
    set_strategy(options, name, f"zero{stage}" if stage else "ddp", _offload(on_host, stage))
    zero.refuse_all(dict.fromkeys(_QUANTIZED, "distft sends weights and gradients unquantized"))
    zero.drop_all(dict.fromkeys(sorted(ZERO_KEYS), TUNING))
    zero.finish((), "DeepSpeed's zero_optimization")
    for precision in ("bf16", "fp16"):
        group = config.group(precision)
        if group.flag_or_auto("enabled") and "training.mixed_precision" not in options.draft.fields:
            group.set("training.mixed_precision", "enabled", precision)
        config.taken.discard(precision)
    for part, instead in (("optimizer", "training.optim"), ("scheduler", "training.lr_scheduler_type")):
        section = config.take(part)
        if section is None:
            continue
        if _all_auto(section):
            config.drop(part, f"its values are auto; {instead} is used")
        else:
            config.refuse(part, f"DeepSpeed would build another {part} than the training options say")
    config.drop_all(_DEEPSPEED_DROPPED)
    config.finish((), "a DeepSpeed config that distft reads")


def read_deepspeed_options(config: Options) -> None:
    """accelerate's own options for DeepSpeed, in place of a file (accelerate utils/dataclasses.py, DeepSpeedPlugin)."""
    stage = config.integer("zero_stage")
    stage = 2 if stage is None else stage
    devices = {what: config.text(f"offload_{what}_device") for what in ("optimizer", "param")}
    on_host = [what for what, device in devices.items() if device in ("cpu", "nvme")]
    set_strategy(config, "zero_stage", f"zero{stage}" if stage else "ddp", _offload(on_host, stage))
    if config.has("gradient_clipping"):
        config.drop("gradient_clipping", "training.max_grad_norm says it")
    config.drop_all(
        {
            "gradient_accumulation_steps": "training.global_batch_size says it",
            "zero3_init_flag": _RUNTIME,
            "zero3_save_16bit_model": _RUNTIME,
            "offload_optimizer_nvme_path": "offload is to host memory",
            "offload_param_nvme_path": "offload is to host memory",
            **dict.fromkeys(
                ("deepspeed_multinode_launcher", "deepspeed_hostfile", "deepspeed_exclusion_filter"),
                "torchrun and SLURM start the ranks",
            ),
            "deepspeed_inclusion_filter": "torchrun and SLURM start the ranks",
            "deepspeed_moe_layer_cls_names": TUNING,
        }
    )
    config.finish((), "accelerate's deepspeed_config")


def _offload(on_host: list[str], stage: int) -> str:
    if "param" in on_host and stage == 3:
        return "all"
    return "optimizer" if "optimizer" in on_host and stage else "none"


def _all_auto(section: Any) -> bool:
    """Whether all parameters of a DeepSpeed section are filled in from the training options. Its switches for AdamW
    (torch_adam, adam_w_mode) choose an implementation."""
    parameters = section.get("params", {}) if isinstance(section, dict) else None
    return isinstance(parameters, dict) and all(value == "auto" or value is True for value in parameters.values())


def set_strategy(options: Options, name: str, strategy: str, offload: str | None = None) -> None:
    options.set("parallelism.strategy", name, strategy)
    if offload is not None and strategy != "ddp":
        options.set("parallelism.offload", name, offload)


def read_fsdp(flags: list[str], config: Options, options: Options, name: str) -> None:
    """FSDP's flags (`full_shard auto_wrap`) and config, whose keys may begin with `fsdp_`.

    Args:
        name: the option of `options` that is shown.
    """
    draft = options.draft
    config.without_prefix("fsdp_")
    # FSDP1's strategy; newer versions of accelerate have it under the other name.
    strategy = str(config.take("sharding_strategy") or config.data.get("reshard_after_forward") or "").upper()
    by_number = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD"}
    strategy = by_number.get(strategy, strategy)
    words = {word.lower() for word in flags} | {strategy.lower()}
    if words & {"hybrid_shard", "hybrid_shard_zero2", "_hybrid_shard_zero2"}:
        kind = "hsdp"
    elif "no_shard" in words:
        kind = "ddp"
    else:
        kind = "fsdp"
        if "shard_grad_op" in words:
            draft.warn(f"{options.path(name)}: shard_grad_op keeps the weights whole; fsdp shards them, too")
    set_strategy(options, name, kind)
    offload = config.flag("offload_params")
    if kind == "ddp":
        pass
    elif offload is not None:
        config.set("parallelism.offload", "offload_params", "all" if offload else "none")
    else:
        options.set("parallelism.offload", name, "all" if "offload" in words else "none")
    if config.flag("activation_checkpointing"):
        config.set("training.gradient_checkpointing", "activation_checkpointing", True)
    config.drop_all(_FSDP_DROPPED)
    config.finish((), "an FSDP config")


def leave_to_distft(draft: Draft) -> None:
    """Let distft choose the strategy where the one of the file cannot shard what is trained here: it is the same."""
    fields = draft.fields
    strategy, optimizer = fields.get("parallelism.strategy"), str(fields.get("training.optim"))
    if strategy in ("fsdp", "hsdp") and is_bitsandbytes(optimizer):
        why = f"{optimizer} does not work under {strategy}"
    elif strategy in ("fsdp", "hsdp", "zero3") and fields.get("model.quantization") == "int8":
        why = f"{strategy} cannot shard int8 weights"
    else:
        return
    draft.change("parallelism.strategy", "auto")
    for name in ("offload", "hsdp_shard_size"):
        if f"parallelism.{name}" in fields:
            draft.change(f"parallelism.{name}", "auto")
    draft.warn(f"parallelism.strategy: {why}, so distft chooses another; what is trained stays the same")


def needs_groups(draft: Draft, shards: int, replicas: int, options: Options, name: str) -> None:
    """Sharding within groups of `shards` ranks, and `replicas` such groups."""
    if replicas > 1:
        set_strategy(options, name, "hsdp")
        options.set("parallelism.hsdp_shard_size", name, shards)
    elif shards > 1:
        set_strategy(options, name, "fsdp")
