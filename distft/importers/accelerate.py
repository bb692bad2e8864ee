"""accelerate's config → `parallelism`, and a cluster profile. The file names no model and no data: what it gives is a
part of a recipe. Names and defaults: src/accelerate/commands/config/config_args.py and commands/launch.py."""

from __future__ import annotations

from distft.importers.options import Options
from distft.importers.sharding import SPLIT, read_deepspeed, read_deepspeed_options, read_fsdp, set_strategy
from distft.importers.tables import table

NAME = "accelerate"
KEYS = {"compute_environment", "distributed_type", "num_processes", "num_machines", "fsdp_config", "deepspeed_config"}
_REPLICATED = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_MUSA")


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
    table("accelerate").apply(options)
    options.finish((), NAME)


def _strategy(options: Options) -> None:
    kind = str(options.take("distributed_type") or "NO").upper()
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
    else:
        options.refuse("distributed_type", "distft has DDP, DeepSpeed's ZeRO and FSDP2")
    for name in ("deepspeed_config", "fsdp_config"):
        options.taken.add(name)


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
