"""What an adapter adds to a model: peft's rules (peft/tuners/tuners_utils.py, tuners/lora/layer.py) without peft."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from distft.config.schema_text import closest, did_you_mean
from distft.errors import PlanError
from distft.models import oft
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


def changes_base(lora: Lora | None) -> bool:
    """Whether the adapter starts as a part of the base, which is taken out of it."""
    return lora is not None and str(lora.init_lora_weights).startswith(("pissa", "olora"))


def lora_parameters(lora: Lora, tensors: Iterable[Tensor], peft_experts: str | None = None) -> int:
    """Number of trainable parameters of an adapter; see `trained`."""
    return sum(sum(sizes) for _, sizes in trained(lora, tensors, peft_experts))


def trained(lora: Lora, tensors: Iterable[Tensor], peft_experts: str | None = None) -> list[Adapter]:
    """What is trained beside the frozen model with these tensors: see `adapters`, and copies (`saved`).

    Raises:
        PlanError: from both.
    """
    tensors = list(tensors)
    return [*adapters(lora, tensors, peft_experts), *((t, (t.size,)) for t in saved(lora, tensors))]


def shapes_of(lora: Lora, adapter: Adapter) -> list[tuple[int, int]]:
    """Shapes of an adapter's tensors."""
    tensor, sizes = adapter
    if lora.oft:
        return [oft.shape_of(lora.oft, tensor.features[0])]
    rank = rank_of(lora, module_of(tensor))
    return [(rank, size // rank) for size in sizes]


def saved(lora: Lora, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors of lora.modules_to_save.

    Raises:
        PlanError: as check_saved.
    """
    if not lora.modules_to_save:
        return []
    tensors = list(tensors)
    modules = {module_of(tensor): None for tensor in tensors}
    wanted = check_saved(lora, modules)
    return [tensor for tensor in tensors if module_of(tensor) in wanted]


def check_saved(lora: Lora, modules: Iterable[str]) -> frozenset[str]:
    """Names of the modules that lora.modules_to_save means.

    Args:
        modules: names of all modules with parameters of their own.

    Raises:
        PlanError: one is not there, contains others (a block, or an MLP: FSDP2 and ZeRO-3 shard these by themselves),
            or is the end of other names, too, for which peft would take it (utils/other.py, _set_trainable).
    """
    found: set[str] = set()
    modules = list(modules)
    for name in lora.modules_to_save:
        got = f"lora.modules_to_save: got {name}"
        here = [path for path in modules if f".{path}".endswith(f".{name}")]
        if not here and (inside := next((path for path in modules if f".{name}." in f".{path}"), None)):
            raise PlanError(f"{got}, which is no layer but contains some; name these, such as {inside}")
        if not here:
            near = closest(name, sorted({path.rpartition(".")[2] for path in modules}))
            raise PlanError(f"{got}, and the model has no such layer{did_you_mean(near)}")
        if other := next((path for path in modules if path.endswith(name) and path not in here), None):
            raise PlanError(f"{got}, which peft takes for {other} as well; write {here[0]}")
        found |= set(here)
    return frozenset(found)


def adapters(lora: Lora, tensors: Iterable[Tensor], peft_experts: str | None = None) -> list[Adapter]:
    """What an adapter adds to the model with these tensors (tied ones included).

    r x (in + out) elements per layer, and DoRA's magnitude vector of `out`; r x experts x (in + out) for the parameters
    of a mixture of experts, with twice the rank where two matrices became one. rsLoRA only changes the scale.
    `all-linear` is every linear layer but the output layer; a list has module names or their ends, and another string
    is a regular expression for whole names, as in peft. Layers that cannot have an adapter (models/adaptable.py) are
    left out, then those that lora.exclude_modules names, or whose block is not in lora.layers_to_transform. With
    lora.oft, a layer has what is above the diagonals of its rotations, and experts have none.

    Raises:
        PlanError: nothing matches, what matches cannot have an adapter, or an option changes nothing (check_options).
    """
    found = _adapters(lora, list(tensors), None if lora.oft else peft_experts)
    for tensor, sizes in found if lora.oft else ():
        width, path = tensor.features[0], module_of(tensor)
        if tensor.kind not in ("linear", "output"):
            what = {"conv1d": "a Conv1D", "embedding": "an embedding"}.get(tensor.kind, "a convolution")
            raise PlanError(f"lora.oft: {path} is {what}, and OFT is for linear layers; use LoRA, or name other layers")
        if not sum(sizes):
            raise PlanError(f"lora.oft: blocks of one of the {width} inputs of {path} cannot be rotated")
    return found


def _adapters(lora: Lora, tensors: list[Tensor], peft_experts: str | None) -> list[Adapter]:
    without = left_out_layers(tensors)
    check_options(lora, _targets(lora, tensors), without)
    tensors = [tensor for tensor in tensors if module_of(tensor) not in without]
    experts = EXPERTS.get(peft_experts or "", {})
    everything, is_kept = lora.target_modules == "all-linear", kept(lora)
    if everything and not experts and any(tensor.is_linear for tensor in tensors):
        return [(tensor, _sizes(lora, tensor)) for tensor in tensors if tensor.is_linear and is_kept(module_of(tensor))]
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
    is_target = matcher(sorted(targets))
    found = _of_modules(lora, tensors, lambda path: is_target(path) and is_kept(path))
    parameters = [(t, len(old)) for new, old in merged.items() for t in tensors if f".{t.name}".endswith(f".{new}")]
    options = ("use_dora", "lora_dropout", "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern")
    if parameters and (set_ := [name for name in options if getattr(lora, name) not in (None, False, 0, {})]):
        raise PlanError(
            f"lora.{set_[0]}: peft does not support it on the experts of a mixture; name other layers in "
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
    matches = bool if lora.target_modules == "all-linear" else matcher(lora.target_modules)
    is_kept = kept(lora)
    found: dict[str, list[str]] = {}
    for path, why in layers.items():
        if matches(path) and is_kept(path):
            found.setdefault(why, []).append(path)
    return found


def matcher(names: str | Sequence[str]) -> Callable[[str], object]:
    """Whether a module's whole name is meant by `names`: the ends of some, or a regular expression (peft/tuners/
    tuners_utils.py, check_target_module_exists)."""
    if isinstance(names, str):
        return re.compile(names).fullmatch
    ends = tuple(f".{name}" for name in names)
    return lambda path: f".{path}".endswith(ends)


def kept(lora: Lora) -> Callable[[str], bool]:
    """Whether a module of lora.target_modules is one that exclude_modules, modules_to_save and layers_to_transform
    leave. What has its whole name in target_modules has named its block."""
    excluded = matcher(lora.exclude_modules) if lora.exclude_modules else None
    is_saved = matcher(lora.modules_to_save)
    wanted, whole = _numbers(lora), lora.target_modules if isinstance(lora.target_modules, list) else ()

    def is_kept(path: str) -> bool:
        if (excluded and excluded(path)) or is_saved(path):
            return False
        return wanted is None or _block(path) in wanted or path in whole

    return is_kept


def _numbers(lora: Lora) -> list[int] | None:
    wanted = lora.layers_to_transform
    return [wanted] if isinstance(wanted, int) else wanted


def _block(path: str) -> int | None:
    """Number of a module's block (peft/tuners/tuners_utils.py, check_target_module_exists)."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    return int(found[1]) if found else None


def pattern_of(patterns: Iterable[str], path: str) -> str | None:
    """The first of rank_pattern's or alpha_pattern's keys that a module's name ends with (peft/utils/other.py,
    get_pattern_key)."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", path)), None)


def rank_of(lora: Lora, path: str) -> int:
    """Rank of the adapter on a module."""
    pattern = pattern_of(lora.rank_pattern, path) if lora.rank_pattern else None
    return lora.r if pattern is None else lora.rank_pattern[pattern]


def ranks_in_words(lora: Lora) -> str:
    """The kind and ranks of the adapters, and what is trained whole beside them."""
    ranks = sorted({lora.r, *lora.rank_pattern.values()})
    text = f"LoRA r {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    if lora.oft:
        text = f"{oft.kind(lora.oft)}, {oft.blocks_in_words(lora.oft)}"
    return text + (f", {', '.join(lora.modules_to_save)} whole" if lora.modules_to_save else "")


def check_options(lora: Lora, targets: Sequence[str], without: Iterable[str] = ()) -> None:
    """Check that every option which is about some of the layers is about one that is there.

    Args:
        targets: names of the modules that lora.target_modules means.
        without: names of those that cannot have an adapter.

    Raises:
        PlanError: one is not.
    """
    excludes = [lora.exclude_modules] if isinstance(lora.exclude_modules, str) else lora.exclude_modules or []
    for name in excludes:
        matches = matcher(name if isinstance(lora.exclude_modules, str) else [name])
        if not any(map(matches, targets)):
            raise PlanError(
                f"lora.exclude_modules: got {name}, which is none of the layers of lora.target_modules"
                f"{_near(name, targets)}"
            )
    wanted, without = _numbers(lora), set(without)
    have = {_block(path) for path in targets} - {None}
    if missing := [number for number in wanted or () if number not in have]:
        blocks = f"has {len(have)} with such layers, from 0" if have else "has no such blocks"
        raise PlanError(f"lora.layers_to_transform: got {missing[0]}, and the model {blocks}")
    is_kept = kept(lora)
    found = [path for path in targets if path not in without and is_kept(path)]
    options = [name for name in ("exclude_modules", "modules_to_save", "layers_to_transform") if getattr(lora, name)]
    if targets and not found and (option := next(iter(options), "")):
        raise PlanError(f"lora.{option}: leaves none of the layers of lora.target_modules")
    for option, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        used = {pattern_of(patterns, path) for path in found} if patterns else set()
        if unused := [pattern for pattern in patterns if pattern not in used]:
            raise PlanError(
                f"lora.{option}: got {unused[0]}, which is the end of no name of a layer with an adapter"
                + (" (or an earlier pattern has all of these)" if len(patterns) > 1 else "")
                + _near(unused[0], found)
            )


def _near(name: str, paths: Sequence[str]) -> str:
    """The end of a path that may have been meant, else which there are."""
    ends = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    return did_you_mean(closest(name, ends)) or (f"; these end in {', '.join(ends[:12])}" if ends else "")


def _targets(lora: Lora, tensors: Iterable[Tensor]) -> list[str]:
    """Names of the modules that lora.target_modules means."""
    if lora.target_modules == "all-linear":
        return [module_of(tensor) for tensor in tensors if tensor.is_linear]
    matches = matcher(lora.target_modules)
    return [path for t in tensors if t.kind in ADAPTABLE and matches(path := module_of(t))]


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
    matches, is_kept = matcher(pattern), kept(lora)
    return _of_modules(lora, tensors, lambda path: matches(path) and is_kept(path))


def _of_modules(lora: Lora, tensors: Sequence[Tensor], is_target: Callable[[str], object]) -> list[Adapter]:
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
    if lora.oft:
        return (prod(oft.shape_of(lora.oft, tensor.features[0])),)
    (width_in, width_out), rank = tensor.features, rank_of(lora, module_of(tensor))
    return (rank * width_in, rank * width_out, *((width_out,) if lora.use_dora else ()))


def module_of(tensor: Tensor) -> str:
    """Name of the tensor's module."""
    return tensor.name.rpartition(".")[0]


def _names(tensors: Iterable[Tensor]) -> list[str]:
    return sorted({module_of(tensor).rpartition(".")[2] for tensor in tensors if tensor.is_linear})
