"""Which layers of a model are trained and can have an adapter, by the names of its parameters.

The plan knows a model by its tensors, training by its modules; both ask here, so that they count the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

# Where models of several kinds of input keep the text side, and what else they have, in transformers and published.
_TEXT = ("language_model", "text_model")
_OTHER = ("visual", "vision_tower", "vision_model", "audio_tower", "multi_modal_projector", "embed_tokens_extend")
_OUTPUT = "lm_head"

OTHER_INPUTS = "not part of the language model, and rows are text"
_CROSS = "they attend to images, and rows are text"
_ROUTER = "routers give more than one tensor"
_GROUPED = "each group of heads has a matrix of its own in it"
_MIXER = "kernels of state-space mixers read the weights themselves"


def not_trained(names: Iterable[str]) -> dict[str, str]:
    """Regular expressions for the whole names of the modules that text does not go through, and why.

    Layers of cross attention (Llama 3.2 Vision) are skipped where there is no image.

    Args:
        names: of the model's parameters.
    """
    return dict(_not_trained(tuple(names)))


@lru_cache(maxsize=8)
def _not_trained(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    components = {part for name in names for part in name.split(".")}
    if text := next((part for part in _TEXT if part in components), None):
        found[rf"(?!(?:.*\.)?(?:{text}\.|{_OUTPUT}(?:\.|$))).*"] = OTHER_INPUTS
    elif other := [part for part in _OTHER if part in components]:
        found[rf"(?:.*\.)?(?:{'|'.join(other)})(?:\..*)?"] = OTHER_INPUTS
    gate = ".cross_attn_attn_gate"
    # The gates are parameters of the layer itself.
    found |= {rf"{re.escape(name.removesuffix(gate))}(?:\..*)?": _CROSS for name in names if name.endswith(gate)}
    return tuple(found.items())


def left_out(names: Iterable[str]) -> dict[str, str]:
    """Regular expressions for the whole names of the modules that get no adapter, and why: those that are not trained;
    routers, whose classes are Linear and return tuples (Phi-3.5-MoE, Llama 4); DeepSeek-V4's grouped output layer,
    whose result is narrower than its weight has rows; and layers of mixers of Mamba's kinds, which are known by their
    A_log and D.

    transformers' fast paths read the weights of these (modeling_mamba.py, mamba_inner_fn; modeling_mamba2.py,
    mamba_split_conv1d_scan_combined), so that an adapter would be trained on CPUs and ignored on GPUs; dt_proj's is
    read on both.
    """
    return dict(_left_out(tuple(names)))


@lru_cache(maxsize=8)
def _left_out(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found, known = not_trained(names), set(names)
    for module in sorted({name.rpartition(".")[0] for name in names}):
        if module.endswith(".router"):
            found[_any_number(module)] = _ROUTER
        if module.endswith(".o_a_proj"):
            found[_any_number(module)] = _GROUPED
        if {f"{module}.A_log", f"{module}.D"} <= known:
            found[rf"{_any_number(module)}\.(?:out_proj|x_proj|dt_proj)"] = _MIXER
    return tuple(found.items())


def _any_number(name: str) -> str:
    return re.sub(r"\d+", r"\\d+", re.escape(name))


def reason(name: str, patterns: Mapping[str, str]) -> str | None:
    """Why the module of this name is left out; None where it is not."""
    return next((why for pattern, why in patterns.items() if re.fullmatch(pattern, name)), None)
