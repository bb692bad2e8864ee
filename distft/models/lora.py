"""What an adapter adds to a model: peft's rules (peft/tuners/tuners_utils.py, tuners/lora/layer.py) without peft."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from distft.errors import PlanError
from distft.models.adaptable import left_out, reason
from distft.models.layout import Tensor

if TYPE_CHECKING:
    from distft.config.recipe import Lora

# The weight that an adapter is put on, and the elements of each of the adapter's tensors.
Adapter = tuple[Tensor, tuple[int, ...]]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Modules that peft can put an adapter on, by the kind of their weight.
ADAPTABLE = ("linear", "conv1d", "conv2d", "output", "embedding")

# transformers 5 keeps a layer's experts in two parameters; earlier versions had three matrices per expert. For the
# families below peft takes the old names for parts of the new parameters, in all-linear too
# (peft/utils/transformers_weight_conversion.py, _MOE_TARGET_MODULE_MAPPING). Their all-linear fails in peft 0.19.
EXPERTS = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}


def lora_parameters(lora: Lora, tensors: Iterable[Tensor], peft_experts: str | None = None) -> int:
    """Number of trainable parameters of an adapter; see `adapters`."""
    return sum(sum(sizes) for _, sizes in adapters(lora, tensors, peft_experts))


def adapters(lora: Lora, tensors: Iterable[Tensor], peft_experts: str | None = None) -> list[Adapter]:
    """What an adapter adds to the model with these tensors (tied ones included).

    r x (in + out) elements per layer, and DoRA's magnitude vector of `out`; r x experts x (in + out) for the parameters
    of a mixture of experts, with twice the rank where two matrices became one. rsLoRA only changes the scale.
    `all-linear` is every linear layer but the output layer; a list has module names or their ends, and another string
    is a regular expression for whole names, as in peft. Layers that cannot have an adapter (models/adaptable.py) are
    left out.

    Raises:
        PlanError: nothing matches, or what matches cannot have an adapter.
    """
    tensors = list(tensors)
    without = left_out_layers(tensors)
    tensors = [tensor for tensor in tensors if module_of(tensor) not in without]
    experts = EXPERTS.get(peft_experts or "", {})
    everything = lora.target_modules == "all-linear"
    if everything and not experts and any(tensor.is_linear for tensor in tensors):
        return [(tensor, _sizes(lora, tensor)) for tensor in tensors if tensor.is_linear]
    if isinstance(lora.target_modules, str) and not everything:
        found = _of_pattern(lora, tensors, lora.target_modules, experts)
        if not found:
            some = next((module_of(tensor) for tensor in tensors if tensor.is_linear), "none")
            text = f"got {lora.target_modules}, which matches no layer; it must match a whole name, such as {some}"
            raise _nothing_matches(lora, without, text)
        return found
    targets = {*_names(tensors), *experts} if everything else set(lora.target_modules)
    merged: dict[str, set[str]] = {}  # parameter of the mixture → the old names that stand for it
    for target in sorted(targets):
        old = next((name for name in experts if f".{target}".endswith(f".{name}")), None)
        if old is not None:
            merged.setdefault(experts[old], set()).add(old)
            targets.remove(target)
    if len(merged.get("gate_up_proj", ())) == 1:
        pair = " and ".join(old for old, new in experts.items() if new == "gate_up_proj")
        raise PlanError(f"lora.target_modules: {pair} are one parameter here: name both or neither")
    ends = tuple(f".{target}" for target in targets)
    found = _of_modules(lora, tensors, lambda path: f".{path}".endswith(ends))
    parameters = [(t, len(old)) for new, old in merged.items() for t in tensors if f".{t.name}".endswith(f".{new}")]
    if parameters and (lora.use_dora or lora.lora_dropout):
        option = "lora.use_dora" if lora.use_dora else "lora.lora_dropout"
        raise PlanError(
            f"{option}: peft does not support it on the experts of a mixture; name other layers in "
            f"lora.target_modules: {', '.join(_names(tensors))}"
        )
    for tensor, ranks in parameters:
        number = tensor.shape[0] if tensor.kind == "experts" else 1
        found.append((tensor, tuple(lora.r * ranks * number * width for width in tensor.features)))
    if not found:
        names = ", ".join([*_names(tensors), *experts])
        text = f"got {', '.join(lora.target_modules)}, and the model has no such layer; it has {names}"
        raise _nothing_matches(lora, without, "the model has no linear layer" if everything else text)
    return found


def left_out_layers(tensors: Iterable[Tensor]) -> dict[str, str]:
    """Names of the modules that cannot have an adapter, of those that peft would take, and why."""
    tensors = list(tensors)
    patterns = left_out(tensor.name for tensor in tensors)
    if not patterns:
        return {}
    modules = {module_of(tensor): None for tensor in tensors if tensor.kind in ADAPTABLE}
    return {module: why for module in modules if (why := reason(module, patterns))}


def named_but_left_out(lora: Lora, layers: Mapping[str, str]) -> dict[str, list[str]]:
    """Those of the left out layers that lora.target_modules names, by the reason."""
    matches: Callable[[str], object]
    if lora.target_modules == "all-linear":
        matches = bool
    elif isinstance(lora.target_modules, str):
        matches = re.compile(lora.target_modules).fullmatch
    else:
        ends = tuple(f".{target}" for target in lora.target_modules)
        matches = lambda path: f".{path}".endswith(ends)  # noqa: E731
    found: dict[str, list[str]] = {}
    for path, why in layers.items():
        if matches(path):
            found.setdefault(why, []).append(path)
    return found


def _nothing_matches(lora: Lora, layers: Mapping[str, str], otherwise: str) -> PlanError:
    for why, paths in named_but_left_out(lora, layers).items():
        return PlanError(f"lora.target_modules: {paths[0]} cannot have an adapter ({why}); name other layers")
    return PlanError(f"lora.target_modules: {otherwise}")


def _of_pattern(lora: Lora, tensors: Sequence[Tensor], pattern: str, experts: Iterable[str]) -> list[Adapter]:
    """The adapters of modules whose whole name a regular expression matches (peft/utils/other.py,
    match_target_against_key)."""
    if any(experts):
        raise PlanError(
            "lora.target_modules: got a regular expression, and peft has other names for the experts of this mixture; "
            f"name layers: {', '.join([*_names(tensors), *experts])}"
        )
    matches = re.compile(pattern).fullmatch
    return _of_modules(lora, tensors, lambda path: matches(path) is not None)


def _of_modules(lora: Lora, tensors: Sequence[Tensor], is_target: Callable[[str], bool]) -> list[Adapter]:
    """The adapters of the modules whose names are targets."""
    found, seen = [], set()
    for tensor in tensors:
        if tensor.kind == "bias":
            continue
        path = module_of(tensor)
        if tensor.kind in ADAPTABLE:
            if is_target(path):
                found.append((tensor, _sizes(lora, tensor)))
            path = path.rpartition(".")[0]
        while path and path not in seen:  # the modules that contain it
            if is_target(path):
                raise PlanError(
                    f"lora.target_modules: {path} cannot have an adapter; name layers: {', '.join(_names(tensors))}"
                )
            seen.add(path)
            path = path.rpartition(".")[0]
    return found


def _sizes(lora: Lora, tensor: Tensor) -> tuple[int, ...]:
    width_in, width_out = tensor.features
    return (lora.r * width_in, lora.r * width_out, *((width_out,) if lora.use_dora else ()))


def module_of(tensor: Tensor) -> str:
    """Name of the tensor's module."""
    return tensor.name.rpartition(".")[0]


def _names(tensors: Iterable[Tensor]) -> list[str]:
    return sorted({module_of(tensor).rpartition(".")[2] for tensor in tensors if tensor.is_linear})
