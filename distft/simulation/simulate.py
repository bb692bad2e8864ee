"""Memory of a rank, from one training step of the real model class on fake tensors, without weights or a GPU.

The model is built from its config on the meta device, wrapped by peft, and given fake parameters. A dispatch mode then
adds up live storages over forward, loss, backward and optimizer step. Fake tensors are on the CPU; where a GPU would
use another kernel, that one stands in (trace.py, CudaKernels). How a strategy divides the states, and what it gathers
on the way, is added by formula (distft/planner/sharding.py, memory.py).

Only some blocks are traced (depth.py). A plan needs many settings: what a step keeps grows linearly with the rows of a
micro-batch, so `Counted` traces two sizes and draws a line; the setting that is chosen in the end is traced as it is.

Approximations: all rows have max_length tokens; workspaces inside an operator are counted only for FlashAttention's
backward pass and NF4's matrices (not for cuBLAS); LLM.int8() has no outlier columns; clipping and fp16's scaler, which
are scalars, are left out; under ZeRO and FSDP the rank's share of the gradients exists all the time.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from distft.config.recipe import Recipe
from distft.errors import SimulationError
from distft.models.architecture import guess_sizes
from distft.models.attention import planned_attention
from distft.models.layout import Tensor
from distft.models.shapes import ModelShape, shape_of
from distft.planner.memory import Memory, Peaks, put_together, zero_section
from distft.planner.setting import Setting
from distft.simulation import depth
from distft.simulation.depth import Sample
from distft.simulation.fake_model import base, failure, finish, sizes_of, states_of
from distft.simulation.trace import trace

# Rows of the micro-batches between and beyond which the line is drawn. With one row there is no mask.
FEW, MORE = 2, 4


def simulate(recipe: Recipe, setting: Setting) -> Memory:
    """Memory of a rank.

    Raises:
        PlanError: the model's config cannot be read, transformers cannot build the model, or it cannot be traced.
    """
    return Counted(recipe, setting.attn_implementation).exactly(setting)


class Counted:
    """Memory of a recipe's ranks by counting (planner.memory.Estimates).

    Raises:
        SimulationError: the model's config cannot be read, or transformers cannot build the model; from its methods: it
            cannot be traced.
        PlanError: peft cannot add the adapters.
    """

    is_counted = True

    def __init__(self, recipe: Recipe, attention: str | None = None) -> None:
        self.recipe = recipe
        self.attention = attention or planned_attention(recipe.model.attn_implementation)
        model = base(recipe, self.attention)
        self.sample = depth.sample(model)
        self.plain = deepcopy(model)
        depth.prune(self.plain, self.sample)
        named = _tensors(model)
        model = finish(recipe, model, "autocast")
        self.sizes = sizes_of(recipe, model)
        self.states = states_of(recipe, model, self.sizes)
        self.model = _shape(recipe, named, model, self.sizes.trained)
        self._step = cache(self._trace)

    def memory(self, setting: Setting, max_length: int | None = None) -> Memory:
        """Memory of a rank, from the line."""
        assert max_length in (None, self.recipe.data.max_length)
        rows = setting.micro_batch_size
        regime = "autocast" if setting.kind.dtype_regime == "autocast" else "zero"  # FSDP keeps what ZeRO keeps
        how = regime, setting.gradient_checkpointing, False
        few, more = self._step(*how, FEW), self._step(*how, MORE)
        steps = (rows - FEW) / (MORE - FEW)
        earlier = self.states["gradients"] if self._accumulates(setting) else 0
        peaks = {
            moment: Counter({kind: int(low[kind] + steps * (high[kind] - low[kind])) for kind in low | high})
            for moment, low in few.items()
            if (high := more.get(moment)) is not None
        }
        for live in peaks.values():
            live["gradients"] = max(live["gradients"], earlier)
        return self._together(peaks, setting)

    def exactly(self, setting: Setting) -> Memory:
        """Memory of a rank, traced as it is."""
        how = setting.kind.dtype_regime, setting.gradient_checkpointing, self._accumulates(setting)
        return self._together(self._step(*how, setting.micro_batch_size), setting)

    def _accumulates(self, setting: Setting) -> bool:
        """Whether gradients of earlier micro-batches exist."""
        more = self.recipe.training.global_batch_size > setting.micro_batch_size * setting.world_size
        return more and setting.kind.dtype_regime == "autocast"

    def _together(self, peaks: Peaks, setting: Setting) -> Memory:
        zero = zero_section(self.recipe, setting, self.sizes)
        return put_together(self.recipe, self.sizes, self.states, peaks, setting, zero)

    def _trace(self, regime: str, checkpointing: bool, accumulating: bool, rows: int) -> Peaks:
        how = regime, checkpointing, accumulating, rows
        if self.sample.is_whole:
            return self._traced(self.plain, self.sample, *how)
        try:
            return self._traced(self.plain, self.sample, *how)
        except (SimulationError, KeyError):  # blocks that need others, or do not run in their turn
            self.plain = base(self.recipe, self.attention)
            self.sample = depth.whole(self.plain)
            return self._traced(self.plain, self.sample, *how)

    def _traced(
        self, plain: Any, sample: Sample, regime: str, checkpointing: bool, accumulating: bool, rows: int
    ) -> Peaks:
        model = finish(self.recipe, deepcopy(plain), regime)
        here = states_of(self.recipe, model, sizes_of(self.recipe, model))
        try:
            steps = trace(
                self.recipe,
                model,
                dtype_regime=regime,
                micro_batch_size=rows,
                gradient_checkpointing=checkpointing,
                attn_implementation=self.attention,
                accumulating=accumulating,
            )
        except Exception as error:  # a shape that depends on values, an operator that fake tensors lack, ...
            raise failure(self.recipe, error) from error
        if sample.is_whole:
            return steps.peaks
        return depth.extend(steps, sample, Counter({kind: self.states[kind] - here[kind] for kind in self.states}))


def _tensors(model: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The parameters of a base model, and those that are tied to one of them."""
    head = model.get_output_embeddings()
    tensors, seen = [], set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = _kind(module, path, name, tuple(parameter.shape))
            if module is head and name == "weight":
                kind = "output"
            elif id(parameter) in seen:  # blocks that share their weights (Zamba)
                continue
            seen.add(id(parameter))
            tensors.append(Tensor(f"{path}.{name}" if path else name, tuple(parameter.shape), kind))
    is_tied = head is not None and head.weight is model.get_input_embeddings().weight
    tied = tuple(t for t in tensors if t.kind == "output" and is_tied)
    return tuple(t for t in tensors if t not in tied), tied


def _kind(module: Any, path: str, name: str, shape: tuple[int, ...]) -> str:
    if name == "bias":
        return "bias"
    if len(shape) == 3 and "expert" in f"{path}.{name}":
        return "experts"
    kinds = {torch.nn.Linear: "linear", Conv1D: "conv1d", torch.nn.Embedding: "embedding"}
    found = next((kind for type_, kind in kinds.items() if isinstance(module, type_) and name == "weight"), None)
    return found or ("norm" if len(shape) == 1 else "param")


def _shape(
    recipe: Recipe, named: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], model: Any, trained: int
) -> ModelShape:
    config = model.config.to_dict()
    return shape_of(recipe, *named, guess_sizes(config), config, trained=trained)
