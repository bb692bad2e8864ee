"""transformers.Trainer with distft's data order, eval loss and arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import SchedulerType, Trainer, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from distft.config.recipe import OWN_OPTIMIZERS, Recipe
from distft.data.formats import IGNORE
from distft.runs.directory import RunDir
from distft.strategies import merge
from distft.strategies.accelerate import syncs_each_batch
from distft.strategies.kinds import KINDS
from distft.train import kahan, loraplus, low_rank, muon, varlen
from distft.train.blocks import reshard, sharding_blocks
from distft.train.losses import mean_loss, summed_loss
from distft.train.sampler import StreamSampler
from distft.train.step_state import set_schedule
from distft.train.streaming import Stream

# check_chunks: tokens, and differences per token that rounding makes in float32 and in 16 bit.
CHECKED, EXACT, LOW = 64, 1e-4, 5e-2


class Collator:
    """Rows to a batch of tensors (micro-batch x longest row).

    FlashAttention and varlen take one long row and the documents' bounds. SDPA takes rows whose position ids restart at
    each document, without an attention mask: transformers then keeps the documents apart (masking_utils.py,
    find_packed_sequence_indices). With `bounds`, a row's are found here, for compiled blocks, under the names that
    transformers has for FlashAttention.
    """

    def __init__(self, pad_token_id: int, packing: bool, unpadded: bool, bounds: bool = False):
        self.keeps_rows_apart, self.bounds = packing and not unpadded, bounds and unpadded
        self.base = DataCollatorForLanguageModeling(
            pad_token_id=pad_token_id, padding_free=unpadded, return_position_ids=self.keeps_rows_apart
        )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.base(rows)
        if self.keeps_rows_apart:
            del batch["attention_mask"]
        if self.bounds:
            bounds = varlen.bounds_of(batch["position_ids"].reshape(-1))
            longest = int(bounds.diff().max())
            batch |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
            batch |= dict.fromkeys(("max_length_q", "max_length_k"), longest)
        return batch


def training_arguments(recipe: Recipe, plan: dict[str, Any], run: RunDir, max_steps: int) -> TrainingArguments:
    """transformers' arguments for a run. The strategy comes through the environment (worker.enter)."""
    training, batch = recipe.training, plan["batch"]
    arguments = {
        "output_dir": str(run.checkpoints),
        "run_name": run.path.name,
        "per_device_train_batch_size": batch["micro_batch_size"],
        "per_device_eval_batch_size": batch["micro_batch_size"],
        "gradient_accumulation_steps": batch["gradient_accumulation_steps"],
        "max_steps": max_steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup(max_steps),
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        # transformers knows all others; create_optimizer makes these.
        **({} if training.optim in OWN_OPTIMIZERS else {"optim": training.optim}),
        # No autocast where the whole model is bf16. DeepSpeed has none, and its config must agree.
        "bf16": training.mixed_precision == "bf16"
        and not (training.is_pure_bf16 and KINDS[plan["strategy"]].engine != "deepspeed"),
        "fp16": training.mixed_precision == "fp16",
        "gradient_checkpointing": plan["gradient_checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if plan["gradient_checkpointing"] else None,
        # Its kernels for layers; its loss does what train/chunked_loss.py does, and not under every strategy.
        "use_liger_kernel": training.use_liger_kernel,
        "liger_kernel_config": {"fused_linear_cross_entropy": False},
        "seed": training.seed,
        "report_to": list(training.report_to),
        "use_cpu": not torch.cuda.is_available(),
        # A line per step in metrics.jsonl, with the loss unrounded and its NaNs kept.
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        # The loss is the mean over the tokens of the whole global batch.
        "average_tokens_across_devices": True,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
    }
    # Batches are in pinned memory (Trainer's default), so that the rank need not wait for their copy to the GPU.
    loader: dict[str, Any] = {"non_blocking": torch.cuda.is_available()}
    if KINDS[plan["strategy"]].engine == "fsdp2":
        loader["gradient_accumulation_kwargs"] = {"sync_each_batch": syncs_each_batch(recipe)}
    arguments["accelerator_config"] = loader
    return TrainingArguments(**merge(arguments, recipe.trainer.overrides))


class RecipeTrainer(Trainer):
    """transformers.Trainer over a StreamSampler. Build the model after `args`: ZeRO-3 must know them by then."""

    def __init__(
        self,
        *,
        stream: StreamSampler,
        loss_type: str = "nll",
        chunked: bool = False,
        recipe: Recipe | None = None,
        weights: Stream | None = None,
        **kwargs: Any,
    ):
        self.stream, self.recipe, self.weights = stream, recipe, weights
        self.loss_type, self.chunked = loss_type, chunked
        super().__init__(**kwargs)
        self.is_pure_bf16 = recipe is not None and recipe.training.is_pure_bf16
        prepare: Any = MethodType(sharding_blocks(type(self.accelerator).prepare), self.accelerator)
        prepare = weights.around(prepare) if weights else prepare
        if self.is_pure_bf16:
            prepare = kahan.averaging_in_float32(prepare)
        self.accelerator.prepare = prepare
        # A model that takes no number of tokens has the mean of its micro-batch as its own loss.
        if loss_type != "nll" or not self.model_accepts_loss_kwargs:
            self.compute_loss_func = mean_loss(loss_type)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and self.is_pure_bf16:
            # accelerate knows no bf16 but over float32 weights, which it would make of these.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        elif plugin is not None and plugin.mixed_precision_policy is not None:
            # accelerate's policy averages gradients in 16 bit and rounds the loss to it; DDP and ZeRO do neither.
            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)

    def _get_train_sampler(self, *args: Any) -> StreamSampler:
        return self.stream

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' optimizer, with the rates of LoRA+; or one of distft's own."""
        made, recipe, given = self.optimizer is None, self.recipe, self.model if model is None else model
        if made and recipe is not None and (recipe.training.optim in OWN_OPTIMIZERS or self.is_pure_bf16):
            self.optimizer = self._own_optimizer(recipe, given)
        optimizer = super().create_optimizer(model)
        if made and recipe is not None and recipe.lora is not None:
            loraplus.set_rates(optimizer, given, recipe.lora)
        return optimizer

    def _own_optimizer(self, recipe: Recipe, model: Any) -> torch.optim.Optimizer:
        args, decaying = self.args, self.get_decay_parameter_names(model)
        options: dict[str, Any] = {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }
        if recipe.low_rank is not None:
            return low_rank.make(model, recipe, decaying, **options)
        if self.is_pure_bf16:
            return kahan.make(model, decaying, **options)
        dtype = torch.bfloat16 if args.bf16 or args.fp16 else torch.float32
        return muon.make(model, decaying, dtype=dtype, **options)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """transformers' schedule, in which the first step of the warm-up trains, too: theirs has a rate of 0."""
        made = self.lr_scheduler is None
        schedule = super().create_scheduler(num_training_steps, optimizer)
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        has_warmup = warmup_steps and self.args.lr_scheduler_type != SchedulerType.CONSTANT
        if made and has_warmup and isinstance(schedule, LambdaLR):
            schedule.lr_lambdas = [rising(factor, warmup_steps) for factor in schedule.lr_lambdas]
            set_schedule(self, 0)
        return schedule

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor | int | None]:
        """Keeps the count of trained tokens an integer: FSDP rounds a float one to bf16, and so the loss by 0.4%."""
        samples, tokens = super().get_batch_samples(*args, **kwargs)
        return samples, tokens.long() if torch.is_tensor(tokens) else tokens

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In chunks where `chunked` (train/chunked_loss.py); as Trainer does elsewhere. Both are summed over ranks."""
        if not self.chunked:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, chunked=self.loss_type, num_items_in_batch=num_items_in_batch)
        loss = outputs["loss"] * self.accelerator.num_processes  # whose gradients are averaged over the ranks
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def check_chunks(self) -> str | None:
        """Compare the loss of some tokens in chunks with the one of the model's own logits. Where they differ, the
        model does something else to its logits, and `chunked` is turned off. Collective. Returns why it was."""
        rows = self.train_dataset
        assert isinstance(rows, Dataset)
        ids = rows[0]["input_ids"][:CHECKED]
        inputs = self._prepare_inputs(self.data_collator([{"input_ids": ids, "labels": ids}]))
        labels = inputs.pop("labels")
        self.model_wrapped.eval()
        whole, count = summed_loss(self.model_wrapped(**inputs).logits, labels)
        chunked = self.model_wrapped(**inputs, labels=labels, chunked="nll").loss
        self._back_to_training()
        difference = ((chunked - whole).abs() / count).reshape(1)
        if self.args.world_size > 1:
            dist.all_reduce(difference, dist.ReduceOp.MAX)
        low = self.args.bf16 or self.args.fp16 or self.is_pure_bf16
        if difference.item() <= (LOW if low else EXACT):
            return None
        self.chunked = False
        return (
            f"in chunks it would differ by {difference.item():.1e} from the one of the model's own logits; the plan "
            "counted chunks: set training.loss: full to have it planned so"
        )

    def step_loss(self) -> float:
        """This rank's part of the step's loss, before it is logged; it is nan or infinite where that is."""
        return self._tr_loss.item()

    def _back_to_training(self) -> None:
        """After forward passes without a backward pass."""
        self.model_wrapped.train()
        reshard(self.model_wrapped)

    @torch.no_grad()
    def eval_loss(self, interrupted: Callable[[], bool] = lambda: False) -> float | None:
        """Mean loss (nll, whatever is trained) per trained token of the eval rows. Collective; the same on all ranks.

        None without eval rows, and when `interrupted`, which is asked before every batch and must answer the same on
        all ranks.
        """
        rows, micro = self.eval_dataset, self.args.per_device_eval_batch_size
        if rows is None:
            return None
        assert isinstance(rows, Dataset)  # run.py passes no dictionary of them
        rank, world = self.args.process_index, self.args.world_size
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model_wrapped.eval()
        for start in range(0, len(rows), micro * world):
            if interrupted():
                self._back_to_training()
                return None
            indices = range(start + rank * micro, start + (rank + 1) * micro)
            # Every rank takes part in every forward pass, which gathers sharded weights: a rank that has no rows left
            # repeats one whose labels do not count.
            batch = [rows[i] if i < len(rows) else _without_labels(rows[0]) for i in indices]
            inputs = self._prepare_inputs(self.data_collator(batch))
            labels = inputs.pop("labels")
            if self.chunked:
                loss = self.model_wrapped(**inputs, labels=labels, chunked="nll").loss
                total += torch.stack((loss, (labels[..., 1:] != IGNORE).sum())).double()
                continue
            logits = self.model_wrapped(**inputs).logits
            total += torch.stack(summed_loss(logits, labels)).double()
        self._back_to_training()
        if world > 1:
            dist.all_reduce(total)
        return (total[0] / total[1]).item()


def rising(factor: Callable[[int], float], warmup_steps: int) -> Callable[[int], float]:
    """A schedule (step from 0 -> fraction of the peak rate) that rises in equal parts from above 0 to the peak.

    Step i of W has (i + 1) / (W + 1), so that step W is the first at the peak; from there on it is `factor`.
    """
    return lambda step: (step + 1) / (warmup_steps + 1) if step < warmup_steps else factor(step)


def _without_labels(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"labels": [IGNORE] * len(row["labels"])}
