"""accelerate's config → `parallelism`, and a cluster profile. The file names no model and no data: what it gives is a
part of a recipe. Names and defaults: src/accelerate/commands/config/config_args.py and commands/launch.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distft.importers import common
from distft.importers.options import Options
from distft.importers.sharding import SPLIT, read_deepspeed, read_deepspeed_options, read_fsdp, set_strategy
from distft.importers.tables import table

NAME = "accelerate"
KEYS = {
    "compute_environment",
    "distributed_type",
    "mixed_precision",
    "num_processes",
    "num_machines",
    "fsdp_config",
    "deepspeed_config",
}
_REPLICATED = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_MUSA")
# Options of `accelerate launch` (commands/launch.py), by where the config has them.
_SWITCHES = {
    "use_deepspeed": "DEEPSPEED",
    "use_fsdp": "FSDP",
    "use_megatron_lm": "MEGATRON_LM",
    "multi_gpu": "MULTI_GPU",
    "tpu": "TPU",
}
_PREFIXES = {
    "fsdp_": "fsdp_config",
    "zero": "deepspeed_config",
    "offload_": "deepspeed_config",
    "deepspeed_": "deepspeed_config",
    "gradient_": "deepspeed_config",
    "parallelism_config_": "parallelism_config",
    "megatron_lm_": "megatron_lm_config",
    "fp8_": "fp8_config",
    "dynamo_": "dynamo_config",
}
_PLAIN = {
    *("accelerate_config", "config_file", "num_processes", "num_machines", "mixed_precision", "machine_rank", "cpu"),
    *("main_process_ip", "main_process_port", "gpu_ids", "same_network", "rdzv_backend", "rdzv_conf", "downcast_bf16"),
    *("enable_cpu_affinity", "num_cpu_threads_per_process", "max_restarts", "monitor_interval", "log_dir", "role"),
    *("main_training_function", "use_parallelism_config"),
}


def is_launchers(name: str) -> bool:
    """Whether an option of a training script that has transformers' arguments is meant for accelerate's launcher."""
    begins = name.startswith(tuple(_PREFIXES)) and not name.startswith("gradient_")
    return name in _PLAIN or name in _SWITCHES or name == "gradient_clipping" or (begins and name != "fsdp_config")


def config_of(launcher: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """accelerate's config with what the options of its launcher say instead."""
    merged = dict(config)
    for name, value in launcher.items():
        group = next((group for prefix, group in _PREFIXES.items() if name.startswith(prefix)), None)
        if name in _SWITCHES:
            merged |= {"distributed_type": _SWITCHES[name]} if value is not False else {}
        elif group:
            inside = merged.get(group)
            merged[group] = {**(inside if isinstance(inside, dict) else {}), name: value}
        else:
            merged["use_cpu" if name == "cpu" else name] = value
    return merged


def read(options: Options) -> None:
    """All of a file."""
    draft = options.draft
    draft.is_part = True
    draft.fields.pop("name", None)
    environment = options.text("compute_environment")
    if environment not in (None, "LOCAL_MACHINE"):
        options.refuse("compute_environment", "distft starts ranks here, or through SLURM")
    elif environment:
        options.drop("compute_environment", "torchrun and SLURM start the ranks")
    _strategy(options)
    _precision(options)
    _machines(options)
    parallelism = options.group("parallelism_config")
    for name in list(parallelism.data):
        size = parallelism.take(name)
        if type(size) is not int:
            parallelism.drop(name, "parallelism.strategy says it")
        elif size > 1 and not name.endswith(("dp_shard_size", "dp_replicate_size")):
            parallelism.drop(name, SPLIT)
        else:
            parallelism.drop(name, "parallelism.strategy says it")
    dynamo = options.data.get("dynamo_config")
    if isinstance(dynamo, dict) and str(dynamo.get("dynamo_backend")).lower() == "inductor":
        common.compiled(options.group("dynamo_config"), "dynamo_backend")
    table("accelerate").apply(options)
    options.finish((), NAME)


def _strategy(options: Options) -> None:
    kind = str(options.take("distributed_type") or "").upper()
    if kind == "DEEPSPEED":
        config = options.group("deepspeed_config")
        if config.has("deepspeed_config_file"):
            read_deepspeed(config, "deepspeed_config_file")
            config.drop_all(dict.fromkeys(("zero3_init_flag", "zero3_save_16bit_model"), "distft sets it"))
            config.finish((), "accelerate's deepspeed_config")
        else:
            read_deepspeed_options(config)
    elif kind == "FSDP":
        read_fsdp([], options.group("fsdp_config"), options, "fsdp_config")
    elif kind in _REPLICATED:
        set_strategy(options, "distributed_type", "ddp")
    elif kind:
        options.refuse("distributed_type", "distft has DDP, DeepSpeed's ZeRO and FSDP2")
    why = "of another distributed_type: accelerate does not read it"
    options.drop_all(dict.fromkeys(("deepspeed_config", "fsdp_config"), why))


def _precision(options: Options) -> None:
    precision = options.take("mixed_precision")
    if isinstance(precision, bool):
        precision = "no"
    if precision in ("bf16", "fp16", "no"):
        options.set("training.mixed_precision", "mixed_precision", precision)
    elif precision == "fp8":
        options.set("training.mixed_precision", "mixed_precision", "bf16")
        options.draft.warn("mixed_precision: fp8 becomes bf16: more exact, and slower")
    elif precision is not None:
        options.refuse("mixed_precision", "distft has bf16, fp16 and no")


def _machines(options: Options) -> None:
    """The profile of the machines: GPUs per node. A recipe names no machine."""
    draft = options.draft
    processes, machines = options.integer("num_processes"), options.integer("num_machines") or 1
    options.taken.add("num_machines")
    if processes is None or processes < 1:
        options.taken.add("num_processes")
        return
    if processes % machines:
        draft.problems.append(
            f"num_processes: got {processes}, which {machines} machines cannot share evenly "
            f"({options.where('num_processes')})"
        )
        return
    per_node = processes // machines
    nodes = f"--nodes {machines} --gpus-per-node {per_node}"
    options.drop("num_processes", f"a recipe names no machine: launch with {nodes}")
    if options.data.get("num_machines") is not None:
        options.drop("num_machines", f"a recipe names no machine: launch with {nodes}")
    draft.cluster = {"runs_dir": "~/runs", "node": {"gpus_per_node": 0 if options.flag("use_cpu") else per_node}}
