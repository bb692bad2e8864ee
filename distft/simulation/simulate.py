"""Memory of a rank, from one training step of the real model class on fake tensors, without weights or a GPU.

The model is built from its config on the meta device, wrapped by peft, and given fake parameters. A dispatch mode then
adds up live storages over forward, loss, backward and optimizer step. Fake tensors are on the CPU; where a GPU would
use another kernel, that one stands in (trace.py, CudaKernels). How a strategy divides the states, and what it gathers
on the way, is added by formula (distft/planner/sharding.py, memory.py).

Only some blocks are traced (depth.py), those with long loops in short rows (loops.py), and only some steps:
planner/counting.py makes the memory of any setting from them.

Approximations: all rows have max_length tokens; workspaces inside an operator are counted only for the backward passes
of FlashAttention and softmax and for NF4's matrices (not for cuBLAS); LLM.int8() has no outlier columns; clipping and
fp16's scaler, which are scalars, are left out; under ZeRO and FSDP the rank's share of the gradients exists all the
time.
"""

from __future__ import annotations

import json
from collections import Counter
from copy import deepcopy
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from distft.config.recipe import Lora, Recipe
from distft.errors import PlanError, SimulationError
from distft.models.architecture import guess_sizes
from distft.models.attention import planned_attention
from distft.models.chunks import why_full
from distft.models.layout import Tensor
from distft.models.shapes import shape_of
from distft.planner.counting import Counted, Step
from distft.planner.memory import Memory, Peaks
from distft.planner.setting import Setting
from distft.simulation import depth, loops
from distft.simulation.depth import Sample
from distft.simulation.fake_model import base, failure, finish, sizes_of, states_of
from distft.simulation.processes import in_processes
from distft.simulation.trace import Trace, trace
from distft.train import chunked_loss


def simulate(recipe: Recipe, setting: Setting) -> Memory:
    """Memory of a rank.

    Raises:
        PlanError: the model's config cannot be read, transformers cannot build the model, or it cannot be traced.
    """
    return Counted(recipe, Traced(recipe, setting.attn_implementation)).exactly(setting)


class Traced:
    """What is counted on a recipe's model (planner.counting.Counts).

    Raises:
        SimulationError: the model's config cannot be read, or transformers cannot build the model.
        PlanError: peft cannot add the adapters.
    """

    def __init__(self, recipe: Recipe, attention: str | None = None) -> None:
        self.recipe, self.has_loops = recipe, False
        self.attention = attention or planned_attention(recipe.model.attn_implementation)
        model = base(recipe, self.attention)
        self.sample = depth.sample(model)
        self.plain = deepcopy(model)
        named = _tensors(model)
        model = finish(recipe, model, "autocast")
        depth.prune(self.plain, self.sample)
        if not self._has_the_same_adapters(model):
            self.plain = base(recipe, self.attention)
            self.sample = depth.whole(self.plain)
        self.sizes = sizes_of(recipe, model)
        self.states = states_of(recipe, model, self.sizes)
        # As a config.json has it: some classes keep numbers of labels, or dtypes.
        config = json.loads(json.dumps(model.config.to_dict(), default=str))
        self.model = shape_of(recipe, *named, guess_sizes(config), config, trained=self.sizes.trained)

    def peaks(self, *steps: Step) -> list[Peaks]:
        """See Counts."""
        found = in_processes(lambda step: (self._trace(step), self.has_loops), steps)
        self.has_loops |= any(has_loops for _, has_loops in found)
        return [peaks for peaks, _ in found]

    def _has_the_same_adapters(self, model: Any) -> bool:
        """Whether the sample's blocks get the adapters of those that they stand for: not where options of `lora` name
        blocks by their number."""
        if self.recipe.lora is None or self.recipe.lora in (Lora(r=self.recipe.lora.r), Lora(oft=self.recipe.lora.oft)):
            return True
        try:
            pruned = finish(self.recipe, deepcopy(self.plain), "autocast")
        except PlanError:  # a block that was left out is named
            return False
        return depth.are_alike(model, pruned, self.sample)

    def _trace(self, step: Step) -> Peaks:
        if self.sample.is_whole:
            return self._traced(self.plain, self.sample, step)
        try:
            return self._traced(self.plain, self.sample, step)
        except (SimulationError, KeyError):  # blocks that need others, or do not run in their turn
            self.plain = base(self.recipe, self.attention)
            self.sample = depth.whole(self.plain)
            return self._traced(self.plain, self.sample, step)

    def _is_chunked(self, step: Step) -> bool:
        """Whether the loss is; a step of ZeRO stands for all its stages."""
        stage = 3 if step.dtype_regime == "zero" else None
        base = self.plain
        return why_full(self.recipe, self.model, stage) is None and chunked_loss.obstacle(base, "ddp") is None

    def _traced(self, plain: Any, sample: Sample, step: Step) -> Peaks:
        model = finish(self.recipe, deepcopy(plain), step.dtype_regime)
        here = states_of(self.recipe, model, sizes_of(self.recipe, model))

        def traced(length: int, **options: Any) -> Trace:
            return trace(
                self.recipe.model_copy(update={"data": self.recipe.data.model_copy(update={"max_length": length})}),
                finish(self.recipe, deepcopy(plain), step.dtype_regime),
                dtype_regime=step.dtype_regime,
                micro_batch_size=step.rows,
                gradient_checkpointing=step.checkpointing,
                attn_implementation=self.attention,
                accumulating=step.accumulating,
                chunked=self._is_chunked(step),
                **options,
            )

        try:
            steps = loops.of_length(traced, self.recipe.data.max_length, self.has_loops)
        except Exception as error:  # a shape that depends on values, an operator that fake tensors lack, ...
            raise failure(self.recipe, error) from error
        self.has_loops |= steps.has_loops
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
