"""What trainer.overrides may contain: transformers' TrainingArguments, of which the recipe and distft set many."""

from __future__ import annotations

from distft.rules import upstream
from distft.rules.core import RecipeCase, rule, show
from distft.rules.overrides import unknown_keys


@rule(
    "a key of trainer.overrides that TrainingArguments does not have",
    "transformers training_args.py, TrainingArguments: a dataclass takes no other arguments",
    "correct or remove it",
)
def trainer_arguments_must_exist(case: RecipeCase) -> str | None:
    """Every rank fails on an argument that TrainingArguments does not have. Checked where transformers is installed."""
    names = upstream.trainer_arguments() if case.trainer else None
    return unknown_keys("trainer.overrides", case.trainer.keys() - names, names) if names else None


# Arguments that distft derives or handles itself → where to set them.
PLANNED = {
    "output_dir": "output_dir",
    "per_device_train_batch_size": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "auto_find_batch_size": "training.micro_batch_size: auto",
    "max_steps": "training.max_steps",
    "num_train_epochs": "training.num_train_epochs",
    "learning_rate": "training.learning_rate",
    "max_grad_norm": "training.max_grad_norm",
    "seed": "training.seed",
    "weight_decay": "training.weight_decay",
    "warmup_steps": "training.warmup_steps",
    "bf16": "training.mixed_precision",
    "fp16": "training.mixed_precision",
    "use_cpu": "--gpus-per-node, or CUDA_VISIBLE_DEVICES=",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "use_liger_kernel": "training.use_liger_kernel",
    "deepspeed": "parallelism.strategy and deepspeed.overrides",
    "fsdp": "parallelism.strategy and fsdp.overrides",
    "fsdp_config": "parallelism.strategy and fsdp.overrides",
    "parallelism_config": "parallelism.strategy",
    "save_strategy": "checkpoint.save_steps",
    "save_steps": "checkpoint.save_steps",
    "save_total_limit": "checkpoint.save_total_limit",
    "load_best_model_at_end": "training.eval_steps, and choose among checkpoints/",
    "eval_strategy": "training.eval_steps",
    "eval_steps": "training.eval_steps",
    "logging_strategy": "trainer.overrides.logging_steps",
    "ddp_backend": "nothing: nccl connects GPUs, gloo CPU ranks",
    "local_rank": "nothing: torchrun does",
    "average_tokens_across_devices": "nothing: the loss is the mean over the whole global batch at every world size",
    "logging_nan_inf_filter": "nothing: it would hide a loss that is no number, which ends a run",
    "label_names": "nothing: data.train_on says what is trained",
    "dataloader_in_order": "nothing: rows have one order at every world size",
    "use_cache": "nothing: training needs no cache of keys and values, which the plan does not count",
    "remove_unused_columns": "nothing: the rows have exactly what is needed",
    "report_to": "training.report_to",
    "torch_compile": "training.compile",
    "torch_compile_backend": "training.compile",
    "torch_compile_mode": "training.compile",
}


@rule(
    "trainer.overrides for what the recipe has a field for, or distft handles itself",
    "distft/train/trainer.py, training_arguments: what the plan, the sampler and the saving rely on",
    "set it in the recipe, and leave it out here",
)
def planned_arguments_belong_in_the_recipe(case: RecipeCase) -> str | None:
    """Batch size, steps, precision, sharding and saving follow from the recipe, and the plan counts on them. With an
    override, the run would not be what plan.json describes, or would fail (transformers' own saving does not work under
    FSDP2 with adapters).
    """
    if not case.trainer:
        return None
    given = [f"{key} (set {PLANNED[key]})" for key in sorted(case.trainer.keys() & PLANNED.keys())]
    if "optim" in case.trainer and case.recipe.training.optim in OWN_OPTIMIZERS:
        given.append(f"optim, and training.optim is {case.recipe.training.optim} (leave one of them out)")
    if (case.trainer.get("liger_kernel_config") or {}).get("fused_linear_cross_entropy"):
        given.append("liger_kernel_config.fused_linear_cross_entropy (training.loss: chunked does the same)")
    return f"trainer.overrides: got {', '.join(given)}" if given else None


@rule(
    "trainer.overrides.tf32: true on a CPU or before Ampere",
    "transformers 5.23 training_args.py:1682: --tf32 requires Ampere or a newer GPU arch",
    "leave it out",
)
def tf32_needs_ampere(case: RecipeCase) -> str | None:
    """TF32 is a mode of tensor cores of compute capability 8.0 and later; elsewhere transformers refuses it."""
    if case.trainer.get("tf32") is True and (case.on_cpu or case.before_ampere):
        return f"trainer.overrides.tf32: {case.device.name} has no TF32"
    return None


@rule(
    "a tracker in training.report_to that transformers does not have",
    "transformers 5.23 integrations/integration_utils.py:2674, get_reporting_integration_callbacks",
    "use names that it has, or report_to: []",
)
def trackers_must_be_known(case: RecipeCase) -> str | None:
    """transformers' Trainer fails on a tracker that it has no callback for. Checked where transformers is installed."""
    wanted = case.recipe.training.report_to
    if not wanted or wanted in (["all"], ["none"]):
        return None
    names = upstream.trackers() or frozenset()
    unknown = sorted(set(wanted) - names) if names else []
    return f"training.report_to: got {', '.join(unknown)}, not one of {', '.join(sorted(names))}" if unknown else None


# Arguments of what distft does in its own way, or not at all: they would have no effect → what to use instead.
HUB = "upload final/ once the run is done: hf upload OWNER/NAME RUN/final"
EVAL = "data.eval and training.eval_steps; the loss is measured in its own way"
SAVING = "checkpoint.save_steps and checkpoint.save_total_limit"
ORDER = "training.seed: it draws the order of the rows, which is the same at every world size"
WITHOUT_EFFECT = {
    "train_sampling_strategy": ORDER,
    "length_column_name": ORDER,
    "data_seed": ORDER,
    "dataloader_drop_last": "nothing: every global batch is full",
    "push_to_hub": HUB,
    "hub_token": HUB,
    "hub_private_repo": HUB,
    "hub_model_id": HUB,
    "hub_strategy": HUB,
    "hub_always_push": HUB,
    "hub_revision": HUB,
    "eval_delay": EVAL,
    "prediction_loss_only": EVAL,
    "eval_on_start": EVAL,
    "eval_do_concat_batches": EVAL,
    "eval_use_gather_object": EVAL,
    "eval_accumulation_steps": EVAL,
    "include_for_metrics": EVAL,
    "batch_eval_metrics": EVAL,
    "bf16_full_eval": EVAL,
    "fp16_full_eval": EVAL,
    "metric_for_best_model": EVAL,
    "greater_is_better": EVAL,
    "save_only_model": SAVING,
    "save_on_each_node": SAVING,
    "enable_jit_checkpoint": SAVING,
    "resume_from_checkpoint": "distft resume RUN",
    "ignore_data_skip": "distft resume RUN",
    "restore_callback_states_from_checkpoint": "distft resume RUN",
    "do_train": "nothing: a run trains, and evaluates where there is data.eval",
    "do_eval": "nothing: a run trains, and evaluates where there is data.eval",
    "do_predict": "nothing: a run trains, and evaluates where there is data.eval",
}
# config/recipe.py, OWN_OPTIMIZERS; importing it there would import pydantic, which takes longer than all rules.
OWN_OPTIMIZERS = ("muon", "galore_adamw", "apollo_adamw")
DDP_ONLY = ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph")
WITH_OPTIM_ARGS = (
    *("ademamix", "paged_ademamix", "lion", "paged_lion", "rmsprop", "sgd", "adagrad", "adamw_anyprecision"),
    *("galore", "apollo", "grokadamw", "adamw_torch_4bit", "schedule_free", "stable_adamw"),
)


@rule(
    "trainer.overrides that would have no effect",
    "distft/train/trainer.py, RecipeTrainer: rows, evaluation and saving are distft's; transformers 5.23 "
    "trainer_optimizer.py (optim_args, optim_target_modules) and training_args.py",
    "leave it out",
)
def trainer_arguments_must_have_an_effect(case: RecipeCase) -> str | None:
    """The order of rows, evaluation, checkpoints and publishing are not Trainer's here, and some arguments are read
    only together with another one. An override that nobody reads would be taken for a setting.
    """
    given = case.trainer
    found = {key: f" (use {WITHOUT_EFFECT[key]})" for key in given.keys() & WITHOUT_EFFECT.keys()}
    if case.kind.engine != "ddp":
        found |= dict.fromkeys(given.keys() & {*DDP_ONLY}, f" (not read under {case.strategy})")
    if case.zero and "ddp_timeout" in given:
        found["ddp_timeout"] = f" (not read under {case.strategy})"
    if "optim_args" in given and not case.optim.startswith(WITH_OPTIM_ARGS):
        found["optim_args"] = f" ({case.optim} has none)"
    if "optim_target_modules" in given and not case.optim.startswith(("galore", "apollo")):
        found["optim_target_modules"] = f" ({case.optim} has none)"
    if "label_smoothing_factor" in given and (loss_type := case.recipe.training.loss_type) != "nll":
        found["label_smoothing_factor"] = f" (training.loss_type {loss_type} has none)"
    if "liger_kernel_config" in given and not case.recipe.training.use_liger_kernel:
        found["liger_kernel_config"] = " (without training.use_liger_kernel)"
    if "gradient_checkpointing_kwargs" in given and case.gradient_checkpointing is False:
        found["gradient_checkpointing_kwargs"] = " (without training.gradient_checkpointing)"
    text = ", ".join(key + found[key] for key in sorted(found))
    return f"trainer.overrides: {text} would have no effect" if found else None


# Optimizers of transformers' that need a package which distft does not bring, or a device which it does not know.
OPTIMIZER_PACKAGES = {
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "stable_adamw": "optimi",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu": "torch_npu",
}


@rule(
    "a trainer.overrides.optim that transformers does not have, or whose package is not installed",
    "transformers 5.23 training_args.py, OptimizerNames; trainer_optimizer.py: ImportError where a package is missing",
    "use one of training.optim's, or install the package",
)
def trainer_optimizer_must_exist(case: RecipeCase) -> str | None:
    """Every rank fails on an optimizer that it cannot make. Muon is not one of transformers', but the recipe has a word
    for it. Checked where transformers is installed.
    """
    given, names = case.trainer.get("optim"), upstream.optimizers()
    if given == "muon":
        return "trainer.overrides.optim: got muon, which transformers does not have, and training.optim does"
    if given in OWN_OPTIMIZERS:
        return f"trainer.overrides.optim: got {given}, which training.optim has, with its memory planned"
    if given is None or names is None:
        return None
    if given not in names:
        return f"trainer.overrides.optim: got {show(given)}, not one of {', '.join(sorted(names))}"
    package = next((found for name, found in OPTIMIZER_PACKAGES.items() if given.startswith(name)), None)
    if package and not upstream.is_installed(package):
        return f"trainer.overrides.optim: {given} needs the package {package}, which is not installed"
    return None


# transformers' schedules → what lr_scheduler_kwargs may have for them.
MIN_LR = frozenset({"num_cycles", "min_lr", "min_lr_rate"})
SCHEDULES = {
    "linear": frozenset[str](),
    "cosine": frozenset({"num_cycles"}),
    "cosine_with_restarts": frozenset({"num_cycles"}),
    "polynomial": frozenset({"lr_end", "power"}),
    "constant": frozenset[str](),
    "constant_with_warmup": frozenset[str](),
    "inverse_sqrt": frozenset({"timescale"}),
    "cosine_with_min_lr": MIN_LR,
    "cosine_warmup_with_min_lr": MIN_LR | {"warmup_lr_rate"},
    "warmup_stable_decay": frozenset(
        {"num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"}
    ),
}
WSD = "trainer: {overrides: {lr_scheduler_type: warmup_stable_decay, lr_scheduler_kwargs: {num_decay_steps: N}}}"


@rule(
    "a trainer.overrides.lr_scheduler_type that cannot be made, or lr_scheduler_kwargs that it does not take",
    "transformers 5.23 optimization.py, get_scheduler and the functions that it calls; training_args.py:1790 (requires "
    "an eval strategy)",
    f"use training.lr_scheduler_type, or the kwargs that it takes; warmup-stable-decay: {WSD}",
)
def trainer_schedule_must_exist(case: RecipeCase) -> str | None:
    """Every rank fails on a schedule whose name or arguments are wrong, once the model is loaded. reduce_lr_on_plateau
    and greedy follow an evaluation of Trainer's, which there is none of here.
    """
    if not case.trainer.keys() & {"lr_scheduler_type", "lr_scheduler_kwargs"}:
        return None
    name = case.trainer.get("lr_scheduler_type", case.recipe.training.lr_scheduler_type)
    kwargs = case.trainer.get("lr_scheduler_kwargs") or {}
    if name not in SCHEDULES:
        return f"trainer.overrides.lr_scheduler_type: got {show(name)}, not one of {', '.join(SCHEDULES)}"
    if not isinstance(kwargs, dict):
        return f"trainer.overrides.lr_scheduler_kwargs: got {show(kwargs)}, need a mapping"
    if problem := unknown_keys(
        "trainer.overrides.lr_scheduler_kwargs", kwargs.keys() - SCHEDULES[name], SCHEDULES[name]
    ):
        return f"{problem} of {name}"
    needed = {"warmup_stable_decay": {"num_decay_steps"}, "cosine_with_min_lr": {"min_lr", "min_lr_rate"}}
    needed["cosine_warmup_with_min_lr"] = needed["cosine_with_min_lr"]
    if name in needed and len(needed[name] & kwargs.keys()) != 1:
        return f"trainer.overrides.lr_scheduler_kwargs: {name} needs {' or '.join(sorted(needed[name]))}"
    return None


WORKER_ARGUMENTS = ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context")


@rule(
    "dataloader_prefetch_factor and the like without dataloader_num_workers",
    "transformers 5.23 training_args.py:1803; torch utils/data/dataloader.py: persistent_workers option needs "
    "num_workers > 0",
    "add dataloader_num_workers, or leave it out",
)
def loader_arguments_need_workers(case: RecipeCase) -> str | None:
    """They are about the processes that read ahead; without those, every rank fails."""
    given = [key for key in WORKER_ARGUMENTS if case.trainer.get(key)]
    if given and not case.trainer.get("dataloader_num_workers"):
        return f"trainer.overrides: got {', '.join(given)} without dataloader_num_workers"
    return None


@rule(
    "trainer.overrides.accelerator_config with another key than gradient_accumulation_kwargs or non_blocking",
    "accelerate 1.15 data_loader.py, prepare_data_loader: split_batches, dispatch_batches, even_batches; "
    "distft/train/sampler.py",
    "leave it out",
)
def accelerator_config_leaves_batches_alone(case: RecipeCase) -> str | None:
    """Which rank gets which rows of the global batch is distft's. accelerate would split, send or fill up batches, and
    a step would no longer be that of every world size.
    """
    given = case.trainer.get("accelerator_config")
    if given is None:
        return None
    if not isinstance(given, dict):
        return f"trainer.overrides.accelerator_config: got {show(given)}, need a mapping"
    others = sorted(given.keys() - {"gradient_accumulation_kwargs", "non_blocking"})
    return f"trainer.overrides.accelerator_config: got {', '.join(others)}" if others else None
