"""What the rules know by name: model types, keys of configs, and how to look into the packages installed here.

tests/unit/test_rules.py compares the lists with the installed packages. Nothing here imports these: what their sources
show is read as text, so that it is right for the version that will run.
"""

from __future__ import annotations

import re

from distft.extras import source

# Model types whose class has no `supports_gradient_checkpointing` (transformers 5.17 to 5.23).
NO_CHECKPOINTING = frozenset(
    ["cpmant", "ctrl", "gpt_neox_japanese", "jetmoe", "openai-gpt", "reformer", "xlm", "xlnet"]
)

# Types whose layers have classes of their own, which transformers 5 does not quantize (integrations/bitsandbytes.py,
# replace_with_bnb_linear: `type(module) is nn.Linear`).
NOT_QUANTIZED = ("falcon",)
# Types that compute with the weight of a layer instead of calling it. Falcon-Mamba and Jamba do so only where they are
# not quantized.
READS_WEIGHTS = ("mamba",)

# Keys that deepspeed 0.19.4 to 0.19.8 look for at the top level of a config. The second list has features that were
# removed between these versions: where one is gone, DeepSpeed itself reports it.
DEEPSPEED_KEYS = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "autotuning",
        "bf16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_efficiency",
        "data_types",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "expert_parallel",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "hybrid_engine",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "optimizer",
        "pipeline",
        "prescale_gradients",
        "scheduler",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "steps_per_print",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)
DEEPSPEED_REMOVED = frozenset(
    [
        "amp",
        "compression_training",
        "curriculum_learning",
        "eigenvalue",
        "elasticity",
        "graph_harvesting",
        "nebula",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "sparse_gradients",
    ]
)
# What DeepSpeedZeroConfig accepts (0.19.8), by name and by alias; the run fails on any other key.
ZERO_KEYS = frozenset(
    [
        "allgather_bucket_size",
        "allgather_partitions",
        "allgather_sequential",
        "compute_grad_norm",
        "contiguous_gradients",
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "max_live_parameters",
        "max_reuse_distance",
        "memory_efficient_linear",
        "model_persistence_threshold",
        "module_granularity_threshold",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "param_persistence_threshold",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "prefetch_bucket_size",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
        "zenflow",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    ]
)
# What accelerate's FSDP2 reads from the environment that its launcher makes from fsdp_config (utils/dataclasses.py,
# FullyShardedDataParallelPlugin), ...
FSDP_KEYS = frozenset(
    [
        "fsdp_version",
        "fsdp_reshard_after_forward",
        "fsdp_offload_params",
        "fsdp_auto_wrap_policy",
        "fsdp_transformer_layer_cls_to_wrap",
        "fsdp_transformer_cls_to_wrap",
        "fsdp_min_num_params",
        "fsdp_state_dict_type",
        "fsdp_activation_checkpointing",
        "fsdp_activation_checkpointing_offload",
        "fsdp_ignored_modules",
        "fsdp_cpu_ram_efficient_loading",
    ]
)
# ... and what only FSDP1 reads.
FSDP1_KEYS = frozenset(
    [
        "fsdp_sharding_strategy",
        "fsdp_backward_prefetch",
        "fsdp_backward_prefetch_policy",
        "fsdp_forward_prefetch",
        "fsdp_use_orig_params",
        "fsdp_sync_module_states",
    ]
)


def trainer_arguments() -> frozenset[str] | None:
    """Names of the arguments of the installed transformers' TrainingArguments; None where it is not installed."""
    text = source("transformers", "training_args.py")
    field = r"^    (\w+): [^\n]* = (?:field\(|[\w\"'\[])"
    return None if text is None else frozenset(re.findall(field, text, re.MULTILINE))


def optimizers() -> frozenset[str] | None:
    """Names that the installed transformers accepts for an optimizer; None where it is not installed."""
    text = source("transformers", "training_args.py")
    names = (text or "").partition("\nclass OptimizerNames(")[2].partition("\n\n\n")[0]
    return frozenset(re.findall(r'^    \w+ = "(\w+)"', names, re.MULTILINE)) or None


def is_installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def trackers() -> frozenset[str] | None:
    """Names that the installed transformers accepts in report_to; None where it is not installed."""
    text = source("transformers", "integrations/integration_utils.py")
    table = (text or "").partition("\nINTEGRATION_TO_CALLBACK = {")[2].partition("\n}")[0]
    return frozenset(re.findall(r'"(\w+)": ', table)) or None
