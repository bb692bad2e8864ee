"""transformers.Trainer with distft's data order, eval loss and metrics."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from distft.config.recipe import Recipe
from distft.runs.checkpoints import Checkpoint
from distft.runs.directory import RunDir
from distft.strategies import merge
from distft.strategies.kinds import KINDS
from distft.train import strategy_check, worker
from distft.train.checkpoint import Checkpointer, Position
from distft.train.data import IGNORE
from distft.train.sampler import StreamSampler
from distft.train.stopping import Stopping
from distft.train.watchdog import Watchdog


class Collator:
    """Rows → a batch of tensors (micro-batch x longest row).

    FlashAttention takes one long row with the documents' bounds. SDPA gets rows with position ids that start again at
    each document and no attention mask: transformers then masks across documents (masking_utils,
    find_packed_sequence_indices).
    """

    def __init__(self, pad_token_id: int, packing: bool, flash: bool):
        self.keeps_rows_apart = packing and not flash
        self.base = DataCollatorForLanguageModeling(
            pad_token_id=pad_token_id, padding_free=flash, return_position_ids=self.keeps_rows_apart
        )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.base(rows)
        if self.keeps_rows_apart:
            del batch["attention_mask"]
        return batch


def training_arguments(recipe: Recipe, plan: dict[str, Any], run: RunDir, max_steps: int) -> TrainingArguments:
    """transformers' arguments for a run. The strategy itself comes through the environment (worker.enter)."""
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
        "warmup_steps": ceil(training.warmup_ratio * max_steps),
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": training.optim,
        "bf16": training.mixed_precision == "bf16",
        "fp16": training.mixed_precision == "fp16",
        "gradient_checkpointing": plan["gradient_checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if plan["gradient_checkpointing"] else None,
        "use_liger_kernel": training.use_liger_kernel,
        "seed": training.seed,
        "report_to": list(training.report_to),
        "use_cpu": not torch.cuda.is_available(),
        # One line a step in metrics.jsonl, at the loss's full precision and with its NaNs.
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        # The loss is the mean over the tokens of the whole global batch.
        "average_tokens_across_devices": True,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
    }
    if KINDS[plan["strategy"]].engine == "fsdp2":
        # accelerate's no_sync would keep the gradients of all parameters, whole, from one micro-batch to the next.
        arguments["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    return TrainingArguments(**merge(arguments, recipe.trainer.overrides))


class RecipeTrainer(Trainer):
    """Trainer over a StreamSampler. Build the model after its arguments: ZeRO-3 needs to know them."""

    def __init__(self, *, stream: StreamSampler, **kwargs: Any):
        self.stream = stream
        super().__init__(**kwargs)
        if not self.model_accepts_loss_kwargs:  # a model whose own loss is the mean of its micro-batch
            self.compute_loss_func = _token_mean_loss
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # accelerate's policy averages gradients in 16 bit and rounds the loss to it; DDP and ZeRO do neither.
            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)

    def _get_train_sampler(self, *args: Any) -> StreamSampler:
        return self.stream

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor | int | None]:
        """The count of trained tokens as an integer: FSDP casts a float one to bf16, and with it the loss by 0.4%."""
        samples, tokens = super().get_batch_samples(*args, **kwargs)
        return samples, tokens.long() if torch.is_tensor(tokens) else tokens

    @torch.no_grad()
    def eval_loss(self, interrupted: Callable[[], bool] = lambda: False) -> float | None:
        """Mean loss a trained token over the held-out rows; collective, equal on all ranks. None when `interrupted`."""
        rows, micro = self.eval_dataset, self.args.per_device_eval_batch_size
        rank, world = self.args.process_index, self.args.world_size
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model_wrapped.eval()
        for start in range(0, len(rows), micro * world):
            if interrupted():
                return None
            indices = range(start + rank * micro, start + (rank + 1) * micro)
            # Every rank takes part in every forward pass (sharded weights are gathered in it): a rank without rows
            # left repeats one whose labels do not count.
            batch = [rows[i] if i < len(rows) else _without_labels(rows[0]) for i in indices]
            inputs = self._prepare_inputs(self.data_collator(batch))
            labels = inputs.pop("labels")
            logits = self.model_wrapped(**inputs).logits
            total += torch.stack(_summed_loss(logits, labels)).double()
        self.model_wrapped.train()
        if world > 1:
            dist.all_reduce(total)
        return (total[0] / total[1]).item()


def _without_labels(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"labels": [IGNORE] * len(row["labels"])}


def _summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the next-token losses and the number of tokens: logits (b, s, vocabulary), labels (b, s)."""
    targets = labels[..., 1:].reshape(-1)
    predictions = logits[..., :-1, :].reshape(targets.numel(), -1).float()
    loss = torch.nn.functional.cross_entropy(predictions, targets, ignore_index=IGNORE, reduction="sum")
    return loss, (targets != IGNORE).sum()


def _token_mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    return _summed_loss(outputs.logits, labels)[0] / num_items_in_batch


class _Lines:
    """Appends to a file; keeps what it cannot write, on a full disk, for the next time."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.left = b""

    def write(self, line: str) -> None:
        self.left += line.encode()
        with contextlib.suppress(OSError):
            while self.left:
                self.left = self.left[os.write(self.descriptor, self.left) :]


class NothingLeft(Exception):
    """All steps of the run were made before it was interrupted."""


class Recorder(TrainerCallback):
    """metrics.jsonl, status.json and checkpoints (rank 0 writes; all ranks take part in the reductions)."""

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        plan: dict[str, Any],
        trainer: RecipeTrainer,
        checkpointer: Checkpointer,
        start: tuple[Checkpoint | None, Position],
        stopping: Stopping,
    ):
        self.run, self.recipe, self.plan, self.trainer = run, recipe, plan, trainer
        self.checkpointer, self.stopping = checkpointer, stopping
        self.watchdog = Watchdog(run, checkpointer.rank, checkpointer.gathered(worker.host()))
        self.found, self.position = start
        self.first = self.position.step  # steps made before
        self.step_tokens = _tokens_per_step(trainer.train_dataset, trainer.stream, recipe.training.global_batch_size)
        self.stopped: str | None = None
        self.eval_loss: float | None = None
        self.last_status = 0.0
        self.writes = trainer.is_world_process_zero()
        self.metrics = _Lines(run.metrics) if self.writes else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopping.training = True
        ran = strategy_check.describe(self.trainer.model_wrapped, self.trainer.optimizer)
        self._status(ran=ran)
        strategy_check.check(self.plan, ran)
        if self.found is not None:
            began = time.perf_counter()
            self.checkpointer.restore(self.found, self.trainer)
            self._status(restore_seconds=time.perf_counter() - began)
            state.global_step = self.trainer._globalstep_last_logged = self.position.step
            if state.global_step >= state.max_steps:
                raise NothingLeft
        elif (loss := self._eval_loss()) is not None:
            self._status(eval_loss_before=loss)
        self.clock = time.perf_counter()
        if self.stopped:
            raise NothingLeft

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every, save_steps = self.recipe.training.eval_steps, self.recipe.checkpoint.save_steps
        step, batch = state.global_step, self.recipe.training.global_batch_size
        tokens = self.step_tokens[step - 1 - self.first]
        self.position = Position(step, self.position.samples + batch, self.position.tokens + tokens)
        if every and step % every == 0:
            self.eval_loss = self._eval_loss()
        self.watchdog.step()
        if self._interrupted():
            self.watchdog.rest()
            self.checkpointer.save(self.trainer, self.position, wait=True)
            control.should_training_stop = True
        elif save_steps and step % save_steps == 0:
            self.checkpointer.save(self.trainer, self.position, alive=self.watchdog.alive)
            self.watchdog.alive()

    def end(self) -> str | None:
        """The last evaluation. Returns why the run was stopped, None when it is done."""
        self.watchdog.rest()
        self.checkpointer.finish()
        if not self.stopped:
            loss = self._eval_loss()
            if self.stopped:  # all steps are made; what is left is this and final/
                self.checkpointer.save(self.trainer, self.position, wait=True)
            elif loss is not None:
                self._status(eval_loss_after=loss)
        self._status(step=self.position.step)
        return self.stopped

    def _eval_loss(self) -> float | None:
        return None if self.trainer.eval_dataset is None else self.trainer.eval_loss(self._interrupted)

    def _interrupted(self) -> bool:
        """Whether any rank was asked to stop; the same answer on all."""
        self.watchdog.alive()
        if self.stopped is None and _largest(int(self.stopping.why is not None), self.trainer.args.device):
            self.stopped = self.stopping.why or self.run.stop_asked() or "asked of another rank"
        return self.stopped is not None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        now = time.perf_counter()
        tokens = self.step_tokens[state.global_step - 1 - self.first]
        line = {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs["learning_rate"],
            "tokens": self.position.tokens,
            "tokens_per_second": tokens / (now - self.clock),
            "peak_memory_bytes": peak_memory(args.device),
            "time": time.time(),
        }
        self.clock = now
        if self.eval_loss is not None:
            line["eval_loss"], self.eval_loss = self.eval_loss, None
        if self.writes:
            self.metrics.write(json.dumps(line) + "\n")
            if now - self.last_status > 1:
                self._status(step=state.global_step)
                self.last_status = now

    def _status(self, **fields: Any) -> None:
        if not self.writes:
            return
        if not self.checkpointer.owns():
            # SLURM gave up this node and started the job elsewhere; no error file, which would be the other's.
            print("another attempt goes on with this run; this one ends", file=sys.stderr, flush=True)
            os._exit(1)
        with contextlib.suppress(OSError):  # a full disk, maybe for a while only; a save says it
            self.run.update_status(**fields)


def _tokens_per_step(dataset: Dataset, stream: StreamSampler, global_batch_size: int) -> list[int]:
    """Tokens of every global batch, from the rows' lengths: known to all ranks, so nothing needs to be gathered."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(dataset.data.column("input_ids")).to_numpy()
    order = numpy.fromiter(stream, dtype=numpy.int64, count=len(stream))
    return lengths[order].reshape(-1, global_batch_size).sum(axis=1).tolist()


def peak_memory(device: torch.device) -> int:
    """The largest peak of any rank so far, in bytes: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return _largest(peak, device)


def _largest(value: int, device: torch.device) -> int:
    """The largest of all ranks' values."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
