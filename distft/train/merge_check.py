"""Whether a merged model computes what was trained: layer by layer in float32, and by its logits as it was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from distft.config.recipe import Recipe
from distft.errors import RunError
from distft.train.conversion import Conversion
from distft.train.skeleton import fill_buffers, logits, skeleton
from distft.train.tensor_files import TensorFiles

ROWS, TOKENS = 4, 32  # of the logits that are compared
# Largest difference of two float32 results, relative to the root mean square of the trained model's: sums of thousands
# of products in another order differ by some 1e-6.
TOLERANCE = 1e-4
# Rounding to 16 bit moves every merged weight by up to `unit` (half of the dtype's eps) of its size. The errors are
# independent: they move a layer's outputs by less than one `unit`, and the logits by a few, more in a deep model, which
# amplifies them. This many are allowed of the root mean square difference. It finds tensors in the wrong place, which
# move the logits by their own size; errors within a layer are found in float32, before rounding.
ROUNDING = 16


@dataclass(frozen=True)
class LogitsCheck:
    """The logits of the merged model beside the trained one's: difference and tolerance, relative to their size."""

    difference: float
    tolerance: float


def layer_inputs(base: Any) -> torch.Tensor:
    """Random inputs of a layer, the same each time."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(base, torch.nn.Embedding):
        return torch.randint(base.num_embeddings, (64,), generator=generator)
    size = base.weight.shape[0 if isinstance(base, Conv1D) else 1]
    return torch.randn(8, size, generator=generator)


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the root mean square of `expected`."""
    return ((found - expected).abs().max() / _root_mean_square(expected)).item()


def _root_mean_square(values: torch.Tensor) -> torch.Tensor:
    return values.double().pow(2).mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def check_layer(name: str, difference: float) -> None:
    """Raises RunError where the outputs of a merged layer differ too much from the trained one's."""
    if not difference <= TOLERANCE:
        raise RunError(
            f"{name}: the merged layer's outputs differ from the trained one's by {difference:.1e} of their size, "
            f"more than {TOLERANCE:.0e}"
        )


def check_logits(
    trained: Callable[[torch.Tensor], torch.Tensor], folder: Path, recipe: Recipe, dtype: torch.dtype
) -> LogitsCheck:
    """Compare the logits of the trained model, given by a function of token rows, with those of the files in `folder`.

    Both are computed in float32. If the merged weights are float32 the largest difference counts; if they were rounded
    to 16 bit, the root mean square.

    Raises:
        RunError: they differ by more than the tolerance.
    """
    files = TensorFiles(sorted(folder.glob("*.safetensors")))
    merged = skeleton(folder, recipe)
    conversion = Conversion(merged, files.shapes())
    fill_buffers(merged, conversion, files.__getitem__)
    vocabulary = merged.get_input_embeddings().weight.shape[0]
    rows = torch.randint(vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    expected = trained(rows)
    found = logits(merged, lambda name: conversion.parameter(name, files.__getitem__).float(), rows)
    if dtype == torch.float32:
        difference, tolerance = largest_difference(found, expected), TOLERANCE
    else:
        difference = (_root_mean_square(found - expected) / _root_mean_square(expected)).item()
        tolerance = ROUNDING * torch.finfo(dtype).eps / 2
    if not difference <= tolerance:
        raise RunError(
            f"the merged model's logits differ from the trained one's by {difference:.1e} of their size, more than "
            f"{tolerance:.1e} ({dtype})"
        )
    return LogitsCheck(difference, tolerance)
