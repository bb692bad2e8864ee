"""axolotl's training options. What they become: core/builders/base.py, utils/config/__init__.py (axolotl 0.17, commit
067b021)."""

from __future__ import annotations

from distft.config.recipe import LOW_RANK
from distft.importers import common, low_rank
from distft.importers.options import Options
from distft.importers.sharding import SPLIT

SHARED = ("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree")  # GPUs that have the same rows


def read(options: Options) -> None:
    """All options of the training."""
    draft = options.draft
    _batch(options)
    common.duration(options, "num_epochs", 1)
    rate = options.number("learning_rate")
    if rate is None:
        draft.problems.append(f"learning_rate is missing ({draft.file.name})")
    else:
        options.set("training.learning_rate", "learning_rate", rate)
    common.plain_number(options, "weight_decay", "training.weight_decay", 0.0)
    common.plain_number(options, "max_grad_norm", "training.max_grad_norm", 1.0)  # transformers'
    seed = options.integer("seed")
    if seed is not None:
        options.set("training.seed", "seed", seed)
    draft.default("training.seed", 42, "seed")
    if options.data.get("optimizer") == "muon":
        # https://github.com/axolotl-ai-cloud/axolotl-contribs-mit, muon.py, MuonOptimizerFactory
        why = "axolotl's Muon leaves norms and biases as they are, and has betas of its own; distft's is training.optim"
        options.refuse("optimizer", f"{why}: muon")
    else:
        common.optimizer(options, "optimizer", "adamw_torch_fused")
    if draft.fields.get("training.optim") not in LOW_RANK and options.is_on("optim_args"):
        options.refuse("optim_args", "distft passes its optimizer no other arguments")
    for name, other in (("adam_beta1", ""), ("adam_beta2", ""), ("adam_epsilon", ""), ("adam_eps", "adam_epsilon")):
        if options.number(name) is not None and name != "adam_eps":
            options.set(f"trainer.overrides.{other or name}", name, options.number(name))
    if options.has("adam_eps"):
        options.drop("adam_eps", "axolotl has no such option (it is adam_epsilon), and does not read it")
    low_rank.transformers(options)
    _schedule(options)
    _precision(options)
    checkpointing = options.take("gradient_checkpointing")
    if checkpointing in (True, False, "offload", "offload_disk"):
        options.set("training.gradient_checkpointing", "gradient_checkpointing", bool(checkpointing))
        if isinstance(checkpointing, str):
            options.set("training.activation_offloading", "gradient_checkpointing", True)
    common.activation_offloading(options, "activation_offloading")
    if folder := options.text("output_dir"):
        options.set("output_dir", "output_dir", folder)
    _checkpoints(options)
    _reporting(options)


def _batch(options: Options) -> None:
    """utils/config/__init__.py, normalize_config: batch_size stands for the accumulation where that is not given."""
    draft = options.draft
    micro, accumulation = options.integer("micro_batch_size"), options.integer("gradient_accumulation_steps")
    total = options.integer("batch_size")
    if accumulation is None and total and micro:
        accumulation = total // micro
    parts = {"micro_batch_size": micro or 1, "gradient_accumulation_steps": accumulation or 1}
    shared = {}
    for name in SHARED:
        if (size := options.integer(name) or 1) > 1:
            shared[name] = size
            options.drop(name, SPLIT)
    if (options.integer("expert_parallel_size") or 1) > 1:
        options.drop("expert_parallel_size", SPLIT)
    draft.global_batch_size(parts, shared)
    options.taken.add("batch_size")


def _schedule(options: Options) -> None:
    """core/builders/base.py, _configure_warmup_and_logging, _configure_scheduler; core/trainers/mixins/scheduler.py."""
    draft = options.draft
    name = options.text("lr_scheduler")
    kwargs = options.group("lr_scheduler_kwargs").data
    ratio, constant = options.number("cosine_min_lr_ratio"), options.number("cosine_constant_lr_ratio")
    if ratio and name in (None, "cosine"):
        if constant:
            options.refuse("cosine_constant_lr_ratio", "distft's schedules are transformers'")
        options.set("trainer.overrides.lr_scheduler_type", "cosine_min_lr_ratio", "cosine_with_min_lr")
        draft.fields["trainer.overrides.lr_scheduler_kwargs"] = {"min_lr_rate": ratio}
        options.taken.add("lr_scheduler")
    else:
        common.schedule(options, "lr_scheduler", kwargs, "cosine")
    options.drop_all({"eta_min": "axolotl has no such option, and does not read it"})
    steps, share = options.number("warmup_steps"), options.number("warmup_ratio")
    if steps is not None:
        common.warmup(options, "warmup_steps", steps)
        if share is not None:
            options.drop("warmup_ratio", "warmup_steps is used")
    elif share is not None:
        options.set("training.warmup_ratio", "warmup_ratio", share)
    elif max_steps := draft.fields.get("training.max_steps"):
        common.warmup(options, "warmup_steps", min(int(0.03 * max_steps), 100), is_default=True)
    else:
        draft.default("training.warmup_ratio", 0.03, "warmup_ratio")
        draft.warn("training.warmup_ratio: axolotl's default is 0.03, but at most 100 steps; check it for a long run")


def _precision(options: Options) -> None:
    """utils/config/__init__.py, resolve_dtype."""
    bf16, fp16 = options.take("bf16"), options.flag("fp16")
    others = {name: options.flag(name) for name in ("bfloat16", "float16", "float32")}
    if bf16 in (True, "auto", "full") or (bf16 is None and not fp16 and not others["float16"]):
        name, value = "bf16", "bf16"
    elif others["bfloat16"]:
        name, value = "bfloat16", "bf16"
    elif fp16 or others["float16"]:
        name, value = ("fp16" if fp16 else "float16"), "fp16"
    else:
        name, value = "bf16", "no"
    if options.data.get(name) is None:
        options.draft.default("training.mixed_precision", value, "bf16: auto")
    else:
        options.set("training.mixed_precision", name, value)
    common.tf32(options)
    if options.flag("fp8"):
        options.drop("fp8", "computed in bf16: more exact, and slower")
        options.draft.warn("fp8: distft computes in bf16: more exact, and slower")
    options.drop_all({"fp8_enable_fsdp_float8_all_gather": "of fp8"})
    options.drop_all({"torch_dtype": "training.mixed_precision says it"})


def _checkpoints(options: Options) -> None:
    """core/builders/base.py, _configure_save_and_eval_strategy."""
    steps = options.number("save_steps")
    if steps and steps >= 1:
        options.set("checkpoint.save_steps", "save_steps", int(steps))
    elif steps:
        options.drop("save_steps", "a fraction of the run; without checkpoint.save_steps, it saves at its end")
    limit = options.integer("save_total_limit")
    if limit:
        options.set("checkpoint.save_total_limit", "save_total_limit", limit)
    at_the_end = "without checkpoint.save_steps, the run saves at its end"
    options.drop_all({"saves_per_epoch": at_the_end, "save_strategy": at_the_end})
    options.taken |= {"load_best_model_at_end", "metric_for_best_model", "greater_is_better"}
    if options.is_on("load_best_model_at_end"):
        options.refuse("load_best_model_at_end", "distft keeps the weights of the last step")


def _reporting(options: Options) -> None:
    trackers = {"use_wandb": "wandb", "use_mlflow": "mlflow", "use_tensorboard": "tensorboard", "use_comet": "comet_ml"}
    found = [tracker for name, tracker in trackers.items() if options.flag(name)]
    if options.is_on("wandb_project") and options.flag("use_wandb") is None:  # schemas/integrations.py sets it then
        found.append("wandb")
    if options.flag("use_trackio"):
        found.append("trackio")
    if found:
        options.draft.set("training.report_to", found, ", ".join(f"use_{name}" for name in found))
