"""Safetensors files that are larger than memory: read one tensor at a time, written one shard at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from distft.errors import DataError, RunError, first_line
from distft.train.conversion import Shapes, Tensors


class TensorFiles:
    """The tensors of some safetensors files, by name. Each is read when it is asked for.

    Raises:
        DataError: a file cannot be read.
    """

    def __init__(self, paths: list[Path]):
        self.path_of: dict[str, Path] = {}
        for path in paths:
            with _opened(path) as file:
                self.path_of.update(dict.fromkeys(file.keys(), path))

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor, or None."""
        return self[name] if name in self.path_of else None

    def shapes(self) -> Shapes:
        """The shape of every tensor."""
        found: dict[str, tuple[int, ...]] = {}
        for path in dict.fromkeys(self.path_of.values()):
            with _opened(path) as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.path_of)

    def __contains__(self, name: str) -> bool:
        return name in self.path_of

    def __getitem__(self, name: str) -> torch.Tensor:
        with _opened(self.path_of[name]) as file:  # not kept open: what was read would stay mapped
            return file.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)})") from None


Shard = tuple[str, list[str], int]  # name of a file, its tensors, and their bytes


class ShardWriter:
    """Writes the weights of a model into `folder`, in files of at most `shard_bytes`, or of one tensor.

    Every file is read back and compared. Until name_shards, its name begins with `prefix`.

    Attributes:
        shards: what was written.
    """

    def __init__(self, folder: Path, shard_bytes: int, prefix: str = ""):
        self.folder, self.shard_bytes, self.prefix = folder, shard_bytes, prefix
        self.shards: list[Shard] = []
        self._pending: Tensors = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor of another name.

        Raises:
            RunError: a file holds other values than were written.
        """
        if self._pending and self._bytes() + tensor.nbytes > self.shard_bytes:
            self.flush()
        # A copy: a tensor from a file keeps all of the file mapped.
        self._pending[name] = tensor.clone(memory_format=torch.contiguous_format)

    def _bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._pending.values())

    def flush(self) -> None:
        """Write what is left.

        Raises:
            RunError: a file holds other values than were written.
        """
        if not self._pending:
            return
        path = self.folder / f"{self.prefix}shard-{len(self.shards)}"
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files that only their owner can read
        written = TensorFiles([path])
        for name, tensor in self._pending.items():
            if not torch.equal(written[name], tensor):
                raise RunError(f"{name}: other values on disk than in memory")
        self.shards.append((path.name, list(self._pending), self._bytes()))
        self._pending = {}


def name_shards(folder: Path, shards: Sequence[Shard]) -> None:
    """Give the files their names, and write the index if there are several."""
    file_of: dict[str, str] = {}
    for number, (name, tensors, _) in enumerate(shards, 1):
        target = SAFE_WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / name).rename(folder / target)
        file_of.update(dict.fromkeys(tensors, target))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(size for *_, size in shards)},
            "weight_map": dict(sorted(file_of.items())),
        }
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
