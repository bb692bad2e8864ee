"""checkpoints/step-N, written beside the training and read by any strategy at any width.

torch.distributed.checkpoint writes and reads the ranges (shares.py) in safetensors files, one a rank; nothing in a
checkpoint is a pickle. A save costs the training a copy to the host's memory; a thread does the rest: write, flush,
read back and compare, checksum, and at last the rename that makes it count.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from distft.config.recipe import Recipe
from distft.data.rows import file_digest
from distft.errors import RunError
from distft.runs import checkpoints
from distft.runs.checkpoints import MANIFEST, SCHEMA, Checkpoint
from distft.runs.directory import RunDir
from distft.train import worker
from distft.train.save import unwrapped
from distft.train.shards import Share, Shares

log = logging.getLogger("distft")
# Said of every save of one process, and of every load: each rank reads what it needs by itself.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

RNG = "rng"
SLOWEST_SECONDS = 3600  # a save; one that takes longer is a hang
SHOWN_SAVES = 10  # in status.json


class Range:
    """A range of a flat tensor as torch.distributed.checkpoint takes it (its _Checkpointable protocol).

    DTensor cuts evenly and ShardedTensor is on its way out; ZeRO cuts where a bucket ends.
    """

    def __init__(self, tensor: torch.Tensor, start: int, total: int):
        self.tensor, self.start, self.total = tensor, start, total

    def size(self) -> torch.Size:
        return torch.Size([self.total])

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        [chunk] = self.__create_chunk_list__()
        properties = TensorProperties.create_from_tensor(self.tensor)
        data = TensorWriteData(chunk=chunk, properties=properties, size=self.size())
        return [WriteItem(index=MetadataIndex(fqn, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=torch.Size([self.start]), sizes=self.tensor.shape)]


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].tensor


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        # The default one sets what is no tensor to None.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].tensor


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps, rows of the stream, and tokens trained on."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


class Checkpointer:
    """Saves and restores one run. All ranks call the same methods at the same steps."""

    def __init__(self, run: RunDir, recipe: Recipe, plan: dict[str, Any]):
        self.run, self.recipe, self.plan = run, recipe, plan
        self.identity = checkpoints.identity(recipe)
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        # A group of its own: the thread's messages must not meet the training's.
        self.group = dist.new_group(backend="gloo") if distributed else None
        # Written down by the first rank of each attempt, so that one that SLURM lost sight of knows that it is over.
        self.owner = f"{worker.host()} {os.getpid()} {time.time()}"
        # One thread for all saves: without memory for a new one, Thread.start would wait for ever.
        self.writer = futures.ThreadPoolExecutor(1, "checkpoint")
        self.pending = self.writer.submit(lambda: None)
        self.problem: str | None = None
        # Of this attempt: step, seconds it took, seconds of them without training.
        self.saves: list[dict[str, Any]] = []
        if self.rank == 0:
            for left in run.checkpoints.glob(".step-*"):  # of a save that was killed
                shutil.rmtree(left, ignore_errors=True)

    def owns(self) -> bool:
        """Whether this attempt is the run's newest. On the first rank."""
        try:
            return self.run.read_status().get("owner") in (None, self.owner)
        except OSError:  # a network file system that is away for a moment
            return True

    # ---- saving

    def save(
        self, trainer: Any, position: Position, *, wait: bool = False, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Copy all that the next step needs to the host, and write it; `wait` until it is written.

        `alive` is called while the save before is still being written.

        Raises:
            RunError: with `wait`, it could not be written. Without, that is only said: the training goes on.
        """
        began = time.perf_counter()
        self.finish(alive)
        staged = self._stage(trainer)
        manifest = self._manifest(trainer, position, staged)
        self.saves.append({"step": position.step, "stall_seconds": time.perf_counter() - began})
        self.pending = self.writer.submit(self._write, staged, manifest)
        if wait:
            self.finish()
            if self.problem:
                raise RunError(self.problem)

    def finish(self, alive: Callable[[], None] = lambda: None) -> None:
        """Wait for the save that is under way, calling `alive` for as long as a slow file system may take."""
        deadline = time.monotonic() + SLOWEST_SECONDS
        while not futures.wait([self.pending], timeout=5).done:
            if time.monotonic() < deadline:
                alive()
        self.pending.result()

    def _stage(self, trainer: Any) -> dict[str, Range]:
        """This rank's part of everything, in the host's memory."""
        staged = {}

        def stage(name: str, part: torch.Tensor, start: int, total: int) -> None:
            if len(part):
                staged[name] = Range(part.detach().to("cpu", copy=True), start, total)

        for share in Shares(trainer.model_wrapped, trainer.optimizer).read():
            own, total = share.own(), _elements(share)
            for name, values in _named(share).items():
                stage(name, values[own], share.start + own.start, total)
            if share.copy == 0:
                for name, values in share.factors.items():
                    stage(f"{share.name}/{name}", values, 0, len(values))
        for name, state in _generators().items():
            stage(f"{RNG}/{self.rank}/{name}", state, 0, len(state))
        return staged

    def _manifest(self, trainer: Any, position: Position, staged: dict[str, Range]) -> dict[str, Any]:
        from distft import extras

        return {
            "schema": SCHEMA,
            "step": position.step,
            "samples": position.samples,
            "tokens": position.tokens,
            "identity": self.identity,
            "optimizer_steps": Shares(trainer.model_wrapped, trainer.optimizer).steps(),
            "scheduler_steps": trainer.lr_scheduler.last_epoch,
            "scaler": _scaler_state(trainer),
            "strategy": self.plan["strategy"],
            "world_size": self.world,
            "versions": {name: extras.installed().get(name) for name in ("torch", "transformers", "peft")},
            "time": time.time(),
        }

    def _write(self, staged: dict[str, Range], manifest: dict[str, Any]) -> None:
        """What the thread does. Never raises: `problem` says what went wrong."""
        began = time.perf_counter()
        folder = self.run.checkpoint(manifest["step"])
        work = folder.with_name(f".{folder.name}.partial")
        try:
            problem, files = None, {}
            try:
                self._make(work)
                writer = HuggingFaceStorageWriter(str(work), save_distributed=True)
                dcp.save(
                    staged,
                    storage_writer=writer,
                    planner=_SavePlanner(),
                    process_group=self.group,
                    no_dist=self.group is None,
                )
                files = self._read_back(work, staged)
            except (Exception, dcp.api.CheckpointException) as error:  # the latter is none of the former
                problem = _first_line(error)
            try:
                found = self.gathered((problem, files))
            except Exception as error:  # the other ranks would wait for this one for ever
                worker.record_error(self.run, self.rank, error)
                traceback.print_exc()
                os._exit(1)
            problem = next((text for text, _ in found if text), None)
            if problem is None and self.rank == 0 and self.owns():
                manifest["files"] = {name: facts for _, part in found for name, facts in part.items()}
                self._commit(work, folder, manifest)
            self.problem = problem and self._not_written(folder, problem)
        except Exception as error:
            self.problem = self._not_written(folder, _first_line(error))
        if self.rank == 0:
            self.saves[-1]["seconds"] = time.perf_counter() - began
            with contextlib.suppress(OSError):  # a full disk
                if self.problem:
                    self.saves[-1]["problem"] = self.problem
                    shutil.rmtree(work, ignore_errors=True)
                    log.warning("%s", self.problem)
                    self.run.update_status(checkpoint_problem=self.problem)
                else:
                    self.run.update_status(saves=self.saves[-SHOWN_SAVES:], checkpoint_problem=None)

    def _make(self, work: Path) -> None:
        """An empty folder for all ranks; raises on all where it cannot be made."""
        problem = None
        if self.rank == 0:
            try:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
            except OSError as error:
                problem = _first_line(error)
        if problem := self._from_first_rank(problem):
            raise RunError(problem)

    def _read_back(self, work: Path, staged: dict[str, Range]) -> dict[str, dict[str, Any]]:
        """Compare this rank's file with what was to be in it; returns size and checksum by name.

        Raises:
            RunError: it holds something else.
        """
        files = {}
        for path in sorted(work.glob(f"shard-{self.rank + 1:05d}-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                wrong = [n for n in file.keys() if not torch.equal(file.get_tensor(n), staged[n].tensor)]  # noqa: SIM118
                if wrong or len(file.keys()) != len(staged):
                    raise RunError(f"{path.name}: {len(wrong)} tensors are not what was in memory")
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path).hex()}
        if not files:
            raise RunError(f"rank {self.rank} found no file of its own")
        return files

    def _commit(self, work: Path, folder: Path, manifest: dict[str, Any]) -> None:
        """Make it count, and remove what is beyond save_total_limit."""
        with (work / MANIFEST).open("w") as file:
            file.write(json.dumps(manifest, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if folder.exists():  # a damaged one, or one from before a restart
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
        for old in checkpoints.complete(self.run)[limit:] if limit else ():
            shutil.rmtree(old.path, ignore_errors=True)

    def _not_written(self, folder: Path, why: str) -> str:
        kept = checkpoints.complete(self.run)
        last = f"the last complete one is step-{kept[0].step}" if kept else "there is none before it"
        return f"checkpoint {folder.name} could not be written ({why}); {last}"

    # ---- restoring

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are what their checksums say; the same on all ranks."""
        for found in self._from_first_rank(checkpoints.complete(self.run) if self.rank == 0 else None):
            damage = self.gathered(found.damage(self.rank, self.world))
            problem = next((text for text in damage if text), None)
            if problem is None:
                return found
            if self.rank == 0:
                said = f"checkpoint {found.path.name} is damaged ({problem}): the one before it is taken"
                log.warning("%s", said)
                self.run.update_status(checkpoint_problem=said)
                # Out of the way: it must not count as one of those that save_total_limit keeps.
                aside = found.path.with_name(f"damaged-{found.path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                found.path.rename(aside)
        return None

    def position(self, found: Checkpoint | None) -> Position:
        """Where a run goes on that continues `found`.

        Raises:
            RunError: `found` belongs to another model, data set or recipe, and `resume --force` did not allow it.
        """
        if found is None:
            return Position()
        allowed = self.run.read_status().get("accepted") or []
        other = checkpoints.differences(found.manifest["identity"], self.identity)
        refused = [f"{name}: {text}" for name, text in other.items() if name not in allowed]
        if refused:
            raise RunError(f"{found.path.name} cannot be continued:\n  " + "\n  ".join(refused))
        return Position(*(found.manifest[name] for name in ("step", "samples", "tokens")))

    def restore(self, found: Checkpoint, trainer: Any) -> None:
        """Put the wrapped model, its optimizer, scheduler and random generators where they were.

        Raises:
            RunError: the checkpoint holds other tensors than this model trains.
        """
        manifest = found.manifest
        shares = Shares(trainer.model_wrapped, trainer.optimizer)
        if manifest["optimizer_steps"] is not None:
            shares.make_states(manifest["optimizer_steps"])
        targets = {}
        for share in shares.read():
            for name, values in _named(share).items():
                targets[name] = Range(values, share.start, _elements(share))
            for name, values in share.factors.items():
                targets[f"{share.name}/{name}"] = Range(values, 0, len(values))
        generators = _generators() if manifest["world_size"] == self.world else {}
        for name, state in generators.items():
            targets[f"{RNG}/{self.rank}/{name}"] = Range(state, 0, len(state))
        reader = HuggingFaceStorageReader(str(found.path))
        saved = {name for name in reader.read_metadata().state_dict_metadata if "/" not in name}
        trained = {name for name, p in unwrapped(trainer.model_wrapped).named_parameters() if p.requires_grad}
        if saved != trained:
            some = sorted(saved ^ trained)[:5]
            raise RunError(f"{found.path}: holds other parameters than are trained, among them {', '.join(some)}")
        try:
            dcp.load(targets, storage_reader=reader, planner=_LoadPlanner(), no_dist=True)
        except (RuntimeError, ValueError, dcp.api.CheckpointException) as error:
            raise RunError(f"{found.path}: {_first_line(error)}") from error
        shares.take_over()
        _set_generators(generators)
        _set_scaler(trainer, manifest["scaler"])
        # By its count alone: DeepSpeed leaves out empty parameter groups, so that their number differs.
        scheduler = trainer.lr_scheduler
        scheduler.last_epoch = manifest["scheduler_steps"]
        scheduler._last_lr = scheduler.get_lr()
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def gathered(self, value: Any) -> list[Any]:
        """All ranks' values, by rank."""
        values = [value]
        if self.group is not None:
            values = [None] * self.world
            dist.all_gather_object(values, value, group=self.group)
        return values

    def _from_first_rank(self, value: Any) -> Any:
        box = [value]
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]


def read_weights(found: Checkpoint) -> dict[str, torch.Tensor]:
    """The trained parameters of a checkpoint by their names in the model, flat, on the CPU; no optimizer states.

    Raises:
        RunError: it cannot be read.
    """
    reader = HuggingFaceStorageReader(str(found.path))
    saved = {name: facts for name, facts in reader.read_metadata().state_dict_metadata.items() if "/" not in name}
    targets = {
        name: Range(torch.empty(facts.size, dtype=facts.properties.dtype), 0, facts.size.numel())
        for name, facts in saved.items()
    }
    try:
        dcp.load(targets, storage_reader=reader, planner=_LoadPlanner(), no_dist=True)
    except (RuntimeError, ValueError, dcp.api.CheckpointException) as error:
        raise RunError(f"{found.path}: {_first_line(error)}") from error
    return {name: target.tensor for name, target in targets.items()}


def _elements(share: Share) -> int:
    return prod(share.shape)


def _named(share: Share) -> dict[str, torch.Tensor]:
    """The range's tensors by their names in a checkpoint."""
    return {share.name: share.weights} | {f"{share.name}/{name}": values for name, values in share.states.items()}


def _generators() -> dict[str, torch.Tensor]:
    """States of torch's random generators on this rank (dropout draws from them)."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _set_generators(states: dict[str, torch.Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _scaler_state(trainer: Any) -> dict[str, float] | None:
    """The loss scale of fp16: torch's GradScaler, or DeepSpeed's own."""
    if trainer.accelerator.scaler is not None:
        return trainer.accelerator.scaler.state_dict()
    scaler = getattr(getattr(trainer.model_wrapped, "optimizer", None), "loss_scaler", None)
    scale = getattr(scaler, "cur_scale", None)
    return None if scale is None else {"scale": float(scale)}


def _set_scaler(trainer: Any, saved: dict[str, float] | None) -> None:
    if not saved:
        return
    if trainer.accelerator.scaler is not None:
        scaler = trainer.accelerator.scaler
        scaler.load_state_dict(scaler.state_dict() | saved)
        return
    scaler = getattr(getattr(trainer.model_wrapped, "optimizer", None), "loss_scaler", None)
    if hasattr(scaler, "cur_scale"):
        scaler.cur_scale = saved["scale"]


def _first_line(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException) and error.failures:  # of whatever rank
        error = next(iter(error.failures.values()))[0]
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
