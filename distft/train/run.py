"""One training run, from the run directory to final/."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig
from transformers.trainer_callback import PrinterCallback

from distft import extras
from distft.config.loading import DATA_FILES, load_recipe
from distft.config.recipe import Recipe
from distft.runs import model_card
from distft.runs.directory import RunDir
from distft.strategies.kinds import KINDS
from distft.train.checkpoint import Checkpointer
from distft.train.data import load_prepared, load_tokenizer
from distft.train.model import build_model, choose_attention
from distft.train.sampler import StreamSampler, optimizer_steps
from distft.train.save import save_trained
from distft.train.stopping import Stopping
from distft.train.trainer import Collator, NothingLeft, RecipeTrainer, Recorder, training_arguments

log = logging.getLogger("distft")


def train(run: RunDir, plan: dict[str, Any], stopping: Stopping) -> None:
    """Train the recipe of a run directory under its plan, from its newest checkpoint on, to the end or to a stop."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    recipe = load_recipe(run.recipe, needed=DATA_FILES)
    prepared = load_prepared(recipe)
    tokenizer = load_tokenizer(recipe)
    batch_size = recipe.training.global_batch_size
    steps = optimizer_steps(
        len(prepared.train), batch_size, recipe.training.max_steps, recipe.training.num_train_epochs
    )
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.logs / "tensorboard"))
    arguments = training_arguments(recipe, plan, run, steps)
    if KINDS[plan["strategy"]].engine == "deepspeed":
        import deepspeed

        # zero.Init checks the batch arithmetic while the model is made, and without this sees a world of 1.
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    writes = arguments.process_index == 0
    checkpointer = Checkpointer(run, recipe, plan)
    found = checkpointer.newest()
    position = checkpointer.position(found)
    if writes:
        run.cut_metrics(position.step)
        started = run.read_status().get("started") or time.time()
        run.update_status(
            state="running",
            step=position.step,
            max_steps=steps,
            started=started,
            ended=None,
            data=prepared.counts,
            identity=checkpointer.identity,
            owner=checkpointer.owner,
            versions={name: extras.installed().get(name) for name in model_card.PACKAGES},
            nodes=os.environ.get("SLURM_JOB_NODELIST"),
        )
        if found:
            log.info("continues after step %d of %d", position.step, steps)
    model = build_model(recipe, plan["strategy"])
    total = position.samples + max(1, steps - position.step) * batch_size
    trainer = RecipeTrainer(
        stream=StreamSampler(len(prepared.train), total, recipe.training.seed, position.samples),
        model=model,
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.eval,
        data_collator=Collator(
            tokenizer.pad_token_id, recipe.data.packing, choose_attention(recipe) == "flash_attention_2"
        ),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    recorder = Recorder(run, recipe, plan, trainer, checkpointer, (found, position), stopping)
    trainer.add_callback(recorder)
    with contextlib.suppress(NothingLeft):
        trainer.train()
    stopped = recorder.end()
    checkpointer.finish()
    if stopped:
        if writes:
            run.update_status(stopped=stopped)  # how the run ended is for the launcher to say: it may go on by itself
    else:
        save_final(run, recipe, trainer, tokenizer, writes)
        if writes:
            run.update_status(state="completed", ended=time.time(), reason=None)


def leave() -> None:
    """Take this rank out of its process group, once all are done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def save_final(run: RunDir, recipe: Recipe, trainer: RecipeTrainer, tokenizer: Any, writes: bool) -> None:
    """Write final/ with its model card."""
    model = recipe.model
    config = AutoConfig.from_pretrained(
        model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    dtype = config.dtype or torch.float32  # a whole model keeps the dtype of its base
    card = model_card.text(run) if writes else None
    save_trained(trainer.model_wrapped, run.final, tokenizer=tokenizer, writes=writes, dtype=dtype, card=card)
