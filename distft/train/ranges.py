"""Ranges of flat tensors in safetensors files, as torch.distributed.checkpoint (DCP) has and reads them.

Each rank writes one file with the ranges that it holds, and reads those that it needs from anyone's file. Nothing in
these files is a pickle.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from distft.data.cache import file_digest
from distft.errors import RunError, in_one_line

# DCP warns of it at every save of one process, and at every load: each rank reads what it needs by itself.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class Range:
    """A range of a flat tensor, as DCP takes it (its _Checkpointable protocol).

    DTensor splits evenly and ShardedTensor is deprecated; ZeRO splits where a bucket ends.
    """

    def __init__(self, tensor: torch.Tensor, start: int, total: int):
        self.tensor, self.start, self.total = tensor, start, total

    def size(self) -> torch.Size:
        return torch.Size([self.total])

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=torch.Size([self.start]), sizes=self.tensor.shape)]


Ranges = dict[str, Range]


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        # The default planner replaces whatever is not a tensor by None.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].tensor


def write_ranges(ranges: Ranges, folder: Path, rank: int) -> None:
    """Write a rank's ranges into a file in `folder`, flushed to disk.

    The file of DCP's HuggingFaceStorageWriter. That makes it with safetensors.save, which has it in memory once more
    and holds the interpreter's lock for half of the time, so that the training stands still; save_file does neither.

    Raises:
        OSError, SafetensorError: it could not be written.
    """
    path = folder / f"{_shard(rank)}-model-00001-of-00001.safetensors"
    offsets = {name: {SAVED_OFFSETS_KEY: [found.start]} for name, found in ranges.items()}
    metadata = {
        CUSTOM_METADATA_KEY: json.dumps(offsets),
        DCP_VERSION_KEY: str(HF_DCP_VERSION),
        FORMAT_KEY: FORMAT_VALUE,
    }
    save_file({name: found.tensor for name, found in ranges.items()}, path, metadata)
    path.chmod(0o644)  # safetensors makes files that only their owner can read
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _shard(rank: int) -> str:
    return f"shard-{rank + 1:05d}"


def check_written(ranges: Ranges, folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Compare the file that a rank wrote with what was to be in it. Returns {name: {"bytes", "sha256"}}.

    Raises:
        RunError: it holds something else, or is not there.
    """
    files = {}
    for path in sorted(folder.glob(f"{_shard(rank)}-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            wrong = [name for name in names if not torch.equal(file.get_tensor(name), ranges[name].tensor)]
        if wrong or len(names) != len(ranges):
            raise RunError(f"{path.name}: {len(wrong)} tensors differ from what was in memory")
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path).hex()}
    if not files:
        raise RunError(f"rank {rank} finds no file that it has written")
    return files


def read_ranges(ranges: Ranges, folder: Path) -> None:
    """Fill the tensors of `ranges` from the files in `folder`.

    Raises:
        RunError: the files do not hold them.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        load(ranges, storage_reader=reader, planner=_LoadPlanner(), no_dist=True)
    except (RuntimeError, ValueError, CheckpointException) as error:
        raise RunError(f"{folder}: {cause(error)}") from error


def stored_weights(folder: Path) -> dict[str, TensorStorageMetadata]:
    """The trained parameters in `folder`, without what belongs to them (`NAME/STATE`), by name."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: facts for name, facts in found.items() if "/" not in name and isinstance(facts, TensorStorageMetadata)
    }


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The trained parameters in `folder` by their names in the model: flat, on the CPU.

    Raises:
        RunError: they cannot be read.
    """
    ranges = {
        name: Range(torch.empty(facts.size, dtype=facts.properties.dtype), 0, facts.size.numel())
        for name, facts in stored_weights(folder).items()
    }
    read_ranges(ranges, folder)
    return {name: found.tensor for name, found in ranges.items()}


def cause(error: BaseException) -> str:
    """An error in one line; DCP's by that of the first rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return in_one_line(error)
