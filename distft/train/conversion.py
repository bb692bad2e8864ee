"""transformers' conversion between the tensors in a checkpoint's files and the parameters of its model, both ways.

Files of many families hold other tensors than transformers' models: experts one by one, projections joined, other
prefixes (transformers core_model_loading.py, convert_and_load_state_dict_in_model and revert_weight_conversion). Here
the same is done group by group, so that models that are larger than memory can be converted.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations import deepspeed

Tensors = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Group:
    """Parameters (or buffers) of a model, and the stored tensors that they are made of: mostly one and one."""

    parameters: tuple[str, ...]
    stored: tuple[str, ...]


class Conversion:
    """How stored tensors of these shapes become the parameters of `model`, which may be on the meta device.

    Attributes:
        groups: in the order of the stored names.
        shapes: of the parameters and buffers that are stored.
        unused: stored tensors that are no part of the model.
        problems: what transformers could not make of the stored tensors, one sentence each.
    """

    def __init__(self, model: Any, stored: Shapes):
        self.model = model
        self.groups: list[Group] = []
        self.unused: list[str] = []
        self.problems: list[str] = []
        self._transforms = get_model_conversion_mapping(model)
        # By the first parameter that they make: the transform (None: just a name), and stored names → its patterns.
        self._of: dict[str, tuple[Any, dict[str, str]]] = {}
        self._sort(stored)
        shapes: dict[str, tuple[int, ...]] = {}
        for first, (_, patterns) in self._of.items():
            try:
                made = self._convert(first, on_meta({name: stored[name] for name in patterns}))
            except Exception as error:  # any, of operations that get what they were not written for
                self.problems.append(f"{first} cannot be made of {next(iter(patterns))} ({error})")
                continue
            self.groups.append(Group(tuple(made), tuple(patterns)))
            shapes |= {name: tuple(tensor.shape) for name, tensor in made.items()}
        self.shapes: Shapes = shapes
        self.group_of = {name: group for group in self.groups for name in group.parameters}
        self.tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}  # parameter → its source

    def _sort(self, stored: Iterable[str]) -> None:
        """Find which stored tensors belong together, as convert_and_load_state_dict_in_model does."""
        renamings = [entry for entry in self._transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._transforms if isinstance(entry, WeightConverter)]
        of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        names, prefix = dict.fromkeys(self.model.state_dict(), True), self.model.base_model_prefix
        for name in sorted(stored, key=dot_natural_key):
            found, pattern = rename_source_key(name, renamings, converters, prefix, names)
            if found not in names and name in names:
                found, pattern = rename_source_key(name, [], [], prefix, names)
            if found not in names:
                self.unused.append(name)
                continue
            transform = None if pattern is None else of_pattern[pattern]
            self._of.setdefault(found, (transform, {}))[1][name] = pattern or name

    def _convert(self, first: str, tensors: Tensors) -> Tensors:
        transform, patterns = self._of[first]
        if transform is None:
            return {first: next(iter(tensors.values()))}
        transform = copy.deepcopy(transform)
        for name, tensor in tensors.items():
            transform.add_tensor(first, name, patterns[name], tensor)
        made = transform.convert(first, model=self.model, config=self.model.config)
        return {name: found[0] if isinstance(found, list) else found for name, found in made.items()}

    @property
    def transforms(self) -> list[Any]:
        """transformers' own objects, those that did something."""
        return [transform for transform in self._transforms if transform.was_used()]

    def load(self, group: Group, read: Read) -> Tensors:
        """The parameters of a group, from its stored tensors."""
        return self._convert(group.parameters[0], {name: read(name) for name in group.stored})

    def store(self, groups: Iterable[Group], tensors: Tensors) -> Tensors:
        """The stored tensors of whole groups, from their parameters.

        Raises:
            ValueError: the conversion cannot be undone.
        """
        self.model._weight_conversions = self.transforms
        want = {name for group in groups for name in group.stored}
        prefix = f"{self.model.base_model_prefix}."  # files of a base model have it before their names, or not
        made: Tensors = {}
        for name, tensor in revert_weight_conversion(self.model, tensors).items():
            found = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in want), name)
            made[found] = tensor
        if different := sorted(made.keys() ^ want):
            raise ValueError(f"transformers' conversion of {different[0]} cannot be undone")
        return made

    def source(self, name: str) -> str:
        """The parameter that has the values of this one: of tied ones, that which is stored."""
        names = (self.tied.get(name, name), name, *(target for target, source in self.tied.items() if source == name))
        return next((found for found in names if found in self.group_of), name)

    def parameter(self, name: str, read: Read) -> torch.Tensor:
        """One parameter, from its stored tensors; KeyError if there are none."""
        found = self.source(name)
        return self.load(self.group_of[found], read)[found]

    def missing(self) -> list[str]:
        """Parameters that nothing is stored for."""
        return [name for name, _ in self.model.named_parameters() if self.source(name) not in self.group_of]


def on_meta(shapes: Shapes) -> Tensors:
    """Tensors of these shapes without values."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def twin(model: Any) -> Any:
    """The same transformers model on the meta device, whatever wraps or shards this one."""
    kind: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with without_weights():
        return kind(copy.deepcopy(model.config))


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Have transformers make models on the meta device, and without DeepSpeed's zero.Init, which is collective: one
    rank makes a twin."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        with torch.device("meta"):
            yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def parameter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Whole shapes of all parameters, tied ones once, and persistent buffers: what a whole model's files hold."""
    persistent = model.state_dict().keys()
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    found = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    found |= {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in persistent}
    return {name: shape for name, shape in found.items() if name not in ignored}


def saved_form(model: Any) -> tuple[Conversion, bool]:
    """How a model that was loaded is saved, and whether that is under the names of the files that it was loaded from.

    Where their conversion cannot be undone, transformers' own names are stored; they are loaded, too.
    """
    want = parameter_shapes(model)
    try:
        stored = revert_weight_conversion(model, on_meta(want))
        found = Conversion(twin(model), {name: tuple(tensor.shape) for name, tensor in stored.items()})
        for group in found.groups:  # as it is saved
            found.store([group], on_meta({name: found.shapes[name] for name in group.parameters}))
    except Exception:  # as above
        return Conversion(twin(model), want), False
    if found.problems or found.unused or found.shapes != want:
        return Conversion(twin(model), want), False
    return found, True
