"""Which parameters are trained where there are no adapters: those of training.train_only that text goes through.

The plan knows a model by its tensors, training by its parameters; both ask here, so that they count the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from distft.config.schema_text import closest, did_you_mean, show
from distft.errors import PlanError
from distft.models.adaptable import not_trained, reason

_LAYER = re.compile(r"(.*?\.)(\d+)(\..*)")
# They only choose experts, and no gradient reaches them: modeling_afmoe.py, modeling_ernie4_5_moe.py and others make
# them with requires_grad=False, which from_pretrained forgets.
_CHOOSES_EXPERTS = re.compile(r".*\.(?:expert_bias|e_score_correction_bias)")


def other_inputs(names: Iterable[str]) -> frozenset[str]:
    """The parameters that text does not go through, which are never trained."""
    names = list(names)
    patterns = not_trained(names)
    return frozenset(name for name in names if patterns and reason(name.rpartition(".")[0], patterns))


def without_gradient(names: Iterable[str]) -> frozenset[str]:
    """The parameters that no gradient reaches."""
    return frozenset(filter(_CHOOSES_EXPERTS.fullmatch, names))


def named(
    names: Iterable[str], train_only: Sequence[str], shared: Mapping[str, str] | None = None
) -> frozenset[str] | None:
    """The parameters that training.train_only names; None where it is empty, and names all.

    An entry is a regular expression for the whole name of a parameter, or of a module that contains it. A layer's
    number may also be counted from the end: `model.layers.-1`.

    Args:
        names: of all parameters, of a shared one once.
        shared: another name of a parameter → the one among `names`.

    Raises:
        PlanError: an entry names nothing that could be trained.
    """
    if not train_only:
        return None
    names = list(names)
    known = {name: name for name in names} | dict(shared or {})
    known |= {other: known[name] for name, other in _from_the_end(known)}
    untrained = other_inputs(names)
    found: set[str] = set()
    for pattern in train_only:
        matches = re.compile(rf"(?:{pattern})(?:\..*)?").fullmatch
        here = {known[name] for name in known if matches(name)}
        got = f"training.train_only: got {show(pattern)}"
        if not here:
            raise PlanError(f"{got}, which names no parameter{_near(pattern, names)}")
        if here <= untrained:
            raise PlanError(f"{got}, which text does not go through; rows are text")
        if here <= without_gradient(here):
            raise PlanError(f"{got}, which no gradient reaches: it only chooses experts")
        found |= here
    return frozenset(found)


def frozen(names: Iterable[str], chosen: frozenset[str] | None) -> frozenset[str]:
    """The parameters that are not trained. `chosen` is what `named` returns."""
    names = list(names)
    left = frozenset(names) - chosen if chosen is not None else frozenset()
    return other_inputs(names) | without_gradient(names) | left


def _from_the_end(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each parameter of a numbered layer, and its name with the number counted from the end."""
    names = list(names)
    count = _layers(names)
    for name in names:
        if match := _LAYER.fullmatch(name):
            yield name, f"{match[1]}{int(match[2]) - count[match[1]]}{match[3]}"


def _layers(names: Iterable[str]) -> dict[str, int]:
    """What stands before the number of a layer → how many layers there are."""
    count: dict[str, int] = {}
    for match in filter(None, map(_LAYER.fullmatch, names)):
        count[match[1]] = max(count.get(match[1], 0), int(match[2]) + 1)
    return count


def _near(pattern: str, names: Sequence[str]) -> str:
    """What may have been meant: a name with that in it, or one that is spelled alike; else what the model has."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    inside = next((name for name in (*modules, *names) if re.search(pattern, name)), None)
    if inside is not None:
        return f"; it must match the whole name of a parameter or of a module that has it, such as {inside}"
    stacks = [f"{before}0 to {before}{count - 1}" for before, count in _layers(names).items()]
    others = [module for module in modules if not _LAYER.fullmatch(f"{module}.")]
    near = did_you_mean(closest(pattern.replace("\\", ""), others, 0.75))
    return near or f"; the model has {', '.join([*stacks, *others][:6])}"
