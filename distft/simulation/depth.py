"""A model of which only some blocks are traced, and the memory of the whole one from that.

While block k of L runs, what is live is what ran before it left (in the forward pass: what each block below saved; in
the backward pass: what each block below still keeps, and the gradients of those above), and what the block itself
needs. Both depend only on the kinds of the blocks: on their modules, shapes and settings. So it is enough to trace one
block of each kind, with the two lowest and the highest (the outermost differ: a frozen embedding needs no gradient)
and to add up. tests/unit/test_simulate.py compares the result with a trace of all blocks: to the byte where all are
alike, within a hidden state or two where kinds alternate.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

from distft.planner.memory import Peaks
from distft.simulation.fake_model import blocks_of
from distft.simulation.trace import Segment, Trace, block_number

# Numbers of a layer, and of the one whose keys and values it reuses (Gemma 3n and 4).
NUMBERS, SHARED = ("layer_idx", "layer_id", "layer_number"), "kv_shared_layer_index"


@dataclass(frozen=True)
class Sample:
    """The blocks to trace: `chosen` of the whole model's, and for each of these the position in `chosen` that stands
    for it."""

    chosen: tuple[int, ...]
    like: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        return len(self.chosen) == len(self.like)


def whole(model: Any) -> Sample:
    """All blocks."""
    every = tuple(range(len(blocks_of(model))))
    return Sample(every, every)


def sample(model: Any) -> Sample:
    """One block of each kind, and the outermost ones."""
    blocks = list(blocks_of(model))
    kinds, goes_back = [], any(p.requires_grad for p in model.get_input_embeddings().parameters())
    trained = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    for block, is_trained in zip(blocks, trained, strict=True):
        # A frozen block keeps something where gradients go through it to what is below.
        kinds.append((goes_back, *_signature(block)))
        goes_back = goes_back or is_trained
    depth = len(blocks)
    chosen = {0, min(1, depth - 1), depth - 1}
    if len({*trained}) > 1:  # the lowest block above a trained one needs another amount than those above it
        chosen.add(max(0, depth - 2))
    chosen |= {_first(kinds, kind) for kind in kinds}
    shared = (getattr(module, SHARED, None) for block in blocks for module in block.modules())
    chosen |= {index for index in shared if index is not None}
    order = tuple(sorted(chosen))
    like = [order.index(k if k in chosen else _first(kinds, kinds[k])) for k in range(depth)]
    return Sample(order, tuple(like))


def are_alike(model: Any, pruned: Any, wanted: Sample) -> bool:
    """Whether the trained parameters of every block are those of the block of `pruned` that stands for it."""
    whole_shapes, shapes = _trained_shapes(model), _trained_shapes(pruned)
    return all(whole_shapes[k] == shapes[position] for k, position in enumerate(wanted.like))


def _trained_shapes(model: Any) -> list[list[tuple[str, Any]]]:
    return [[(name, p.shape) for name, p in block.named_parameters() if p.requires_grad] for block in blocks_of(model)]


def _first(kinds: list[tuple[Any, ...]], kind: tuple[Any, ...]) -> int:
    """The lowest block of a kind but the very lowest, if there is one."""
    return kinds.index(kind, 1) if kind in kinds[1:] else 0


def _signature(block: Any) -> tuple[Any, ...]:
    shapes = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())
    settings = tuple(
        (name, type(module).__name__, key, value)
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str)) and key not in NUMBERS
    )
    return shapes + settings


def prune(model: Any, wanted: Sample) -> None:
    """Leave only the chosen blocks in a base model, and in what its configs list for each block."""
    if wanted.is_whole:
        return
    blocks, depth = blocks_of(model), len(wanted.like)
    kept = [blocks[index] for index in wanted.chosen]
    del blocks[:]
    blocks.extend(kept)
    for position, block in enumerate(kept):
        for module in block.modules():
            for name in NUMBERS:
                if name in vars(module):
                    setattr(module, name, position)
            if getattr(module, SHARED, None) is not None:
                setattr(module, SHARED, wanted.chosen.index(getattr(module, SHARED)))
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        values = vars(config)  # assigning to a config would check it against what is not there any more
        for name, value in values.items():
            if isinstance(value, (list, tuple)) and len(value) == depth:
                values[name] = type(value)(value[index] for index in wanted.chosen)
        _replace_properties(config, wanted)
        for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            if values.get(name) == depth:
                values[name] = len(wanted.chosen)


def _replace_properties(config: Any, wanted: Sample) -> None:
    """The same for what a config computes for each block, such as Jamba's layer types."""
    kind, changed = type(config), {}
    for name in dir(kind):
        if isinstance(getattr(kind, name), property):
            with contextlib.suppress(Exception):  # such as one that is only for another kind of model
                value = getattr(config, name)
                if isinstance(value, (list, tuple)) and len(value) == len(wanted.like):
                    changed[name] = [value[index] for index in wanted.chosen]
    if changed:
        config.__class__ = type(kind.__name__, (kind,), changed)


def extend(steps: Trace, wanted: Sample, extra: Counter[str]) -> Peaks:
    """The peaks of the whole model from those of the chosen blocks.

    Args:
        extra: bytes of the blocks that were left out: gradients, buffers, and temporaries of the optimizer's step.

    Raises:
        KeyError: a block did not run in its turn.
    """
    count, like = len(wanted.chosen), wanted.like
    numbers = [block_number(position, count) for position in range(count)]
    forward = [steps.starts["forward", number] for number in numbers] + [steps.starts["loss", None]]
    end = steps.starts["end", None]
    reached = [number for number in numbers if ("backward", number) in steps.starts]
    if reached != numbers[count - len(reached) :]:
        raise KeyError("a block above others has no gradient")
    backward = [end] + [steps.starts.get(("backward", number), end) for number in numbers]
    saved = [forward[position + 1]["activations"] - forward[position]["activations"] for position in range(count)]
    kept = [backward[position + 1]["activations"] - backward[position]["activations"] for position in range(count)]
    added = [backward[position]["gradients"] - backward[position + 1]["gradients"] for position in range(count)]
    early = extra["gradients"] if forward[0]["gradients"] else 0  # those of earlier micro-batches

    def more(peak: Counter[str], activations: int, gradients: int) -> Counter[str]:
        found = Counter(peak)
        found["activations"] += activations
        found["gradients"] += gradients
        found["buffers"] += extra["buffers"]
        return found

    def beyond(sizes: list[int], block: int, position: int) -> int:
        """What the blocks below leave beyond what those below in the trace leave."""
        return sum(sizes[like[k]] for k in range(block)) - sum(sizes[:position])

    last = steps.peaks["optimizer", None]
    found: dict[Segment, Counter[str]] = {("optimizer", None): more(last, extra["optimizer step"], extra["gradients"])}
    depth = len(like)
    found["loss", None] = more(steps.peaks["loss", None], beyond(saved, depth, count), early)
    head = steps.peaks.get(("backward", None))
    if head is not None:
        found["backward", None] = more(head, beyond(kept, depth, count), early)
    for block in range(depth):
        position = like[block]
        number = numbers[position]
        found["forward", block] = more(steps.peaks["forward", number], beyond(saved, block, position), early)
        if number not in reached:
            continue
        above = sum(added[like[k]] for k in range(block + 1, depth)) - sum(added[position + 1 :])
        found["backward", block] = more(steps.peaks["backward", number], beyond(kept, block, position), early or above)
    return found
