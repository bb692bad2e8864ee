"""What a run does around its optimizer steps, in one place because the order matters.

Evaluating, agreeing to stop, saving and measuring memory are collective: a rank that did them in another order than
the others would wait for ever.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distft.config.recipe import Recipe
from distft.errors import RunError
from distft.runs.checkpoints import Checkpoint
from distft.runs.directory import RunDir
from distft.runs.status import read_status
from distft.runs.stop_file import stop_asked
from distft.train import compiled, strategy_check
from distft.train.checkpoint import Checkpointer, Start
from distft.train.metrics import MetricsLog, peak_memory, token_share, tokens_per_step
from distft.train.offload import offload_block_inputs
from distft.train.outcome import LossGuard, WeightsGuard
from distft.train.ranks import largest, largest_of
from distft.train.status import StatusWriter
from distft.train.stopping import Stopping
from distft.train.trainer import RecipeTrainer
from distft.train.watchdog import Watchdog

log = logging.getLogger("distft")


class NoStepsLeft(Exception):
    """Leaves Trainer.train() before its first step: all were made in an earlier attempt, or the run is to stop."""


class StopAgreement:
    """Whether the run is to stop: all ranks stop at the same step once any of them was asked to."""

    def __init__(self, run: RunDir, stopping: Stopping, watchdog: Watchdog, device: torch.device):
        self.run, self.stopping, self.watchdog, self.device = run, stopping, watchdog, device
        self.why: str | None = None

    def asked(self) -> int:
        """1 if this rank was asked to stop."""
        return int(self.stopping.why is not None)

    def agree(self, asked: int) -> None:
        """Stop if a rank was `asked` to; the same on all of them."""
        if self.why is None and asked:
            self.why = self.stopping.why or stop_asked(self.run) or "another rank was asked to stop"

    def reached(self) -> bool:
        """The same answer on all ranks. Collective."""
        self.watchdog.alive()
        if self.why is None:
            self.agree(largest(self.asked(), self.device))
        return self.why is not None


class RunCallback(TrainerCallback):
    """Restores, evaluates, saves, stops and records a run."""

    def __init__(
        self,
        recipe: Recipe,
        plan: dict[str, Any],
        trainer: RecipeTrainer,
        checkpointer: Checkpointer,
        start: Start,
        status: StatusWriter,
        stopping: Stopping,
        watchdog: Watchdog,
    ):
        run, device = checkpointer.run, trainer.args.device
        self.recipe, self.plan, self.trainer, self.start = recipe, plan, trainer, start
        self.checkpointer, self.status, self.stopping, self.watchdog = checkpointer, status, stopping, watchdog
        self.stop = StopAgreement(run, stopping, watchdog, device)
        share = token_share(plan)
        self.metrics = MetricsLog(run.metrics, start.position.tokens, share) if status.writes else None
        self.position = start.position
        self.step_tokens = tokens_per_step(trainer.train_dataset, trainer.stream, recipe.training.global_batch_size)
        self.ran: dict[str, Any] = {}
        self.eval_loss: float | None = None  # of the step that is being made
        self.compilation = compiled.Compilation(device) if recipe.training.compile else None
        self.peak_memory = 0  # bytes, the largest of any rank so far
        self.loss, self.weights = LossGuard(), WeightsGuard(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopping.training = True
        ran = strategy_check.describe(self.trainer.model_wrapped, self.trainer.optimizer)
        ran["loading"] = "by unit" if self.trainer.weights else "from_pretrained"
        if self.recipe.training.activation_offloading:
            ran["activation_offloading"] = offload_block_inputs(self.trainer.model)
            if not ran["activation_offloading"]:
                raise RunError("training.activation_offloading: no block of this model is checkpointed")
        self.status.update(ran=ran)
        strategy_check.check(self.plan, ran)
        if self.compilation:
            log.info("compiling the blocks (%d of them), which takes until the end of the first step", ran["compiled"])
        if self.start.checkpoint is not None:
            self._restore(self.start.checkpoint, state)
        with compiled.eagerly():  # of a few tokens: not worth a graph
            why = self.trainer.check_chunks() if self.trainer.chunked else None
        if why is not None and self.status.writes:
            log.warning("loss: full (%s)", why)
        self.ran = ran | {"loss": "chunked" if self.trainer.chunked else "full"}
        self.status.update(ran=self.ran)
        if state.global_step >= state.max_steps:
            raise NoStepsLeft
        if self.start.checkpoint is None and (loss := self._evaluate()) is not None:
            self.status.update(eval_loss_before=loss)
        if self.stop.why:
            raise NoStepsLeft
        self.weights.start()
        if self.compilation:
            self.compilation.begin()
        if self.metrics:
            self.metrics.start_clock()

    def _restore(self, checkpoint: Checkpoint, state: TrainerState) -> None:
        began = time.perf_counter()
        self.checkpointer.restore(checkpoint, self.trainer)
        self.status.update(restore_seconds=time.perf_counter() - began)
        state.global_step = self.trainer._globalstep_last_logged = self.position.step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check_loss()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        every, save_steps = self.recipe.training.eval_steps, self.recipe.checkpoint.save_steps
        step = state.global_step
        tokens = self.step_tokens[step - 1 - self.start.position.step]
        self.position = self.position.after(step, self.recipe.training.global_batch_size, tokens)
        # All that ranks tell each other about a step, in one message. What an evaluation needs is in the next line.
        gave_up = int(self.compilation.gave_up if self.compilation else False)
        own = [LossGuard.grade(self.trainer.step_loss()), self.stop.asked(), peak_memory(), gave_up]
        grade, asked, self.peak_memory, gave_up = largest_of(own, args.device)
        self.loss.step(step, grade)
        if self.compilation:
            self._check_compilation(self.compilation, step == self.start.position.step + 1, bool(gave_up))
        self.stop.agree(asked)
        if every and step % every == 0 and not self.stop.why:
            began = time.perf_counter()
            self.eval_loss = self._evaluate()
            if self.metrics:
                self.metrics.pause(time.perf_counter() - began)
        self.watchdog.step()
        if self.stop.why:
            self.watchdog.rest()
            self._save(wait=True)
            control.should_training_stop = True
        elif save_steps and step % save_steps == 0:
            self._save(alive=self.watchdog.alive)
            self.watchdog.alive()

    def _check_compilation(self, compilation: compiled.Compilation, first: bool, gave_up: bool) -> None:
        if first:
            self.ran |= {"first_step_seconds": compilation.check(), **compilation.found()}
            self.status.update(ran=self.ran)
        if (problem := compilation.problem(gave_up)) and self.status.writes:
            log.warning("warning: %s", problem)
            self.status.update(warnings=[*read_status(self.checkpointer.run).warnings, problem])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:  # the summary at the end
            return
        if self.metrics:
            self.metrics.write(state.global_step, self.position.tokens, logs, self.peak_memory, self.eval_loss)
        self.eval_loss = None
        self.status.step(state.global_step)

    def finish(self) -> str | None:
        """Evaluate at the end of the training. Returns why the run was stopped, None when it is done."""
        self.watchdog.rest()
        self.checkpointer.finish()
        if self.stop.why is None:
            self._check_result()
            self._evaluate_at_the_end()
        self.status.update(step=self.position.step)
        return self.stop.why

    def _evaluate_at_the_end(self) -> None:
        loss = self._evaluate()
        if self.stop.why is not None:  # all steps are made; what is left is this evaluation and final/
            self._save(wait=True)
        elif loss is not None:
            self.status.update(eval_loss_after=loss)

    def _check_loss(self, at_the_end: bool = False) -> None:
        try:
            self.loss.check(at_the_end)
        except RunError:
            self.checkpointer.finish()  # the end of this rank must not cut short the save of a good one
            raise

    def _check_result(self) -> None:
        self._check_loss(at_the_end=True)
        made = self.position.step - self.start.position.step
        if made:
            self.weights.check(made, resumed=self.start.checkpoint is not None)

    def _save(self, **kwargs: Any) -> None:
        """Save a checkpoint, unless it would replace good ones by one from which nothing can continue."""
        if self.loss.kind or not self.weights.finite():
            log.warning(
                "no checkpoint is written at step %d: its loss or its weights are no numbers", self.position.step
            )
        else:
            self.checkpointer.save(self.trainer, self.position, **kwargs)

    def _evaluate(self) -> float | None:
        return self.trainer.eval_loss(self.stop.reached)
