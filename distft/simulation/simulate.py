"""Memory of a rank, from one training step of the real model class on fake tensors, without weights or a GPU.

The model is built from its config on the meta device, wrapped by peft, and given fake parameters. A dispatch mode then
adds up live storages over forward, loss, backward and optimizer step. Fake tensors are on the CPU; where a GPU would
use another kernel, that one stands in (trace.py, CudaKernels). How a strategy divides the states, and what it gathers
on the way, is added by formula (distft/planner/sharding.py, memory.py).

Depth. Identical blocks need not all be traced: the live bytes while block k of L runs are linear in k and in L (each
block below adds the same activations, each above the same gradients), so the peak over all k is at one of the ends.
`simulate` traces 4 and 5 blocks, takes the two lowest and the two highest (the outermost differ: a frozen embedding
needs no gradient), and extrapolates each of these peaks linearly to the full depth. Blocks that differ in any shape or
setting (fake_model.alike) are all traced. tests/unit/test_simulate.py compares the result with the full depth, to the
byte.

Approximations: all rows have max_length tokens; workspaces inside an operator are counted only for FlashAttention's
backward pass and NF4's matrices (not for cuBLAS); LLM.int8() has no outlier columns; clipping and fp16's scaler, which
are scalars, are left out; under ZeRO and FSDP the rank's share of the gradients exists all the time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distft.config.recipe import Recipe
from distft.errors import PlanError
from distft.models.architecture import guess_sizes
from distft.models.layout import Tensor
from distft.models.shapes import ModelShape, shape_of
from distft.planner.memory import Memory, put_together, zero_section
from distft.planner.setting import Setting
from distft.planner.sharding import Sizes

if TYPE_CHECKING:
    from distft.simulation.trace import Trace

# How many blocks are traced where all are alike; see above.
DEPTHS = (4, 5)


def simulate(recipe: Recipe, setting: Setting) -> Memory:
    """Memory of a rank.

    Raises:
        PlanError: the model's config cannot be read, transformers cannot build the model, or it cannot be traced.
    """
    from distft.simulation.fake_model import alike, blocks_of, build, sizes_of
    from distft.simulation.trace import trace

    regime, attention = setting.kind.dtype_regime, setting.attn_implementation
    blocks = blocks_of(build(recipe, regime, attention, plain=True))
    depths = DEPTHS if len(blocks) > DEPTHS[-1] and alike(blocks) else (len(blocks),)
    accumulating = recipe.training.global_batch_size > setting.micro_batch_size * setting.world_size
    found = []
    for depth in depths:
        model = build(recipe, regime, attention, depth)
        sizes = sizes_of(recipe, model)
        try:
            steps = trace(
                recipe,
                model,
                dtype_regime=regime,
                micro_batch_size=setting.micro_batch_size,
                gradient_checkpointing=setting.gradient_checkpointing,
                attn_implementation=attention,
                accumulating=accumulating and regime == "autocast",
            )
        except RuntimeError as error:  # a shape that depends on values, an operator that fake tensors lack
            name, why = recipe.model.name_or_path, str(error).splitlines()[0]
            raise PlanError(
                f"model.name_or_path: {name} cannot be simulated ({why}); plan without --simulate"
            ) from error
        found.append((sizes, steps))
    sizes, steps = _to_depth(found, depths, len(blocks))
    return put_together(recipe, sizes, steps.states, steps.peaks, setting, zero_section(recipe, setting, sizes))


def _to_depth(found: list[tuple[Sizes, Trace]], depths: tuple[int, ...], depth: int) -> tuple[Sizes, Trace]:
    """Extrapolate the results of two depths linearly to the full one."""
    (sizes, steps), (sizes_below, below) = found[-1], found[0]
    more = depth - depths[-1]
    if more == 0:
        return sizes, steps

    def line(low: Any, high: Any) -> Any:
        if isinstance(high, Counter):
            return Counter({kind: line(low[kind], high[kind]) for kind in high | low})
        return high + more * (high - low)

    growing = ("parameters", "frozen_bytes", "trained", "small_bytes", "bnb_bytes")
    sizes = replace(sizes, **{key: line(getattr(sizes_below, key), getattr(sizes, key)) for key in growing})
    peaks = {key: line(below.peaks[key], steps.peaks[key]) for key in steps.peaks if key in below.peaks}
    return sizes, replace(steps, peaks=peaks, states=line(below.states, steps.states))


def model_shape(recipe: Recipe) -> ModelShape:
    """The shape of any model that transformers can build from its config.

    Raises:
        PlanError: it cannot build this one.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    from distft.simulation.fake_model import build

    model = build(recipe, "autocast", "eager", plain=True)
    head, kinds = model.get_output_embeddings(), {torch.nn.Linear: "linear", Conv1D: "conv1d"}
    kinds |= {torch.nn.Embedding: "embedding"}
    tensors = []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = "bias" if name == "bias" else kinds.get(type(module), "norm" if parameter.dim() == 1 else "param")
            if module is head and name == "weight":
                kind = "output"
            tensors.append(Tensor(f"{path}.{name}" if path else name, tuple(parameter.shape), kind))
    tied = tuple(t for t in tensors if t.kind == "output") if head is not None and _is_tied(model, head) else ()
    config = model.config.to_dict()
    return shape_of(recipe, tuple(t for t in tensors if t not in tied), tied, guess_sizes(config), config)


def _is_tied(model: Any, head: Any) -> bool:
    return head.weight is model.get_input_embeddings().weight
