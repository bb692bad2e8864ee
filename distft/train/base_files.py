"""The files of a recipe's base model, and what is in them that the model lacks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from distft.config.recipe import Recipe
from distft.errors import DataError, first_line
from distft.models.quantization import disk_quantization, with_file_beside
from distft.models.start import BASE_LAYER, PREFIX
from distft.train.conversion import Conversion, Shapes, twin
from distft.train.tensor_files import TensorFiles

# Tensors that checkpoints had before transformers computed them (modeling_utils.py,
# _adjust_missing_and_unexpected_keys).
OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"(^|\.)masked_bias$", r"(^|\.)attn\.bias$")


def base_config(recipe: Recipe) -> Path:
    """The base's config.json: in a local folder, or in the hub's cache.

    Raises:
        DataError: it cannot be read.
    """
    model = recipe.model
    try:
        return Path(_cached(recipe, "config.json"))
    except OSError as error:
        raise DataError(f"model.name_or_path: {model.name_or_path} cannot be read ({first_line(error)})") from None


def base_file(recipe: Recipe, name: str) -> Path | None:
    """Another file of the base's; None where it has none."""
    found = _cached(
        recipe, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return Path(found) if found else None


def stored_quantization(recipe: Recipe) -> Mapping[str, Any]:
    """How the base's weights are stored quantized; {} for plain weights."""
    path = base_config(recipe)
    return disk_quantization(with_file_beside(json.loads(path.read_text()), path.parent))


def base_files(recipe: Recipe) -> TensorFiles:
    """The base's weights.

    Raises:
        DataError: they cannot be read.
    """
    name = recipe.model.name_or_path
    try:
        if single := _cached(recipe, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False):
            return TensorFiles([Path(single)])
        index = _cached(recipe, SAFE_WEIGHTS_INDEX_NAME)
        shards = get_checkpoint_shard_files(name, index, revision=recipe.model.revision)[0]
        return TensorFiles([Path(path) for path in shards])
    except OSError as error:
        raise DataError(f"model.name_or_path: {name} has no weights ({first_line(error)})") from None


def _cached(recipe: Recipe, file: str, **options: Any) -> Any:
    return cached_file(recipe.model.name_or_path, file, revision=recipe.model.revision, **options)


def check_missing(recipe: Recipe, model: Any, missing: set[str]) -> None:
    """Raises DataError for parameters that transformers drew at random, because nothing is stored for them."""
    lacks = [name for name, _ in model.named_parameters() if name in missing]
    if lacks:
        raise DataError(
            f"model.name_or_path: {recipe.model.name_or_path} lacks {_some(lacks)} of {_kind(model)}, which would "
            "start as random numbers; take a complete checkpoint of a causal language model (a reward model or a "
            "classifier has another last layer)"
        )


def check_shapes(recipe: Recipe, model: Any, found: Shapes, wanted: Shapes) -> None:
    """Raises DataError for a parameter that is stored with another shape than `model` wants."""
    for name in wanted:
        if found.get(name, wanted[name]) != wanted[name]:
            raise DataError(
                f"model.name_or_path: {recipe.model.name_or_path} does not fit its config.json: {name} is stored with "
                f"the shape {found[name]}, and {_kind(model)} has {wanted[name]}"
            )


def check_base_layers(recipe: Recipe, model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Take the layers that an adapter of peft's is beside out of its `tensors`: peft saves embeddings with it.

    Args:
        model: the base, which may have adapters.

    Raises:
        DataError: one is not the base's.
    """
    names = [name for name in tensors if BASE_LAYER in name]
    if not names or recipe.lora is None:
        return
    files = base_files(recipe)
    conversion = Conversion(twin(model), files.shapes())
    for name in names:
        found, own = tensors.pop(name), name.removeprefix(PREFIX).replace(BASE_LAYER, ".")
        base = conversion.parameter(own, files.__getitem__)
        if not torch.equal(base.to(found.dtype), found):
            raise DataError(
                f"lora.start_from: {recipe.lora.start_from} was trained beside another {own} than that of "
                f"{recipe.model.name_or_path}, and has it saved; name the base that it belongs to, or merge it into "
                "that one (peft's merge_and_unload) and train on the result"
            )


def check_unused(recipe: Recipe, conversion: Conversion) -> str | None:
    """What of the base's files the model has no place for; None if everything is used.

    Raises:
        DataError: these belong to a layer that the model has, or to a further block: config.json is another model's.
    """
    model = conversion.model
    patterns = (*OLD_BUFFERS, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))
    ignored = [re.compile(pattern) for pattern in patterns]
    unused = [name for name in conversion.unused if not any(pattern.search(name) for pattern in ignored)]
    wrong = [name for name in unused if _belongs(model, name)]
    if wrong or conversion.problems:
        raise DataError(
            f"model.name_or_path: {recipe.model.name_or_path} does not fit its config.json: {_kind(model)} "
            + (f"has no place for {_some(wrong)}" if wrong else f"cannot load it: {conversion.problems[0]}")
        )
    return f"not used of {recipe.model.name_or_path}: {_some(unused)}" if unused else None


def _belongs(model: Any, name: str) -> bool:
    """Whether a stored tensor without a place is of a layer that the model has, or of a block beyond its last one."""
    prefix = f"{model.base_model_prefix}."
    for path in {name, name.removeprefix(prefix), prefix + name}:
        module, parts = model, path.split(".")[:-1]
        for part in parts:
            found = module._modules.get(part)
            if found is None:
                beyond = isinstance(module, torch.nn.ModuleList) and part.isdigit() and len(module) > 0
                if beyond and not getattr(model.config.get_text_config(), "num_nextn_predict_layers", None):
                    return True
                break
            module = found
        else:
            if parts and module._parameters:
                return True
    return False


def _kind(model: Any) -> str:
    return type(model).__name__.removeprefix("FSDP")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
