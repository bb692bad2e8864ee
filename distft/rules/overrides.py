"""What deepspeed.overrides and fsdp.overrides may contain: DeepSpeed's config, accelerate's fsdp_config."""

from __future__ import annotations

from collections.abc import Iterable

from distft.rules import upstream
from distft.rules.core import Case, RecipeCase, ScriptCase, look, rule, show

ZERO = "deepspeed.overrides.zero_optimization"


# ---- DeepSpeed


@rule(
    "a key of deepspeed.overrides that DeepSpeed does not know",
    "DeepSpeed 0.19.8 runtime/config.py reads a dict by known keys; "
    "https://huggingface.co/docs/transformers/main_classes/deepspeed: typos fall back to the default",
    "correct or remove it",
    for_scripts=True,
)
def deepspeed_keys_must_exist(case: Case) -> str | None:
    """DeepSpeed looks for the keys that it knows and ignores all others: a misspelled one has no effect."""
    if not case.zero:
        return None
    unknown = case.deepspeed.keys() - upstream.DEEPSPEED_KEYS - upstream.DEEPSPEED_REMOVED
    return unknown_keys("deepspeed.overrides", unknown, upstream.DEEPSPEED_KEYS)


@rule(
    "a key of deepspeed.overrides.zero_optimization that DeepSpeed does not know",
    "DeepSpeed 0.19.8 runtime/config_utils.py:110: extra='forbid'; runtime/zero/config.py, DeepSpeedZeroConfig",
    "correct or remove it",
    for_scripts=True,
)
def zero_keys_must_exist(case: Case) -> str | None:
    """Below zero_optimization DeepSpeed accepts no key that it does not know; every rank would fail, after loading the
    weights.
    """
    section = case.zero_option()
    if not case.zero or not isinstance(section, dict):
        return None
    return unknown_keys(ZERO, section.keys() - upstream.ZERO_KEYS, upstream.ZERO_KEYS)


@rule(
    "a deepspeed.overrides.zero_optimization.stage that is not the strategy's",
    "distft/train/strategy_check.py, check; accelerate 1.15 utils/dataclasses.py, DeepSpeedPlugin",
    "set parallelism.strategy instead",
    for_scripts=True,
)
def the_strategy_sets_the_stage(case: Case) -> str | None:
    """The plan depends on the stage: memory, zero.Init, saving. Another one in the config makes the plan wrong, and the
    run fails when it checks what wraps the model.
    """
    stage = case.zero_option("stage")
    if case.zero and stage is not None and str(stage) != str(case.zero_stage):
        return f"{ZERO}.stage: got {show(stage)}, and the strategy is {case.strategy}"
    return None


@rule(
    "an offload in deepspeed.overrides or fsdp.overrides that is not parallelism.offload",
    "DeepSpeed 0.19.8 runtime/zero/offload_config.py; distft/planner/memory.py counts by parallelism.offload",
    "set parallelism.offload (none, optimizer or all) instead",
    for_scripts=True,
)
def offload_is_planned(case: Case) -> str | None:
    """The plan counts what is in host memory. An override that moves something else there, or keeps it on the GPU,
    makes the plan's memory wrong.
    """
    for what in ("optimizer", "param") if case.zero else ():
        device = case.zero_option(f"offload_{what}", "device")
        if device is not None and (device != "none") != case.offloads(what):
            return f"{ZERO}.offload_{what}.device: got {show(device)}, and parallelism.offload is {case.offload}"
    moves = case.fsdp_config.get("fsdp_offload_params")
    if case.fsdp and isinstance(moves, bool) and moves != (case.offload == "all"):
        return f"fsdp.overrides.fsdp_offload_params: got {show(moves)}, and parallelism.offload is {case.offload}"
    return None


@rule(
    "round_robin_gradients under zero1 or zero2",
    "DeepSpeed 0.19.8 runtime/zero/stage_1_and_2.py:824 (_link_all_hp_params follows the order of the groups, the flat "
    "masters that of the round robin); tests/integration/test_resume.py",
    "leave it out",
    for_scripts=True,
)
def round_robin_mixes_up_parameters(case: Case) -> str | None:
    """It reorders parameters among the ranks, and DeepSpeed then looks for a parameter's float32 master where another's
    is: what is saved and restored under its name is another's.
    """
    if case.zero_stage in (1, 2) and case.zero_option("round_robin_gradients"):
        return f"{ZERO}.round_robin_gradients: got true, which mixes up the saved parameters"
    return None


@rule(
    "offload to nvme without zero3, or without an nvme_path",
    "https://www.deepspeed.ai/docs/config-json/#parameter-offloading; DeepSpeed 0.19.8 "
    "runtime/zero/stage_1_and_2.py:229 (NVMe offload uses the CPU's path) and partition_parameters.py:1229 (nvme_path "
    "cannot be None)",
    "use zero3 and name an nvme_path, or device: cpu",
    for_scripts=True,
)
def nvme_needs_zero3_and_a_path(case: Case) -> str | None:
    """Only ZeRO-3 swaps to disk; stages 1 and 2 would silently use host memory. The path is never guessed."""
    for what in ("optimizer", "param") if case.zero else ():
        section = case.zero_option(f"offload_{what}")
        if look(section, "device") == "nvme" and (case.zero_stage != 3 or not look(section, "nvme_path")):
            return f"{ZERO}.offload_{what}.device: nvme needs zero3 and an nvme_path beside it"
    return None


@rule(
    "offload_optimizer.ratio below 1 without zero3 and DeepSpeedCPUAdam",
    "DeepSpeed 0.19.8 runtime/zero/config.py:399 (Partial offloading only supported for ZeRO Stage 3) and "
    "stage3.py:316 (Hybrid Optimizer Only Supports DeepSpeedCPUAdam)",
    "leave the ratio out, or use zero3 with deepspeed.overrides.zero_force_ds_cpu_optimizer: true",
    for_scripts=True,
)
def partial_offload_needs_zero3_and_cpu_adam(case: Case) -> str | None:
    """Only ZeRO-3 can split the optimizer between host and GPU, and its host part must be DeepSpeedCPUAdam. By default
    distft lets torch's AdamW step on the host.
    """
    ratio = case.zero_option("offload_optimizer", "ratio")
    if not (case.zero and case.offloads("optimizer") and isinstance(ratio, (int, float)) and ratio < 1):
        return None
    if case.zero_stage == 3 and case.deepspeed.get("zero_force_ds_cpu_optimizer"):
        return None
    return f"{ZERO}.offload_optimizer.ratio: got {show(ratio)}, not possible for {case.strategy} with torch's AdamW"


@rule(
    "batch size, clipping or precision in deepspeed.overrides, other than the recipe's",
    "transformers 5.23 integrations/deepspeed.py:145, trainer_config_process: mismatches end the run",
    "set training.* instead, and leave it out here",
)
def deepspeed_must_agree_with_the_recipe(case: RecipeCase) -> str | None:
    """The recipe sets batch size, clipping and precision, and the generated config has them. transformers compares that
    config with its own arguments and fails where they differ.
    """
    if not case.zero:
        return None
    training = case.recipe.training
    batch, wrong = training.global_batch_size, []
    expected: dict[tuple[str, ...], object] = {
        ("train_batch_size",): batch,
        ("train_micro_batch_size_per_gpu",): case.micro_batch_size,
        ("gradient_accumulation_steps",): case.accumulation,
        ("gradient_clipping",): training.max_grad_norm,
        ("bf16", "enabled"): training.mixed_precision == "bf16",
        ("fp16", "enabled"): training.mixed_precision == "fp16",
    }
    if training.is_pure_bf16:
        expected |= {("bf16", name): True for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states")}
        expected["data_types", "grad_accum_dtype"] = "bf16"
    for keys, value in expected.items():
        given = look(case.deepspeed, *keys)
        if given not in (None, "auto") and value is not None and given != value:
            wrong.append(f"{'.'.join(keys)} is {show(given)}, the recipe's {show(value)}")
    return f"deepspeed.overrides: {', '.join(wrong)}" if wrong else None


@rule(
    "gradient_allreduce_op: sum under zero3",
    "DeepSpeed 0.19.8 runtime/config.py:696: gradient_allreduce_op='sum' is not supported with ZeRO stage 3",
    "leave it out",
    for_scripts=True,
)
def zero3_averages_gradients(case: Case) -> str | None:
    """ZeRO-3 refuses to sum gradients over the ranks."""
    if case.zero_stage == 3 and case.deepspeed.get("gradient_allreduce_op") == "sum":
        return "deepspeed.overrides.gradient_allreduce_op: zero3 does not support sum"
    return None


@rule(
    "gradient_allreduce_op: sum under zero1 or zero2",
    "DeepSpeed 0.19.8 runtime/config.py, GRADIENT_ALLREDUCE_OP",
    "leave it out",
    kind="warning",
)
def summed_gradients_grow_with_the_world_size(case: RecipeCase) -> str | None:
    """The loss is already the mean over the whole global batch. Gradients that are summed instead of averaged grow with
    the number of ranks, and so does every step before clipping: the recipe would train differently at every world size.
    """
    if case.zero_stage in (1, 2) and case.deepspeed.get("gradient_allreduce_op") == "sum":
        return (
            f"deepspeed.overrides.gradient_allreduce_op: sum makes gradients {case.topology.world_size} times as large"
        )
    return None


@rule(
    "prescale_gradients or gradient_predivide_factor under zero2 or zero3",
    "DeepSpeed 0.19.8 runtime/zero/stage_1_and_2.py:350 and stage3.py:395: not yet supported with reduce "
    "scatter enabled",
    "leave it out, or set zero_optimization.reduce_scatter: false (zero2)",
    for_scripts=True,
)
def reduce_scatter_takes_no_prescaling(case: Case) -> str | None:
    """prescale_gradients and gradient_predivide_factor are for the all-reduce of stage 1; the reduce-scatter of stages
    2 and 3 asserts that they are not used.
    """
    scales = case.deepspeed.get("prescale_gradients") is True
    divides = case.deepspeed.get("gradient_predivide_factor", 1) != 1
    if case.zero_stage in (2, 3) and (scales or divides) and case.zero_option("reduce_scatter") is not False:
        key = "prescale_gradients" if scales else "gradient_predivide_factor"
        return f"deepspeed.overrides.{key}: not possible with reduce_scatter, which {case.strategy} uses"
    return None


@rule(
    "compute_grad_norm: false under zero3, with offload or clipping, or in bf16 under zero1",
    "DeepSpeed 0.19.8 runtime/zero/config.py:392, stage_1_and_2.py:213-218 and engine.py:2308",
    "leave it out",
    for_scripts=True,
)
def gradient_norm_is_needed(case: Case) -> str | None:
    """compute_grad_norm: false is for stages 1 and 2, without offload and without clipping; nor does stage 1 support it
    in bf16 with float32 sums, as distft configures it.
    """
    if not case.zero or case.zero_option("compute_grad_norm") is not False:
        return None
    clips = isinstance(case, RecipeCase) and case.recipe.training.max_grad_norm > 0
    in_bf16 = case.zero_stage == 1 and case.mixed_precision == "bf16"
    if case.zero_stage == 3 or case.offload != "none" or clips or in_bf16:
        return f"{ZERO}.compute_grad_norm: false needs zero1 or zero2 without offload and clipping, and zero1 no bf16"
    return None


@rule(
    "16-bit master weights without offload and DeepSpeedCPUAdam",
    "DeepSpeed 0.19.8 runtime/base_optimizer.py:484, _configure_master_weights; stage3.py:300; stage_1_and_2.py:332",
    "leave them out, or use parallelism.offload with deepspeed.overrides.zero_force_ds_cpu_optimizer: true",
    for_scripts=True,
)
def low_precision_masters_need_cpu_adam(case: Case) -> str | None:
    """16-bit master weights are for DeepSpeedCPUAdam under ZeRO-Offload. Another optimizer works only together with
    bf16_optimizer_states, and only with nothing offloaded.
    """
    if not case.zero:
        return None
    cpu_adam = case.offload != "none" and case.deepspeed.get("zero_force_ds_cpu_optimizer")
    masters = look(case.deepspeed, "bf16", "bf16_master_weights_and_grads")
    states = look(case.deepspeed, "bf16", "bf16_optimizer_states")
    if look(case.deepspeed, "fp16", "fp16_master_weights_and_grads") and not cpu_adam:
        return "deepspeed.overrides.fp16.fp16_master_weights_and_grads: needs offload and DeepSpeedCPUAdam"
    if masters and not cpu_adam and (not states or case.offload != "none"):
        return "deepspeed.overrides.bf16.bf16_master_weights_and_grads: needs offload and DeepSpeedCPUAdam"
    if states and not masters:
        return "deepspeed.overrides.bf16.bf16_optimizer_states: needs bf16_master_weights_and_grads"
    return None


@rule(
    "a zero_hpz_partition_size without zero3, or that does not divide the ranks",
    "DeepSpeed 0.19.8 utils/groups.py, _create_zero_param_parallel_group; https://www.deepspeed.ai/tutorials/zeropp",
    "use zero3 and a size that divides the ranks (those of one node: --gpus-per-node)",
    for_scripts=True,
)
def hpz_groups_divide_the_ranks(case: Case) -> str | None:
    """hpZ keeps a second copy of the weights in each group of ranks, so that the backward pass gathers within the
    group. Only ZeRO-3 has it, and all groups must have the same size.
    """
    size = case.zero_option("zero_hpz_partition_size")
    if not case.zero or type(size) is not int or size <= 1:
        return None
    world = case.topology.world_size
    if case.zero_stage != 3 or world % min(size, world):
        return f"{ZERO}.zero_hpz_partition_size: got {size}, for {case.strategy} on {world} ranks"
    return None


@rule(
    "an optimizer or scheduler in deepspeed.overrides",
    "distft/strategies/deepspeed.py: no optimizer section; DeepSpeed's optimizers get one parameter group",
    "use training.optim, training.weight_decay and training.lr_scheduler_type",
    kind="warning",
)
def the_optimizer_belongs_in_the_recipe(case: RecipeCase) -> str | None:
    """DeepSpeed builds what its config names, over all parameters alike: norms and biases decay too, and the schedule
    differs, so the losses are not those of the other strategies.
    """
    named = [key for key in ("optimizer", "scheduler") if case.zero and case.deepspeed.get(key)]
    return f"deepspeed.overrides: DeepSpeed's {' and '.join(named)} would replace the recipe's" if named else None


@rule(
    "a script under zero3 with stage3_gather_16bit_weights_on_model_save: false",
    "transformers 5.23 trainer.py:4116: stage3_gather_16bit_weights_on_model_save=false. Saving the full "
    "checkpoint instead",
    "leave it true",
    kind="warning",
    for_scripts=True,
)
def zero3_scripts_must_gather_to_save(case: Case) -> str | None:
    """A script's save_model() under ZeRO-3 writes a model only if DeepSpeed gathers it first; otherwise it writes a
    checkpoint in pieces, which zero_to_fp32.py must join. (For a recipe, distft gathers the weights itself.)
    """
    key = "stage3_gather_16bit_weights_on_model_save"
    if isinstance(case, ScriptCase) and case.zero_stage == 3 and case.zero_option(key) is False:
        return f"{ZERO}.{key}: without it save_model() writes no model"
    return None


# ---- FSDP


@rule(
    "a key of fsdp.overrides that accelerate does not know",
    "accelerate 1.15 utils/dataclasses.py:1828, FullyShardedDataParallelPlugin: reads FSDP_* of the environment",
    "correct or remove it",
    for_scripts=True,
)
def fsdp_keys_must_exist(case: Case) -> str | None:
    """fsdp_config reaches accelerate as environment variables; one that nobody reads is ignored."""
    if not case.fsdp:
        return None
    keys = upstream.FSDP_KEYS | upstream.FSDP1_KEYS
    return unknown_keys("fsdp.overrides", case.fsdp_config.keys() - keys, keys)


@rule(
    "fsdp.overrides.fsdp_version: 1 for a recipe",
    "distft/train/strategy_check.py looks for torch's FSDPModule, which is FSDP2's",
    "leave it out",
)
def recipes_use_fsdp2(case: RecipeCase) -> str | None:
    """The trainer of recipes is written for FSDP2: dtypes, saving and the check of what wraps the model. Under FSDP1
    the run fails at that check.
    """
    if case.fsdp and case.fsdp_version != "2":
        return f"fsdp.overrides.fsdp_version: got {case.fsdp_version}, and recipes run under FSDP2"
    return None


@rule(
    "FSDP1's keys in fsdp.overrides under FSDP2",
    "accelerate 1.15 utils/dataclasses.py:1845 (sharding strategy), :1904 (prefetch), :1938-1953: read for "
    "fsdp_version 1 only",
    "leave it out, or for a script: fsdp.overrides.fsdp_version: 1",
    for_scripts=True,
)
def fsdp2_has_no_fsdp1_keys(case: Case) -> str | None:
    """FSDP2 has no choice of sharding strategy, prefetch or use_orig_params, and accelerate does not read these keys
    for it: they would silently have no effect.
    """
    given = sorted(case.fsdp_config.keys() & upstream.FSDP1_KEYS)
    if case.fsdp and case.fsdp_version == "2" and given:
        return f"fsdp.overrides: got {', '.join(given)}, which FSDP2 does not have"
    return None


@rule(
    "fsdp_reshard_after_forward that is not a boolean under FSDP2, or is one under FSDP1",
    "accelerate 1.15 utils/dataclasses.py:1876-1885: a `bool` with FSDP2, a `str` with FSDP1",
    "use true or false with FSDP2; FULL_SHARD, SHARD_GRAD_OP, ... with fsdp_version: 1",
    for_scripts=True,
)
def reshard_after_forward_has_two_spellings(case: Case) -> str | None:
    """For FSDP2 it says whether weights are freed after the forward pass, for FSDP1 it names a sharding strategy.
    distft writes true, so a script that wants FSDP1 must name its strategy.
    """
    if not case.fsdp:
        return None
    given = case.fsdp_config.get("fsdp_reshard_after_forward", True)
    if (str(given).lower() in ("true", "false")) != (case.fsdp_version == "2"):
        return f"fsdp.overrides.fsdp_reshard_after_forward: got {show(given)} under FSDP{case.fsdp_version}"
    return None


@rule(
    "fsdp_state_dict_type: LOCAL_STATE_DICT under FSDP2",
    "accelerate 1.15 utils/dataclasses.py:2069: FSDP2 does not support LOCAL_STATE_DICT",
    "use FULL_STATE_DICT or SHARDED_STATE_DICT",
    for_scripts=True,
)
def fsdp2_has_no_local_state_dict(case: Case) -> str | None:
    """LOCAL_STATE_DICT saved FSDP1's flat parameters, which FSDP2 does not have."""
    if case.fsdp and case.fsdp_version == "2" and _text(case, "fsdp_state_dict_type") == "LOCAL_STATE_DICT":
        return "fsdp.overrides.fsdp_state_dict_type: got LOCAL_STATE_DICT, which FSDP2 does not have"
    return None


@rule(
    "a script under fsdp or hsdp with fsdp_state_dict_type: SHARDED_STATE_DICT",
    "transformers 5.23 trainer.py, save_model: writes under FSDP only with FULL_STATE_DICT; seen with accelerate 1.15",
    "leave it at FULL_STATE_DICT, or save the model in the script itself",
    kind="warning",
    for_scripts=True,
)
def sharded_state_dicts_save_no_model(case: Case) -> str | None:
    """With SHARDED_STATE_DICT transformers' Trainer.save_model() silently writes nothing, and a script ends without its
    model. (For a recipe, distft gathers the weights itself.)
    """
    sharded = case.fsdp and _text(case, "fsdp_state_dict_type") == "SHARDED_STATE_DICT"
    if isinstance(case, ScriptCase) and sharded:
        return "fsdp.overrides.fsdp_state_dict_type: with SHARDED_STATE_DICT transformers' save_model() writes nothing"
    return None


@rule(
    "fsdp_activation_checkpointing together with training.gradient_checkpointing",
    "transformers 5.23 trainer.py:880: can't both be set to True",
    "leave fsdp_activation_checkpointing out: training.gradient_checkpointing does the same under every strategy",
)
def checkpointing_is_set_once(case: RecipeCase) -> str | None:
    """With FSDP's checkpointing and the model's own, every block would be recomputed twice; transformers refuses it."""
    if case.fsdp and case.gradient_checkpointing and case.fsdp_config.get("fsdp_activation_checkpointing"):
        return "fsdp.overrides.fsdp_activation_checkpointing: true together with training.gradient_checkpointing"
    return None


@rule(
    "fsdp_activation_checkpointing_offload without fsdp_activation_checkpointing",
    "accelerate 1.15 utils/dataclasses.py:1968-1971",
    "add fsdp_activation_checkpointing: true, with FSDP2",
    for_scripts=True,
)
def activation_offload_needs_checkpointing(case: Case) -> str | None:
    """It moves to the host the inputs that FSDP2's own checkpointing keeps; without that there is nothing to move."""
    config = case.fsdp_config
    if not case.fsdp or not config.get("fsdp_activation_checkpointing_offload"):
        return None
    if config.get("fsdp_activation_checkpointing") and case.fsdp_version == "2":
        return None
    return "fsdp.overrides.fsdp_activation_checkpointing_offload: without FSDP2's activation checkpointing"


@rule(
    "fsdp_cpu_ram_efficient_loading",
    "transformers 5.23 core_model_loading.py reads the whole model on every rank either way; accelerate 1.15 "
    "utils/fsdp_utils.py:628 fails for persistent buffers",
    "leave it out",
)
def weights_are_read_by_unit(case: RecipeCase) -> str | None:
    """distft reads the weights of each unit just before FSDP2 shards it, so that this would have no effect."""
    if case.fsdp and "fsdp_cpu_ram_efficient_loading" in case.fsdp_config:
        return "fsdp.overrides.fsdp_cpu_ram_efficient_loading: has no effect: a unit of the model is read at a time"
    return None


@rule(
    "fsdp_auto_wrap_policy: NO_WRAP",
    "accelerate 1.15 utils/dataclasses.py:1936: NO_WRAP is no policy at all; torch.distributed.fsdp.fully_shard docs",
    "leave it at TRANSFORMER_BASED_WRAP",
    kind="warning",
    for_scripts=True,
)
def one_unit_gathers_all_weights(case: Case) -> str | None:
    """FSDP gathers one unit at a time. With NO_WRAP the whole model is one unit, gathered as a whole in every forward
    pass: the peak is that without sharding, and nothing overlaps.
    """
    if case.fsdp and _text(case, "fsdp_auto_wrap_policy") == "NO_WRAP":
        return "fsdp.overrides.fsdp_auto_wrap_policy: NO_WRAP gathers all weights at once"
    return None


# ---- any of them


@rule(
    "deepspeed.overrides without ZeRO, fsdp.overrides without fsdp or hsdp",
    "distft/strategies: each strategy has its own config",
    "set parallelism.strategy, or remove it",
    kind="warning",
    for_scripts=True,
)
def overrides_of_another_strategy(case: Case) -> str | None:
    """deepspeed.overrides are read under zero1, zero2 and zero3, fsdp.overrides under fsdp and hsdp."""
    unread = []
    if case.deepspeed and not case.zero:
        unread.append("deepspeed.overrides")
    if case.fsdp_config and not case.fsdp:
        unread.append("fsdp.overrides")
    return f"{' and '.join(unread)}: not read under {case.strategy}" if unread else None


def unknown_keys(where: str, unknown: Iterable[str], names: Iterable[str]) -> str | None:
    """`where: unknown key a (did you mean b?)`, for all of them."""
    if not unknown:
        return None
    from distft.config.schema_text import closest

    found = []
    for key in sorted(map(str, unknown)):
        near = closest(key, sorted(names))
        found.append(show(key) + (f" (did you mean {near}?)" if near else ""))
    return f"{where}: unknown key {', '.join(found)}"


def _text(case: Case, key: str) -> str:
    """A value of fsdp.overrides as accelerate compares it."""
    return str(case.fsdp_config.get(key, "")).upper()
