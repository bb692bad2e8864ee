"""What is tried before the first step, so that no training ends without its result: weights, names, merge, disk."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from transformers import AutoConfig

from distft.config.recipe import Recipe
from distft.errors import DistftError, RunError
from distft.runs.directory import RunDir
from distft.train.base_files import base_files, check_unused, stored_quantization
from distft.train.conversion import Conversion, on_meta, parameter_shapes, saved_form, twin
from distft.train.mergeable import adapted, obstacles, saved_weights
from distft.train.ranks import RankGroup
from distft.train.save import adapter_tensors
from distft.units import GIB


def final_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype of a whole model in final/: its base's."""
    model = recipe.model
    config = AutoConfig.from_pretrained(
        model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return config.dtype or torch.float32


def check(recipe: Recipe, model: Any, run: RunDir, ranks: RankGroup) -> list[str]:
    """Try all that final/ needs but the values, with a model as build_model made it. Collective; the first rank tries.

    Returns:
        Warnings: what of the base is not used, and why the adapter could not be merged.

    Raises:
        RunError: final/ could not be written, or the base's files are another model's.
    """
    found: tuple[list[str], str | None] = ([], None)
    if ranks.rank == 0:
        try:
            found = _warnings(recipe, model, run), None
        except DistftError as error:
            found = [], str(error)
    warnings, problem = ranks.from_first(found)
    if problem is not None:
        raise RunError(problem)
    return warnings


def _warnings(recipe: Recipe, model: Any, run: RunDir) -> list[str]:
    base = model if recipe.lora is None else model.get_base_model()
    _check_disk(recipe, model, run)
    if recipe.lora is None:
        _check_names(model)
    else:
        _check_adapter_names(model)
    if stored_quantization(recipe):
        return ["distft merge will not be able to merge the adapter: the base is stored quantized"]
    conversion = Conversion(twin(base), base_files(recipe).shapes())
    unused = check_unused(recipe, conversion)
    warnings = [] if unused is None else [unused]
    if recipe.lora is not None and (why := obstacles(conversion, [*adapted(model), *saved_weights(model)])):
        warnings.append(f"distft merge will not be able to merge the adapter: {why[0]}")
    return warnings


def _check_disk(recipe: Recipe, model: Any, run: RunDir) -> None:
    if recipe.lora is None:
        elements = sum(torch.Size(shape).numel() for shape in parameter_shapes(model).values())
        need = elements * final_dtype(recipe).itemsize
    else:
        need = sum(torch.Size(shape).numel() * 4 for shape in _trained(model).values())
    free = shutil.disk_usage(run.path).free
    if need > free:
        raise RunError(
            f"{run.path}: final/ needs {need / GIB:.2f} GiB, and {free / GIB:.2f} GiB of this disk are free; free some "
            "of it, or set output_dir to a folder on another disk"
        )


def _check_names(model: Any) -> None:
    """A model that is saved must be the same when it is loaded: names and shapes."""
    want = parameter_shapes(model)
    loaded, _ = saved_form(model)
    if loaded.problems or loaded.unused or loaded.shapes != want:
        raise RunError(
            f"final/ could not be written: what transformers saves of {type(model).__name__} it does not load as it "
            "was; train an adapter instead (lora:)"
        )


def _check_adapter_names(model: Any) -> None:
    trained = _trained(model)
    saved = adapter_tensors(model, on_meta(trained))
    if len(saved) != len(trained):
        raise RunError(
            f"final/ could not be written: peft saves {len(saved)} of the {len(trained)} trained tensors; name other "
            "layers in lora.target_modules"
        )


def _trained(model: Any) -> dict[str, tuple[int, ...]]:
    return {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in model.named_parameters() if p.requires_grad}
