"""PiSSA and OLoRA: adapters that start as a part of the base's weights, which is taken out of the base.

The base of such a run is W - s B0 A0, with the adapter's first matrices A0 and B0. These are kept in the run directory,
so that every rank and every later attempt makes the same base. What is saved is W + s (B A - B0 A0) as an adapter of
twice the rank, which is plain LoRA on the base as it is published (peft, docs/developer_guides/checkpoint.md,
"Converting the adapters to LoRA").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from distft.config.recipe import Recipe
from distft.errors import RunError
from distft.models.lora import changes_base
from distft.train.new_rows import whole_weight
from distft.train.ranks import RankGroup

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


class InitialAdapter:
    """The first matrices of a run's adapter, in `path` once they are made.

    Args:
        resumed: they were made by an earlier attempt, whose checkpoint is continued.
        each: all ranks make them, since the base is sharded already (ZeRO-3). If not, the first one does.
    """

    def __init__(
        self, path: Path, ranks: RankGroup | None = None, *, resumed: bool = False, each: bool = False
    ) -> None:
        self.path, self.ranks, self.resumed, self.each = path, ranks, resumed, each

    def add(self, wrap: Callable[[bool], Any]) -> Any:
        """A base with its adapter, and without the adapter's part. Collective.

        Args:
            wrap: adds the adapter as peft initializes it, or (False) with any weights and an untouched base.

        Raises:
            RunError: they were made, and cannot be read.
        """
        if self.resumed:
            return self._take_out(wrap(False))
        ranks = self.ranks or RankGroup()
        first, model = ranks.rank == 0, None
        if first or self.each:
            model = wrap(True)
        if first:
            pairs = [((name + _A, a), (name + _B, b)) for name, (a, b) in _layers(model)]
            tensors = {name: matrix.data.float() for pair in pairs for name, matrix in pair}
            work = self.path.with_name(f".{self.path.name}.partial")
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, work)
            work.replace(self.path)
        ranks.from_first(None)  # the file is there
        return self._take_out(wrap(False)) if model is None else model

    @torch.no_grad()
    def _take_out(self, model: Any) -> Any:
        """What peft's pissa_init and olora_init leave, from the stored matrices (tuners/lora/layer.py)."""
        tensors = self.tensors()
        for name, pair in _layers(model):
            layer, (a, b) = model.get_submodule(name), pair
            a.data.copy_(tensors[name + _A])
            b.data.copy_(tensors[name + _B])
            weight = layer.get_base_layer().weight
            with whole_weight(weight, write=True):
                rest = weight.data.float() - layer.scaling["default"] * b.data @ a.data
                weight.data.copy_(rest.to(weight.dtype))
        return model

    def tensors(self) -> dict[str, torch.Tensor]:
        """A0 and B0 of each layer, by their names in the peft model.

        Raises:
            RunError: they cannot be read.
        """
        try:
            return load_file(self.path)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.path}: the adapter's first weights, which tell its base, cannot be read ({error})"
            ) from None

    def plain(self, trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The trained tensors of the adapter as `plain_lora` has them: [A; A0] and [B, -B0]."""
        found, first = dict(trained), self.tensors()
        for name, start in first.items():
            now, is_a = trained[name].view(start.shape), name.endswith(_A)
            found[name] = torch.cat((now, start) if is_a else (now, -start), dim=0 if is_a else 1)
        return found


def plain_settings(lora: Any) -> dict[str, Any]:
    """The settings, of `lora` or of peft's LoraConfig, for twice the ranks and the same scales."""
    factor = 2**0.5 if lora.use_rslora else 2.0
    return {
        "init_lora_weights": True,
        "r": 2 * lora.r,
        "lora_alpha": factor * lora.lora_alpha,
        "rank_pattern": {pattern: 2 * rank for pattern, rank in lora.rank_pattern.items()},
        "alpha_pattern": {pattern: factor * alpha for pattern, alpha in lora.alpha_pattern.items()},
    }


def plain_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the adapter as it is saved."""
    if recipe.lora is None or not changes_base(recipe.lora):
        return recipe
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update=plain_settings(recipe.lora))})


def make_plain(config: Any) -> None:
    """The same for a LoraConfig."""
    for name, value in plain_settings(config).items():
        setattr(config, name, value)


def _layers(model: Any) -> list[tuple[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]]:
    """Name, and the two matrices, of every layer with an adapter."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    return [(name, (layer.lora_A["default"].weight, layer.lora_B["default"].weight)) for name, layer in layers]
