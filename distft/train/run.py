"""One training run, from the run directory to final/."""

from __future__ import annotations

import logging
import os
import shutil
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig
from transformers.trainer_callback import PrinterCallback

from distft.loading import load_recipe
from distft.recipe import Recipe
from distft.run_dir import RunDir
from distft.train import cpu_ranks
from distft.train.data import load_prepared, load_tokenizer
from distft.train.model import build_model, choose_attention
from distft.train.sampler import StreamSampler, optimizer_steps
from distft.train.save import save_trained
from distft.train.trainer import Collator, RecipeTrainer, Recorder, training_arguments

log = logging.getLogger("distft")


def train(run: RunDir, plan: dict[str, Any]) -> None:
    """Train the recipe of a run directory under its plan."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    cpu_ranks.apply()
    recipe = load_recipe(run.recipe)
    prepared = load_prepared(recipe)
    tokenizer = load_tokenizer(recipe)
    batch_size = recipe.training.global_batch_size
    steps = optimizer_steps(
        len(prepared.train), batch_size, recipe.training.max_steps, recipe.training.num_train_epochs
    )
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.logs / "tensorboard"))
    arguments = training_arguments(recipe, plan, run, steps)
    if plan["strategy"].startswith("zero"):
        import deepspeed

        # zero.Init checks the batch arithmetic while the model is made, and without this sees a world of 1.
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    writes = arguments.process_index == 0
    if writes:
        run.update_status(state="running", step=0, max_steps=steps, started=time.time(), data=prepared.counts)
    model = build_model(recipe, plan["strategy"])
    stream = StreamSampler(len(prepared.train), steps * batch_size, recipe.training.seed)
    trainer = RecipeTrainer(
        stream=stream,
        model=model,
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.heldout,
        data_collator=Collator(
            tokenizer.pad_token_id, recipe.data.packing, choose_attention(recipe) == "flash_attention_2"
        ),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    saver = Saver(run, recipe, trainer, tokenizer, writes)
    trainer.add_callback(Recorder(run, recipe, plan, trainer, saver.checkpoint))
    trainer.train()
    saver.save(run.final)
    if writes:
        run.update_status(state="completed", ended=time.time(), reason=None)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class Saver:
    """Writes final/ and checkpoints/step-N."""

    def __init__(self, run: RunDir, recipe: Recipe, trainer: RecipeTrainer, tokenizer: Any, writes: bool):
        self.run, self.recipe, self.trainer, self.tokenizer, self.writes = run, recipe, trainer, tokenizer, writes
        config = AutoConfig.from_pretrained(
            recipe.model.name_or_path,
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        self.dtype = config.dtype or torch.float32  # a whole model keeps the dtype of its base

    def save(self, folder: Any) -> None:
        save_trained(self.trainer.model_wrapped, folder, tokenizer=self.tokenizer, writes=self.writes, dtype=self.dtype)

    def checkpoint(self, step: int) -> None:
        self.save(self.run.checkpoint(step))
        limit = self.recipe.checkpoint.save_total_limit
        if self.writes and limit:
            saved = sorted(self.run.checkpoints.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
            for old in saved[:-limit]:
                shutil.rmtree(old)
