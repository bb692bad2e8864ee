"""One training run, from the run directory to final/."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.trainer_callback import PrinterCallback

from distft import extras
from distft.config.loading import DATA_FILES, load_recipe
from distft.config.recipe import Recipe
from distft.data import few_steps
from distft.errors import ClusterError, DistftError, first_line
from distft.models.attention import UNPADDED
from distft.models.loading import needs_whole_base
from distft.models.lora import changes_base
from distft.runs import model_card
from distft.runs.base_card import base_card
from distft.runs.directory import RunDir
from distft.runs.metrics import cut_metrics
from distft.runs.status import State, read_status
from distft.strategies.kinds import KINDS
from distft.train import before_training, chunked_loss, collectives, compiled, numa, worker
from distft.train.as_published import write_as_published
from distft.train.auto_class import auto_class
from distft.train.base_files import base_files, stored_quantization
from distft.train.callback import NoStepsLeft, RunCallback
from distft.train.checkpoint import Checkpointer, Position
from distft.train.data import Prepared, load_prepared
from distft.train.initial import InitialAdapter
from distft.train.model import build_model
from distft.train.ranks import RankGroup
from distft.train.sampler import StreamSampler
from distft.train.save import save_trained
from distft.train.status import StatusWriter
from distft.train.stopping import Stopping
from distft.train.streaming import Stream
from distft.train.tokens import load_tokenizer
from distft.train.trainer import Collator, RecipeTrainer, training_arguments
from distft.train.watchdog import Watchdog

log = logging.getLogger("distft")


def train(run: RunDir, plan: dict[str, Any], stopping: Stopping) -> None:
    """Train the recipe of a run directory under its plan: from its newest checkpoint to the end, or until stopped."""
    logging.basicConfig(format="%(message)s")
    if plan["topology"]["gpu"] and not torch.cuda.is_available():
        raise ClusterError(f"planned for a {plan['topology']['gpu']}, and torch {torch.__version__} finds no GPU here")
    log.setLevel(logging.INFO)
    recipe = load_recipe(run.recipe, needed=DATA_FILES)
    prepared = load_prepared(recipe)
    tokenizer = load_tokenizer(recipe)
    steps = recipe.training.optimizer_steps(len(prepared.train))
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.logs / "tensorboard"))
    collectives.record(str(run.logs / "collectives-rank-"))
    # accelerate's way, in which all ranks read the whole model and all but one drop it, fails for persistent buffers.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    arguments = training_arguments(recipe, plan, run, steps)
    if recipe.training.compile:
        compiled.check_compiler(arguments.device)
    if torch.cuda.is_available():  # of which this rank has its own by now
        bound = numa.bind(torch.cuda.get_device_properties(arguments.device), plan["topology"]["nproc_per_node"])
        if bound:
            log.info("CPUs: %s", bound)
    if KINDS[plan["strategy"]].engine == "deepspeed":
        import deepspeed

        # zero.Init checks the batch arithmetic while the model is made, and without this sees a world of 1.
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    ranks = RankGroup()
    watchdog = Watchdog(run, ranks.rank, ranks.gathered(worker.host()))
    status = StatusWriter(run, ranks.rank)
    status.begin()
    checkpointer = Checkpointer(run, recipe, plan, ranks, status)
    start = checkpointer.start()
    if status.writes:
        cut_metrics(run, start.position.step)
        status.write(
            state=State.RUNNING,
            step=start.position.step,
            max_steps=steps,
            started=read_status(run).started or time.time(),
            ended=None,
            data=prepared.counts,
            loss_type=recipe.loss_type,
            identity=checkpointer.identity,
            versions={name: extras.installed().get(name) for name in model_card.PACKAGES},
            nodes=os.environ.get("SLURM_JOB_NODELIST"),
        )
        if start.checkpoint:
            log.info("continues after step %d of %d", start.position.step, steps)
    initial = InitialAdapter(
        run.initial_adapter,
        ranks,
        resumed=start.checkpoint is not None,
        each=KINDS[plan["strategy"]].zero_stage == 3,
    )
    sharded_later = KINDS[plan["strategy"]].shards_a_made_model(recipe.model.quantization is not None)
    by_unit = sharded_later and not needs_whole_base(recipe, bool(stored_quantization(recipe)))
    weights = Stream(recipe) if by_unit else None
    model = build_model(recipe, plan["strategy"], tokenizer.eos_token_id, initial, weights)
    attention = model.config.get_text_config()._attn_implementation
    warnings = few_steps.warnings(recipe, prepared.counts) + before_training.check(recipe, model, run, ranks)
    status.write(
        warnings=warnings, base=base_card(recipe.model) | {"class": auto_class(model.config.model_type).__name__}
    )
    if status.writes:
        for text in warnings:
            log.warning("warning: %s", text)
    # As arrays, of which a batch is made in a tenth of the time that lists take (benchmarks/batches.py): no worker
    # processes are needed beside the rank, which a signal to all processes of a job step would kill.
    train_rows, eval_rows = (rows and rows.with_format("numpy") for rows in (prepared.train, prepared.eval))
    chunked = chunked_loss.use(recipe, model, plan["strategy"])
    if recipe.training.compile:
        compiled.compile_blocks(model)
    trainer = RecipeTrainer(
        stream=_stream(recipe, prepared, start.position, steps),
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        loss_type=recipe.training.loss_type,
        chunked=chunked,
        recipe=recipe,
        weights=weights,
        data_collator=Collator(
            tokenizer.pad_token_id,
            recipe.data.packs,
            attention in UNPADDED,
            bounds=recipe.training.compile and compiled.takes_bounds(model),
        ),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    callback = RunCallback(recipe, plan, trainer, checkpointer, start, status, stopping, watchdog)
    trainer.add_callback(callback)
    with contextlib.suppress(NoStepsLeft):
        trainer.train()
    why = callback.finish()
    checkpointer.finish()
    if why is not None:
        status.write(stop_reason=why)  # whether the run is over is for the launcher to say: it may continue by itself
        return
    save_final(run, recipe, trainer, tokenizer, ranks)
    status.write(state=State.COMPLETED, ended=time.time(), reason=None)
    ranks.gathered(None)  # while one writes, however long it takes: NCCL would end the others after its time-out


def _stream(recipe: Recipe, prepared: Prepared, position: Position, steps: int) -> StreamSampler:
    """The rows from `position` to the last step. One batch at least: Trainer asks for one before it trains."""
    left = max(1, steps - position.step) * recipe.training.global_batch_size
    return StreamSampler(len(prepared.train), position.samples + left, recipe.training.seed, start=position.samples)


def leave() -> None:
    """Take this rank out of its process group, once all ranks are done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def save_final(run: RunDir, recipe: Recipe, trainer: RecipeTrainer, tokenizer: Any, ranks: RankGroup) -> None:
    """Write final/ with its model card. Collective."""
    model = recipe.model
    card = model_card.text(run) if ranks.rank == 0 else None
    save_trained(
        trainer.model_wrapped,
        run.final,
        tokenizer=tokenizer,
        ranks=ranks,
        dtype=before_training.final_dtype(recipe),
        card=card,
        generation_config=model.eos_token is not None,
        initial=InitialAdapter(run.initial_adapter) if changes_base(recipe.lora) else None,
        base_files=lambda: base_files(recipe),
        settings=lambda folder: _as_published(recipe, folder),
    )


def _as_published(recipe: Recipe, folder: Path) -> None:
    """Word the files beside the weights as the base's are; what was trained is not lost where these cannot be read."""
    try:
        write_as_published(recipe, folder)
    except (DistftError, OSError, ValueError) as error:
        log.warning(
            "warning: config.json and the tokenizer of final/ are as transformers 5 writes them, which programs with "
            "transformers 4 do not understand: %s",
            first_line(error),
        )
