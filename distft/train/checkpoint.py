"""checkpoints/step-N, written beside the training and read by any strategy at any world size.

A checkpoint holds ranges of flat tensors (shards.py says which, ranges.py how they are stored) and a manifest. A save
holds the training up for a copy to the host's memory. A thread does the rest: write, flush, read back and compare,
checksum, and at last the rename that makes it count.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from distft import extras
from distft.config.recipe import Recipe
from distft.errors import RunError, in_one_line
from distft.runs import checkpoints
from distft.runs.checkpoints import MANIFEST, SCHEMA, Checkpoint
from distft.runs.directory import RunDir
from distft.runs.status import read_status
from distft.train import step_state, worker
from distft.train.ranges import Range, Ranges, check_written, read_ranges, stored_weights, write_ranges
from distft.train.ranks import RankGroup
from distft.train.save import unwrapped
from distft.train.shards import Share, Shares
from distft.train.status import StatusWriter

log = logging.getLogger("distft")

RNG = "rng"
SLOWEST_SECONDS = 3600  # a save that takes longer counts as a hang
SHOWN_SAVES = 10  # in status.json


@dataclass(frozen=True)
class Position:
    """How far a run is: optimizer steps, rows of the stream, and tokens trained on."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def after(self, step: int, samples: int, tokens: int) -> Position:
        """After the step of that number, on `samples` more rows with `tokens` tokens."""
        return Position(step, self.samples + samples, self.tokens + tokens)


@dataclass(frozen=True)
class Start:
    """Where an attempt starts: after a checkpoint, or at the beginning."""

    checkpoint: Checkpoint | None
    position: Position


class Checkpointer:
    """Saves and restores one run. All ranks call the same methods at the same steps."""

    def __init__(self, run: RunDir, recipe: Recipe, plan: dict[str, Any], ranks: RankGroup, status: StatusWriter):
        self.run, self.recipe, self.plan, self.ranks, self.status = run, recipe, plan, ranks, status
        self.identity = checkpoints.identity(recipe)
        # One thread for all saves: where memory is too short for another, Thread.start would wait for ever.
        self.writer = futures.ThreadPoolExecutor(1, "checkpoint")
        self.pending: futures.Future[None] = self.writer.submit(lambda: None)
        self.problem: str | None = None
        # Of this attempt: step, seconds until written, seconds of them in which the training stood still.
        self.saves: list[dict[str, Any]] = []
        self.staged: dict[str, torch.Tensor] = {}  # a buffer in host memory for each tensor that is saved
        if ranks.rank == 0:
            for unfinished in run.checkpoints.glob(".step-*"):  # of a save that was killed
                shutil.rmtree(unfinished, ignore_errors=True)

    # ---- saving

    def save(
        self, trainer: Any, position: Position, *, wait: bool = False, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Copy all that the next step needs to the host's memory, and write it; `wait` until it is written.

        `alive` is called for as long as the save before this one is still being written.

        Raises:
            RunError: with `wait`, it could not be written. Without, that is only logged, and the training continues.
        """
        began = time.perf_counter()
        self.finish(alive)
        staged = self._stage(trainer)
        manifest = self._manifest(trainer, position)
        self.saves.append({"step": position.step, "stall_seconds": time.perf_counter() - began})
        self.pending = self.writer.submit(self._write, staged, manifest)
        if wait:
            self.finish()
            if self.problem:
                raise RunError(self.problem)

    def finish(self, alive: Callable[[], None] = lambda: None) -> None:
        """Wait for the save under way, if any; call `alive` for as long as a slow file system may take."""
        deadline = time.monotonic() + SLOWEST_SECONDS
        while not futures.wait([self.pending], timeout=5).done:
            if time.monotonic() < deadline:
                alive()
        self.pending.result()

    def _stage(self, trainer: Any) -> Ranges:
        """This rank's part of everything, copied to the host's memory."""
        staged: Ranges = {}

        def stage(name: str, part: torch.Tensor, start: int, total: int) -> None:
            if len(part):
                staged[name] = Range(self._copy(name, part.detach()), start, total)

        for share in Shares(trainer.model_wrapped, trainer.optimizer).read():
            own = share.own()
            for name, values in _by_name(share).items():
                stage(name, values[own], share.start + own.start, prod(share.shape))
            if share.copy == 0:
                for name, values in share.factors.items():
                    stage(f"{share.name}/{name}", values, 0, len(values))
        for name, state in step_state.generators().items():
            stage(f"{RNG}/{self.ranks.rank}/{name}", state, 0, len(state))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged

    def _copy(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, which every save uses again: pinned where there is a GPU, since copies to other memory
        take several times as long. The save before this one is written by now."""
        kept = self.staged.get(name)
        if kept is None or kept.shape != part.shape:
            kept = torch.empty(part.shape, dtype=part.dtype, pin_memory=torch.cuda.is_available())
            self.staged[name] = kept
        return kept.copy_(part, non_blocking=True)

    def _manifest(self, trainer: Any, position: Position) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "step": position.step,
            "samples": position.samples,
            "tokens": position.tokens,
            "identity": self.identity,
            "optimizer_steps": Shares(trainer.model_wrapped, trainer.optimizer).steps(),
            "scheduler_steps": trainer.lr_scheduler.last_epoch,
            "scaler": step_state.scaler_state(trainer),
            "strategy": self.plan["strategy"],
            "world_size": self.ranks.world_size,
            "versions": {name: extras.installed().get(name) for name in ("torch", "transformers", "peft")},
            "time": time.time(),
        }

    # ---- in the thread

    def _write(self, staged: Ranges, manifest: dict[str, Any]) -> None:
        """Write a save and make it count on all ranks, or on none. What went wrong is left in `problem`."""
        began = time.perf_counter()
        folder = self.run.checkpoint(manifest["step"])
        work = folder.with_name(f".{folder.name}.partial")
        try:
            outcomes = self._outcomes(*self._write_own(staged, work))
            problem = next((why for why, _ in outcomes if why), None)
            if problem is None and self.ranks.rank == 0 and self.status.owns():
                manifest["files"] = {name: facts for _, files in outcomes for name, facts in files.items()}
                self._commit(work, folder, manifest)
        except Exception as error:
            problem = in_one_line(error)
        self.problem = problem and self._not_written(folder, problem)
        if self.ranks.rank == 0:
            self.saves[-1]["seconds"] = time.perf_counter() - began
            if self.problem:
                self.saves[-1]["problem"] = self.problem
                shutil.rmtree(work, ignore_errors=True)
                log.warning("%s", self.problem)
            self.status.update(saves=self.saves[-SHOWN_SAVES:], checkpoint_problem=self.problem)

    def _write_own(self, staged: Ranges, work: Path) -> tuple[str | None, dict[str, Any]]:
        """Write and check this rank's file in `work`. Returns what went wrong, and the manifest's facts of the file."""
        try:
            self._make(work)
            write_ranges(staged, work, self.ranks.rank)
            return None, check_written(staged, work, self.ranks.rank)
        except Exception as error:
            return in_one_line(error), {}

    def _make(self, work: Path) -> None:
        """An empty folder for all ranks; raises RunError on all where it cannot be made."""
        problem = None
        if self.ranks.rank == 0:
            try:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
            except OSError as error:
                problem = in_one_line(error)
        if problem := self.ranks.from_first(problem):
            raise RunError(problem)

    def _outcomes(self, problem: str | None, files: dict[str, Any]) -> list[tuple[str | None, dict[str, Any]]]:
        """Every rank's outcome. Ends this process where that fails: the other ranks would wait for it for ever."""
        try:
            return self.ranks.gathered((problem, files))
        except Exception as error:
            worker.record_error(self.run, self.ranks.rank, error)
            traceback.print_exc()
            os._exit(1)

    def _commit(self, work: Path, folder: Path, manifest: dict[str, Any]) -> None:
        """Make a save count, and remove what is beyond save_total_limit."""
        with (work / MANIFEST).open("w") as file:
            file.write(json.dumps(manifest, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if folder.exists():  # damaged, or from before a restart
            old = folder.with_name(f".{folder.name}.old")
            folder.rename(old)
            work.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            work.rename(folder)
        descriptor = os.open(folder.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        limit = self.recipe.checkpoint.save_total_limit
        for beyond in checkpoints.complete(self.run)[limit:] if limit else ():
            shutil.rmtree(beyond.path, ignore_errors=True)

    def _not_written(self, folder: Path, why: str) -> str:
        kept = checkpoints.complete(self.run)
        last = f"the last complete one is step-{kept[0].step}" if kept else "there is none before it"
        return f"checkpoint {folder.name} could not be written ({why}); {last}"

    # ---- restoring

    def start(self) -> Start:
        """Where the run continues: after its newest checkpoint that is intact. The same on all ranks.

        Raises:
            RunError: the checkpoint belongs to another model, data set or recipe, and `resume --force` did not allow
                the difference.
        """
        found = self._newest()
        if found is None:
            return Start(None, Position())
        allowed = read_status(self.run).accepted
        changed = checkpoints.differences(found.manifest["identity"], self.identity)
        refused = [f"{name}: {text}" for name, text in changed.items() if name not in allowed]
        if refused:
            raise RunError(f"{found.path.name} cannot be continued:\n  " + "\n  ".join(refused))
        return Start(found, Position(*(found.manifest[name] for name in ("step", "samples", "tokens"))))

    def _newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files match their checksums; damaged ones are moved out of the way."""
        for found in self.ranks.from_first(checkpoints.complete(self.run) if self.ranks.rank == 0 else None):
            damage = self.ranks.gathered(found.damage(self.ranks.rank, self.ranks.world_size))
            problem = next((text for text in damage if text), None)
            if problem is None:
                return found
            if self.ranks.rank == 0:
                warning = f"checkpoint {found.path.name} is damaged ({problem}): using the one before it"
                log.warning("%s", warning)
                self.status.update(checkpoint_problem=warning)
                # Renamed, so that it does not count as one of those that save_total_limit keeps.
                aside = found.path.with_name(f"damaged-{found.path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                found.path.rename(aside)
        return None

    def restore(self, found: Checkpoint, trainer: Any) -> None:
        """Put the wrapped model, its optimizer, scheduler and random generators where they were.

        Raises:
            RunError: the checkpoint holds other tensors than this model trains.
        """
        manifest = found.manifest
        saved = stored_weights(found.path).keys()
        trained = {name for name, p in unwrapped(trainer.model_wrapped).named_parameters() if p.requires_grad}
        if saved != trained:
            some = sorted(saved ^ trained)[:5]
            raise RunError(f"{found.path}: holds other parameters than are trained, among them {', '.join(some)}")
        shares = Shares(trainer.model_wrapped, trainer.optimizer)
        if manifest["optimizer_steps"] is not None:
            shares.make_states(manifest["optimizer_steps"])
        ranges: Ranges = {}
        for share in shares.read():
            for name, values in _by_name(share).items():
                ranges[name] = Range(values, share.start, prod(share.shape))
            for name, values in share.factors.items():
                ranges[f"{share.name}/{name}"] = Range(values, 0, len(values))
        generators = step_state.generators() if manifest["world_size"] == self.ranks.world_size else {}
        for name, state in generators.items():
            ranges[f"{RNG}/{self.ranks.rank}/{name}"] = Range(state, 0, len(state))
        read_ranges(ranges, found.path)
        shares.take_over()
        step_state.set_generators(generators)
        step_state.set_scaler(trainer, manifest["scaler"])
        step_state.set_schedule(trainer, manifest["scheduler_steps"])


def _by_name(share: Share) -> dict[str, torch.Tensor]:
    """The tensors of a share's range by their names in a checkpoint."""
    return {share.name: share.weights} | {f"{share.name}/{name}": values for name, values in share.states.items()}
