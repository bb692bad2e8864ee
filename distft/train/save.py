"""Writes what was trained into a folder that peft or transformers loads, reads it back and compares it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from distft.errors import RunError
from distft.models.lora import ADAPTER_WEIGHTS
from distft.train.conversion import Conversion, Tensors, parameter_shapes, saves_as_published, twin
from distft.train.initial import InitialAdapter, make_plain
from distft.train.new_rows import new_rows
from distft.train.tensor_files import TensorFiles


def save_trained(
    model: Any,
    folder: Path,
    *,
    tokenizer: Any,
    writes: bool,
    dtype: torch.dtype | None,
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

    Collective: all ranks call it with the wrapped model; the one that `writes` writes. The folder appears complete or
    not at all.

    Raises:
        RunError: what is on disk is not what was in memory.
    """
    base = unwrapped(model)
    adapter = hasattr(base, "peft_config")
    trained = dict(_gather(base, model, keep=writes))
    if not writes:
        return
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if adapter:
        if initial is not None:
            trained = initial.plain(trained)
            make_plain(base.peft_config["default"])
        expected = _save_adapter(base, work, trained)
        if len(expected) != len(trained):
            raise RunError(f"{folder}: peft saves {len(expected)} of the {len(trained)} trained tensors")
    else:
        trained = {name: t.to(dtype) if t.is_floating_point() else t for name, t in trained.items()}
        trained |= _frozen(base, base_files)
        base.config.dtype = dtype
        published = saves_as_published(base)
        base.save_pretrained(work, state_dict=dict(trained), safe_serialization=True, save_original_format=published)
    tokenizer.save_pretrained(work)
    if adapter and generation_config:
        base.generation_config.save_pretrained(work)
    if settings is not None:
        settings(work)
    if card is not None:
        (work / "README.md").write_text(card)  # replaces peft's, which has nothing in it
    for path in work.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes files that only their owner can read
    if adapter:
        verify(work, expected)
    else:
        verify_whole(work, base, {name: trained[name] for name in parameter_shapes(base)})
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)


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


def _frozen(model: Any, base_files: Callable[[], TensorFiles] | None) -> Tensors:
    """The parameters of a whole model that are not trained, as they are in the base's files."""
    names = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if not names:
        return {}
    assert base_files is not None
    files = base_files()
    conversion = Conversion(twin(model), files.shapes())
    return {name: conversion.parameter(name, files.__getitem__) for name in names}


def _gather(base: Any, model: Any, *, keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and full tensor on the CPU of each trained parameter, one at a time; for a whole model, of persistent
    buffers too.

    Collective: every rank iterates, and only the one that `keep`s the tensors gets any. Tied weights come once, as
    transformers saves them.
    """
    zero = type(model).__name__ == "DeepSpeedEngine"
    if zero:
        from deepspeed.utils import safe_get_full_fp32_param
    for name, parameter in base.named_parameters():
        if not parameter.requires_grad:
            continue
        if zero:
            tensor = safe_get_full_fp32_param(parameter)  # the float32 master, not the 16-bit working copy
        elif hasattr(parameter, "full_tensor"):
            tensor = parameter.full_tensor()
        else:
            tensor = parameter
        if keep:
            yield name, tensor.detach().to("cpu", copy=True)
    if keep and not hasattr(base, "peft_config"):
        persistent = base.state_dict().keys()
        for name, buffer in base.named_buffers():
            if name in persistent:
                yield name, buffer.detach().to("cpu", copy=True)


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


def verify_whole(folder: Path, model: Any, expected: Tensors) -> None:
    """Compare what transformers would load from `folder` into such a `model` with its parameters, as they are expected.

    Raises:
        RunError: as `verify`.
    """
    files = TensorFiles(sorted(folder.glob("*.safetensors")))
    conversion = Conversion(twin(model), files.shapes())
    problems = [f"{name}: was not trained" for name in conversion.unused] + conversion.problems
    for group in conversion.groups:
        for name, have in conversion.load(group, files.__getitem__).items():
            if name in expected:
                problems += _difference(name, have, expected[name])
            elif name not in conversion.tied:
                problems.append(f"{name}: was not trained")
    problems += [f"{name}: missing" for name in expected if name not in conversion.group_of]
    _report(folder, problems, expected)


def _difference(name: str, have: torch.Tensor | None, want: torch.Tensor) -> list[str]:
    if have is None:
        return [f"{name}: missing"]
    if want.shape != have.shape or want.numel() == 0:
        return [f"{name}: shape {tuple(have.shape)}, in memory {tuple(want.shape)}"]
    if torch.equal(want, have):
        return []
    zero = bool(want.any()) and not bool(have.any())
    return [f"{name}: {'all zeros' if zero else 'other values'} on disk"]


def _report(folder: Path, problems: list[str], expected: Tensors) -> None:
    if problems or not expected:
        shown = "\n  ".join(problems[:5] or ["nothing was trained"])
        raise RunError(f"{folder}: what was saved is not what was trained ({len(problems)} tensors):\n  {shown}")
