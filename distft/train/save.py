"""Writes what was trained into a folder that peft or transformers loads, reads it back and compares it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sized
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from distft.errors import DistftError, RunError, in_one_line
from distft.models.loading import SHARD_BYTES
from distft.models.lora import ADAPTER_WEIGHTS
from distft.train.conversion import Conversion, Group, Tensors, parameter_shapes, saved_form, twin
from distft.train.initial import InitialAdapter, make_plain
from distft.train.new_rows import new_rows
from distft.train.ranks import RankGroup
from distft.train.tensor_files import ShardWriter, TensorFiles, name_shards


def save_trained(
    model: Any,
    folder: Path,
    *,
    tokenizer: Any,
    ranks: RankGroup,
    dtype: torch.dtype,
    card: str | None = None,
    generation_config: bool = False,
    base_files: Callable[[], TensorFiles] | None = None,
    initial: InitialAdapter | None = None,
    settings: Callable[[Path], None] | None = None,
) -> None:
    """Gather what was trained and write it into `folder`: an adapter, or the whole model in `dtype`; and its `card`.

    What of a whole model is frozen comes from `base_files`, as it is there: a strategy may hold it in fewer bits. Its
    generation config is beside it, an adapter's where asked for: it says which token ends a text.

    `settings` rewrites what transformers wrote beside the weights (as_published.py).

    An adapter whose `initial` weights were taken out of its base is written for the base as it is.

    Collective: all ranks call it with the wrapped model. Of an adapter the first one writes, of a whole model each a
    part. The folder appears complete or not at all.

    Raises:
        RunError: it could not be written, or what is on disk is not what was in memory.
    """
    base = unwrapped(model)
    adapter = hasattr(base, "peft_config")
    first = ranks.rank == 0
    work = folder.with_name(f".{folder.name}.partial")
    if first:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    ranks.from_first(None)
    if adapter:
        trained = dict(_gather(base, model, keep=first))
        if not first:
            return
        if initial is not None:
            trained = initial.plain(trained)
            make_plain(base.peft_config["default"])
        expected = _save_adapter(base, work, trained)
        if len(expected) != len(trained):
            raise RunError(f"{folder}: peft saves {len(expected)} of the {len(trained)} trained tensors")
    else:
        if first:
            base.save_pretrained(work, state_dict={})  # all but the weights
            base.config.dtype = dtype
            base.config.save_pretrained(work)
        _save_whole(base, model, work, dtype, base_files, ranks)
        if not first:
            return
    tokenizer.save_pretrained(work)
    if adapter and generation_config:
        base.generation_config.save_pretrained(work)
    if settings is not None:
        settings(work)
    if card is not None:
        (work / "README.md").write_text(card)  # replaces peft's, which has nothing in it
    if adapter:
        for path in work.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors makes files that only their owner can read
        verify(work, expected)
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)


def _save_whole(
    base: Any,
    model: Any,
    folder: Path,
    dtype: torch.dtype,
    base_files: Callable[[], TensorFiles] | None,
    ranks: RankGroup,
) -> None:
    """Write a whole model, as the base is published where that is possible. The ranks take turns, tensor by tensor, so
    that as many write as there are files, and none has more than a file in host memory.

    Raises:
        RunError: on all ranks, as save_trained.
    """
    conversion, published = saved_form(base)
    writer = ShardWriter(folder, SHARD_BYTES, f"rank-{ranks.rank}-")
    size = sum(torch.Size(shape).numel() for shape in conversion.shapes.values()) * dtype.itemsize
    writers = min(ranks.world_size, -(-size // SHARD_BYTES))
    problem: str | None = None
    tensors = _whole_tensors(base, model, conversion, base_files)
    for turn, group in enumerate(conversion.groups):
        read = [next(tensors) for _ in group.parameters]  # collective
        if problem is None and turn % writers == ranks.rank:
            found = {name: copy(dtype) for name, copy in zip(group.parameters, read, strict=True)}
            problem = _tried(partial(_write_group, conversion, group, found, published, writer))
        del read
    problem = problem or _tried(writer.flush)
    problems, shards = zip(*ranks.gathered((problem, writer.shards)), strict=True)
    if problem := next(filter(None, problems), None):
        raise RunError(f"final/ could not be written: {problem}")
    if ranks.rank == 0:
        name_shards(folder, [shard for of_rank in shards for shard in of_rank])
        verify_whole(folder, base)
    ranks.from_first(None)


def _tried(write: Callable[[], object]) -> str | None:
    """What went wrong, in a line: the other ranks wait for this one meanwhile."""
    try:
        write()
    except (DistftError, OSError, SafetensorError) as error:
        return in_one_line(error)
    return None


def _write_group(conversion: Conversion, group: Group, found: Tensors, published: bool, writer: ShardWriter) -> None:
    """Write some parameters, which would be read as they are.

    Raises:
        RunError: they would not.
    """
    made = conversion.store([group], found) if published else found
    for name, tensor in conversion.load(group, made.__getitem__).items():
        if not torch.equal(tensor, found[name]):
            raise RunError(f"{name}: what would be saved is not what was trained")
    for name, tensor in made.items():
        writer.add(name, tensor)


def _save_adapter(model: Any, folder: Path, trained: Tensors) -> Tensors:
    """Write the adapter as peft does. Returns its tensors under peft's names."""
    rows = new_rows(model)
    if rows is None:
        model.save_pretrained(folder, state_dict=trained, save_embedding_layers=False, safe_serialization=True)
        return adapter_tensors(model, trained)
    model.peft_config["default"].trainable_token_indices = rows.peft_indices()
    model.save_pretrained(folder, state_dict=dict(trained), save_embedding_layers=False, safe_serialization=True)
    tensors = adapter_tensors(model, trained)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})  # peft's own, and the rows
    return tensors


def adapter_tensors(model: Any, trained: Tensors) -> Tensors:
    """The trained parameters of a peft model under the names that its adapter's file has for them.

    The rows of new tokens are distft's (new_rows.py), and named as peft names its own.
    """
    from peft import get_peft_model_state_dict

    rows = new_rows(model)
    if rows is None:
        return get_peft_model_state_dict(model, state_dict=dict(trained), save_embedding_layers=False)
    tensors: Tensors = get_peft_model_state_dict(model, state_dict=dict(trained), save_embedding_layers=False)
    return tensors | rows.to_peft(trained)


def unwrapped(model: Any) -> Any:
    """The transformers or peft model inside DDP or a DeepSpeed engine. FSDP2 changes a model's class in place."""
    from torch.nn.parallel import DistributedDataParallel

    while isinstance(model, DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
        model = model.module
    return model


def _whole_tensors(
    base: Any, model: Any, conversion: Conversion, base_files: Callable[[], TensorFiles] | None
) -> Iterator[Callable[[torch.dtype], torch.Tensor]]:
    """For each parameter and persistent buffer of the conversion, in its order: what copies it to the host, whole.

    Collective: every rank iterates. Frozen parameters are read from `base_files`.
    """
    whole = _whole(model)
    there = dict(base.named_parameters()) | dict(base.named_buffers())
    frozen = {name for name, p in base.named_parameters() if not p.requires_grad}
    if frozen:
        assert base_files is not None
        files = base_files()
        of_base = Conversion(twin(base), files.shapes())

    def read(name: str, _: torch.dtype) -> torch.Tensor:
        return of_base.parameter(name, files.__getitem__)

    def copied(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        tensor = tensor.detach()
        return tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

    for group in conversion.groups:
        for name in group.parameters:
            if name in frozen:
                yield partial(read, name)
            else:
                tensor = whole(there[name]) if isinstance(there[name], torch.nn.Parameter) else there[name]
                yield partial(copied, tensor)
                del tensor


def _whole(model: Any) -> Callable[[Any], torch.Tensor]:
    """What makes a trained parameter whole, on all ranks at once: under ZeRO its float32 master, no 16-bit copy."""
    if type(model).__name__ == "DeepSpeedEngine":
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param
    return lambda parameter: parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _gather(base: Any, model: Any, *, keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole tensor on the CPU of each trained parameter, one at a time.

    Collective: every rank iterates, and only the one that `keep`s the tensors gets any.
    """
    whole = _whole(model)
    for name, parameter in base.named_parameters():
        if parameter.requires_grad:
            tensor = whole(parameter)
            if keep:
                yield name, tensor.detach().to("cpu", copy=True)


def verify(folder: Path, expected: Tensors) -> None:
    """Compare the safetensors files of `folder` with `expected`: names, shapes, values.

    Raises:
        RunError: a tensor is missing, unexpected, empty, or has another shape or other values.
    """
    files = TensorFiles(sorted(folder.glob("*.safetensors")))
    problems = [f"{name}: was not trained" for name in files if name not in expected]
    for name, want in expected.items():
        problems += _difference(name, files.get(name), want)
    _report(folder, problems, expected)


def verify_whole(folder: Path, model: Any) -> None:
    """Check that transformers would load all of such a `model` from `folder`: names and shapes. The values are compared
    as they are written.

    Raises:
        RunError: as `verify`.
    """
    want = parameter_shapes(model)
    loaded = Conversion(twin(model), TensorFiles(sorted(folder.glob("*.safetensors"))).shapes())
    problems = [f"{name}: was not trained" for name in loaded.unused] + loaded.problems
    problems += [f"{name}: missing" for name in want if name not in loaded.shapes]
    problems += [
        f"{name}: shape {loaded.shapes[name]}, in memory {want[name]}"
        for name in want.keys() & loaded.shapes.keys()
        if loaded.shapes[name] != want[name]
    ]
    _report(folder, problems, want)


def _difference(name: str, have: torch.Tensor | None, want: torch.Tensor) -> list[str]:
    if have is None:
        return [f"{name}: missing"]
    if want.shape != have.shape or want.numel() == 0:
        return [f"{name}: shape {tuple(have.shape)}, in memory {tuple(want.shape)}"]
    if torch.equal(want, have):
        return []
    zero = bool(want.any()) and not bool(have.any())
    return [f"{name}: {'all zeros' if zero else 'other values'} on disk"]


def _report(folder: Path, problems: list[str], expected: Sized) -> None:
    if problems or not expected:
        shown = "\n  ".join(problems[:5] or ["nothing was trained"])
        raise RunError(f"{folder}: what was saved is not what was trained ({len(problems)} tensors):\n  {shown}")
