"""accelerate's YAML, with FSDP2 and HSDP in it, and the environment that `accelerate launch` makes from it.

Read from accelerate 1.15: commands/config/config_args.py (keys), commands/launch.py and utils/launch.py (YAML →
environment), utils/dataclasses.py and parallelism_config.py (environment → plugins), utils/fsdp_utils.py.
"""

from __future__ import annotations

from typing import Any

from distft.config.recipe import Recipe
from distft.hardware.topology import Topology
from distft.strategies import merge
from distft.strategies.kinds import KINDS


def accelerate_config(
    *,
    strategy: str,
    offload: str,
    topology: Topology,
    shard_size: int,
    mixed_precision: str,
    device_type: str,
    quantization: str | None = None,
    reshard_after_forward: bool = True,
    ds_config_file: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """accelerate.yaml: `accelerate launch --config_file accelerate.yaml script.py` shards as distft does.

    On several machines, each adds `--machine_rank` and `--main_process_ip`.

    Args:
        shard_size: ranks that share one copy of the model; only used for hsdp.
        mixed_precision: bf16, fp16 or no. Not written for ZeRO, where the DeepSpeed file has it.
        device_type: cuda or cpu.
        ds_config_file: the DeepSpeed file, for ZeRO; relative to where the script starts.
        overrides: go on top of `fsdp_config` (the recipe's `fsdp.overrides`).

    Raises:
        ValueError: ZeRO without ds_config_file, or hsdp groups that do not divide the ranks, which the rules refuse
            before.
    """
    world, kind = topology.world_size, KINDS[strategy]
    plain = "NO" if world == 1 else "MULTI_CPU" if device_type == "cpu" else "MULTI_GPU"
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": {"ddp": plain, "deepspeed": "DEEPSPEED", "fsdp2": "FSDP"}[kind.engine],
        "num_machines": topology.nnodes,
        "num_processes": world,
        "machine_rank": 0,
        "use_cpu": device_type == "cpu",
    }
    if topology.nnodes > 1:
        config["rdzv_backend"] = "c10d"

    if kind.engine == "deepspeed":
        if ds_config_file is None:
            raise ValueError(f"{strategy} needs ds_config_file")
        # No mixed_precision: together with a deepspeed_config_file, accelerate fails with "the following accelerate
        # config variables will be ignored" (DeepSpeedPlugin._deepspeed_config_checks).
        section: dict[str, Any] = {"deepspeed_config_file": ds_config_file, "zero3_init_flag": kind.zero_stage == 3}
        if topology.nnodes > 1:
            # torchrun; the default, pdsh, needs ssh and a hostfile
            section["deepspeed_multinode_launcher"] = "standard"
        return config | {"deepspeed_config": section}

    config["mixed_precision"] = mixed_precision
    if kind.engine == "fsdp2":
        section = fsdp_config(
            offload=offload,
            device_type=device_type,
            quantization=quantization,
            reshard_after_forward=reshard_after_forward,
        )
        config["fsdp_config"] = merge(section, overrides or {})
    if kind.in_groups:
        if world % shard_size:
            raise ValueError(f"{strategy}: groups of {shard_size} do not divide {world} ranks")
        config["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": world // shard_size,
            "parallelism_config_dp_shard_size": shard_size,
            "parallelism_config_tp_size": 1,
            "parallelism_config_cp_size": 1,
            "parallelism_config_cp_backend": "torch",
            "parallelism_config_sp_size": 1,
            "parallelism_config_sp_backend": "deepspeed",
        }
    return config


def syncs_each_batch(recipe: Recipe) -> bool:
    """Whether FSDP2 shards the gradients after every micro-batch. Without that, as in accelerate's no_sync, whole
    gradients of all that is trained stay between them, in float32: little for adapters, whose many small messages are
    spared, and too much for whole layers."""
    return not recipe.lora or bool(recipe.lora.modules_to_save)


def fsdp_config(
    *, offload: str, device_type: str, quantization: str | None = None, reshard_after_forward: bool = True
) -> dict[str, Any]:
    """The `fsdp_config` section: FSDP2, sharded block by block.

    There is no key for dtypes: accelerate uses `mixed_precision` for the weights AND for averaging gradients
    (FullyShardedDataParallelPlugin.set_mixed_precision). To average in float32 a trainer passes a MixedPrecisionPolicy.
    """
    return {
        "fsdp_version": 2,
        # No class names: accelerate uses the model's own `_no_split_modules`.
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": reshard_after_forward,  # false keeps what the forward pass gathered (ZeRO-2)
        "fsdp_offload_params": offload == "all",
        # With SHARDED_STATE_DICT transformers' Trainer.save_model() silently writes NOTHING (trainer.py 5.23), and a
        # script ends without its model. The cost: at a checkpoint rank 0 has model and optimizer in host memory.
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        # For scripts: the first rank sends its weights to the others, whose own, which transformers 5.23 reads as well,
        # are dropped before they are sharded; recipes are read unit by unit (train/streaming.py). Not on a CPU, where
        # accelerate ignores FSDP and would wrap empty weights in DDP; not with bitsandbytes weights, which it does not
        # send, while transformers may leave them uninitialized on the other ranks.
        "fsdp_cpu_ram_efficient_loading": device_type == "cuda" and quantization is None,
        # As under every strategy, the model's own gradient checkpointing is used; both together are an error.
        "fsdp_activation_checkpointing": False,
    }


def needs(config: dict[str, Any]) -> str:
    """A comment for the file: what `accelerate launch` needs for it.

    Seen with accelerate 1.15: without GPUs every process is a world of 1, and nothing says so.
    """
    if config["use_cpu"]:
        lines = ["For CPU processes, which distft alone starts as one job: with `accelerate launch` each would train a"]
        lines.append("lone copy, and nothing would say so.")
    else:
        gpus = config["num_processes"] // config["num_machines"]
        lines = [
            f"Needs {gpus} NVIDIA GPU{'s' * (gpus > 1)} on each machine. Without, each process of `accelerate launch`"
        ]
        lines.append("would train a lone copy, and nothing would say so: use `distft launch` there.")
    return "".join(f"# {line}\n" for line in lines)


def accelerate_environment(config: dict[str, Any], mixed_precision: str | None = None) -> dict[str, str]:
    """The environment that `accelerate launch` gives the ranks for this config, for ranks that torchrun starts.

    `mixed_precision` is launch's option of that name: the only way to pass it to a script under ZeRO. Variables that
    would have accelerate's defaults (torch.compile's, FSDP1's) are left out.
    """
    kind = config["distributed_type"]
    env = {"ACCELERATE_MIXED_PRECISION": mixed_precision or config.get("mixed_precision") or "no"}
    if kind in ("NO", "MULTI_CPU") or (kind == "FSDP" and config["use_cpu"]):
        # Without it CPU ranks do not see each other (PartialState._prepare_backend), and each trains alone. `accelerate
        # launch` leaves it out for FSDP.
        env["ACCELERATE_USE_CPU"] = str(config["use_cpu"])
    if kind == "DEEPSPEED":
        # No ACCELERATE_USE_CPU here: it turns DeepSpeed off (AcceleratorState).
        section = config["deepspeed_config"]
        env |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_CONFIG_DS_FIELDS": ",".join(section),
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": section["deepspeed_config_file"],
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": _text(section["zero3_init_flag"]),
        }
    if kind == "FSDP":
        env["ACCELERATE_USE_FSDP"] = "true"
        for key, value in config["fsdp_config"].items():
            name = key.removeprefix("fsdp_").replace("transformer_layer_cls_to_wrap", "transformer_cls_to_wrap")
            env[f"FSDP_{name.upper()}"] = _text(value)
    if "parallelism_config" in config:
        env["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        env |= {key.upper(): _text(value) for key, value in config["parallelism_config"].items()}
    return env


def _text(value: Any) -> str:
    """A value as accelerate's launcher spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
