"""DeepSpeed's JSON: for a run, with every value written out, and a portable one, with "auto", for your own scripts.

Keys and defaults are those of deepspeed 0.19.8 (runtime/config.py, runtime/precision_config.py, runtime/zero/config.py,
runtime/zero/offload_config.py). The documented defaults differ from the code's, and DeepSpeed ignores misspelled
top-level keys, so a run's file relies on no default; test_strategies.py holds every key against
those modules. Bucket sizes and thresholds count ELEMENTS, not bytes. ds_configs/README.md gives each field's reason.
"""

from __future__ import annotations

from typing import Any

from distft.config.batch import Batch
from distft.config.recipe import Recipe
from distft.strategies import merge
from distft.strategies.kinds import KINDS, Kind

MILLION = 1_000_000
# 200 MB per message in float32: far less reaches the bandwidth of NVLink and InfiniBand (DeepSpeed's own 5e8 are 2 GB,
# twice that with overlap_comm, even for an adapter of 20 million elements).
LARGEST_BUCKET = 50 * MILLION
SMALLEST_BUCKET = MILLION
# Elements below which ZeRO-3 leaves a tensor whole (DeepSpeed's default): norms, biases, thin LoRA matrices.
PERSISTENT = 100_000
# At most so many elements stay whole for that reason: 0.2 GB in 16 bit. DeepSpeed has no such bound by default.
LARGEST_PERSISTENT = 100 * MILLION


def bucket_size(trainable_parameters: int) -> int:
    """Elements per gradient bucket: a quarter of the trained parameters, in whole millions, from 1 to 50 million.

    A quarter, so that three buckets travel while the backward pass still fills the last one. Only trained parameters
    have gradients: under LoRA the model's size does not matter.
    """
    quarter = -(-trainable_parameters // (4 * MILLION)) * MILLION
    return min(max(quarter, SMALLEST_BUCKET), LARGEST_BUCKET)


def deepspeed_config(
    *,
    strategy: str,
    offload: str,
    world_size: int,
    device_type: str,
    recipe: Recipe,
    batch: Batch,
    trainable_parameters: int,
) -> dict[str, Any]:
    """ds_config.json of a run: no "auto", no reliance on defaults; the recipe's `deepspeed.overrides` are on top.

    It has no "optimizer" and no "scheduler": the Trainer builds them, so that every strategy has the same parameter
    groups (DeepSpeed's own optimizer would decay norms and biases too).

    Raises:
        ValueError: this stage cannot offload that, which the rules refuse before.
    """
    precision = recipe.training.mixed_precision
    config = {
        "train_batch_size": batch.micro_batch_size * batch.gradient_accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "gradient_clipping": float(recipe.training.max_grad_norm),  # 0.0: no clipping
        **_precision(bf16=precision == "bf16", fp16=precision == "fp16", masters=not recipe.training.is_pure_bf16),
        **_optimizer_and_reports(),
        "zero_optimization": _zero_optimization(
            KINDS[strategy],
            offload,
            bucket=bucket_size(trainable_parameters),
            pin_memory=device_type == "cuda",
            # The trainer gathers only trained tensors, one by one; DeepSpeed would gather the base model too.
            gather_on_save=False,
        ),
    }
    return merge(config, recipe.deepspeed.overrides)


def portable_config(*, strategy: str, offload: str, device_type: str = "cuda") -> dict[str, Any]:
    """A ds_config.json for your own script: "auto" wherever transformers.Trainer or accelerate knows better.

    It has no "optimizer" either, not even with offload: every accelerate script that makes its own would fail ("You
    cannot specify an optimizer in the config file and in the code at the same time").

    Raises:
        ValueError: this stage cannot offload that.
    """
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        **_precision(bf16="auto", fp16="auto"),
        **_optimizer_and_reports(),
        "zero_optimization": _zero_optimization(
            KINDS[strategy],
            offload,
            # A number, not "auto": that means hidden_size squared, whatever is trained, and accelerate refuses it for
            # a model without config.hidden_size ("Can't find `model.config` entry").
            bucket=LARGEST_BUCKET,
            pin_memory=device_type == "cuda",
            gather_on_save=True,
        ),
    }


def _precision(*, bf16: bool | str, fp16: bool | str, masters: bool = True) -> dict[str, Any]:
    """The dtypes of weights, gradients and messages, and how gradients are reduced."""
    return {
        "bf16": {
            "enabled": bf16,
            # Only for ZeRO-1: gradients are added to the float32 sum one by one, so there is no 16-bit copy beside it.
            "immediate_grad_update": True,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": not masters,
            "bf16_optimizer_states": not masters,
        },
        "fp16": {
            "enabled": fp16,
            "auto_cast": False,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
            "fp16_master_weights_and_grads": False,
        },
        "torch_autocast": {"enabled": False},
        # Micro-batches are summed, and ranks averaged, in float32. The default is the working precision, in which the
        # sum of many micro-batches loses digits, so that the loss would depend on the world size.
        "data_types": {"grad_accum_dtype": "fp32" if masters else "bf16"},
        "communication_data_type": "fp32",
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
    }


def _optimizer_and_reports() -> dict[str, Any]:
    return {
        "zero_allow_untested_optimizer": True,  # bitsandbytes, Adafactor
        # Under offload too the optimizer stays as it is. With true, accelerate replaces it with DeepSpeedCPUAdam, and
        # anything but torch's AdamW (Lion, 8 bit, even a DeepSpeedCPUAdam made for AdamW) becomes Adam with COUPLED
        # weight decay (accelerate/utils/deepspeed.py, map_pytorch_optim_to_deepspeed). Next to nothing is lost: torch's
        # fused AdamW is as fast as the host's memory, too (benchmarks/host_adamw.py), and DeepSpeed's must be compiled
        # first, on a node with a compiler and the CUDA toolkit.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,  # never: metrics.jsonl has it
        "wall_clock_breakdown": False,  # true would synchronize the device in every phase
        "memory_breakdown": False,
        "dump_state": False,
    }


def _zero_optimization(
    kind: Kind, offload: str, *, bucket: int, pin_memory: bool, gather_on_save: bool
) -> dict[str, Any]:
    """The `zero_optimization` section: what the code of this stage reads, and no more."""
    stage = kind.zero_stage
    if stage is None:
        raise ValueError(f"{kind.name} is not DeepSpeed's")
    if offload not in ("none", *kind.offloads):
        raise ValueError(f"ZeRO-{stage} cannot offload {offload!r}")
    optimizer_device = "none" if offload == "none" else "cpu"
    section: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "overlap_comm": True,
        "offload_optimizer": {
            "device": optimizer_device,
            "pin_memory": pin_memory and optimizer_device == "cpu",
            "ratio": 1.0,
            "super_offload": False,
        },
    }
    if stage < 3:
        return section | {
            "allgather_partitions": True,
            "allgather_bucket_size": bucket,
            "use_multi_rank_bucket_allreduce": True,
            # It reorders parameters, and DeepSpeed 0.19.8 then finds other parameters' masters under their names
            # (_link_all_hp_params): what it saves is mixed up.
            "round_robin_gradients": False,
            "ignore_unused_parameters": True,
            "load_from_fp32_weights": True,
        }
    param_device = "cpu" if offload == "all" else "none"
    return section | {
        "offload_param": {"device": param_device, "pin_memory": pin_memory and param_device == "cpu"},
        # Elements per slice of the optimizer step, whose float32 temporaries take 0.4 GB (DeepSpeed's 1e9: 4 GB).
        "sub_group_size": 100 * MILLION,
        "stage3_prefetch_bucket_size": 50 * MILLION,
        "stage3_param_persistence_threshold": PERSISTENT,
        "stage3_model_persistence_threshold": LARGEST_PERSISTENT,
        # Gathered parameters that are live at a time: 2 GB in 16 bit, and what the next layers need.
        "stage3_max_live_parameters": 1_000 * MILLION,
        "stage3_max_reuse_distance": 1_000 * MILLION,
        "stage3_gather_16bit_weights_on_model_save": gather_on_save,
        "stage3_module_granularity_threshold": 0,
        "stage3_use_all_reduce_for_fetch_params": False,
        "stage3_allgather_sequential": False,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
        "memory_efficient_linear": True,
        "override_module_apply": True,
    }
