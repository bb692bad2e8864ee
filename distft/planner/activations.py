"""What a training step keeps beside the states: polynomials in a model's sizes, by family and mode.

The table is activations.txt, which distft/train/activation_table.py makes of the real classes. Symbols: T tokens of a
micro-batch, s tokens of a row, h hidden size, q and kv the widths of queries and of keys, a heads, d head size, f MLP,
V words, r LoRA's rank; of a mixture m one expert's MLP, n its shared MLP, e experts, k experts of a token. Coefficients
are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.planner.families import FAMILIES

if TYPE_CHECKING:
    from distft.planner.memory import Setting
    from distft.planner.model_shapes import ModelShape
    from distft.recipe import Recipe

FILE = Path(__file__).parent / "activations.txt"
MOMENTS = ("base", "saved", "forward", "loss", "head", "top", "bottom")

Polynomial = dict[str, int]  # monomial → bytes


@dataclass(frozen=True)
class Mode:
    """What changes what a step keeps."""

    layout: str  # autocast (DDP) | low (ZeRO and FSDP compute in 16 bit) | float32
    adapters: str  # full | lora | nf4 | int8
    attention: str  # flash | masked | eager
    checkpointing: bool

    @property
    def key(self) -> str:
        return f"{self.layout} {self.adapters} {self.attention} {'recompute' if self.checkpointing else 'keep'}"


def symbols(sizes: Any, tokens: int, row: int, rank: int) -> dict[str, int]:
    """The value of every monomial for a model's sizes."""
    a, d = sizes.num_attention_heads, sizes.head_dim
    one = {
        "h": sizes.hidden_size,
        "q": a * d,
        "kv": sizes.num_key_value_heads * d,
        "f": sizes.intermediate_size,
        "V": sizes.vocab_size,
        "r": rank,
        "a": a,
        "d": d,
    }
    if sizes.experts:
        experts, k = sizes.experts, sizes.experts.num_experts_per_tok
        one |= {"e": experts.num_experts, "m": experts.intermediate_size, "n": experts.shared_intermediate_size}
        one |= {"k": k, "k·h": k * one["h"], "k·m": k * experts.intermediate_size, "k·f": k * one["f"]}
    one = {name: value for name, value in one.items() if value}
    found = {
        "T": tokens,
        "s·d": row * d,
        "s·h": row * one["h"],
        "s·s": row * row,
        "T·s": tokens * row,
        "a·T·s": a * tokens * row,
    }
    found |= {f"T·{name}": tokens * value for name, value in one.items()}
    for name in ("q", "kv", "f", "V", "h", "m", "n"):
        if name in one:
            found[f"h·{name}"] = one["h"] * one[name]
            found[f"r·{name}"] = rank * one[name]
    if sizes.experts:
        found |= {f"e·{name}": one["e"] * found[name] for name in ("h·m", "r·h", "r·m")}
    return found


def kept_in_backward(saved: Polynomial, checkpointing: bool) -> Polynomial:
    """What the backward pass still has of `saved`: autocast's 16-bit copies of weights end with the forward pass, but
    for those that operators kept; under checkpointing there are none."""
    return {name: size for name, size in saved.items() if "T" in name} if checkpointing else saved


def mode_of(recipe: Recipe, setting: Setting) -> Mode:
    """The table's mode for a run."""
    low = recipe.training.mixed_precision != "no"
    layout = ("autocast" if setting.layout == "autocast" else "low") if low else "float32"
    attention = {"flash_attention_2": "flash", "eager": "eager"}.get(setting.attn_implementation, "masked")
    if attention == "masked" and low and not needs_mask(recipe, setting):
        attention = "flash"  # what SDPA takes where there is no mask
    adapters = (recipe.model.quantization or "lora") if recipe.lora else "full"
    return Mode(layout, adapters, attention, setting.gradient_checkpointing)


def needs_mask(recipe: Recipe, setting: Setting) -> bool:
    """SDPA: packed rows hold several documents, and rows of several lengths are padded."""
    return recipe.data.packing or setting.micro_batch_size > 1


@lru_cache
def polynomials(family: str, mode: Mode) -> dict[str, list[Polynomial]]:
    """Moment → what may be its peak; an unknown family is taken for Llama's, a mode that a family lacks (SDPA with
    Gemma 2's soft-capping) for its eager one."""
    family = family if family in FAMILIES else "llama"
    for line in _lines():
        key, families, *moments = line.split("|")
        if key == mode.key and family in families.split():
            parts = (moment.partition(":") for moment in moments)
            return {name: [_parse(text) for text in peaks.split(";")] for name, _, peaks in parts}
    if mode.attention == "flash":
        masked = polynomials(family, replace(mode, attention="masked"))
        return {name: [_unmasked(p) for p in alternatives] for name, alternatives in masked.items()}
    if mode.attention != "eager":
        return polynomials(family, replace(mode, attention="eager"))
    return polynomials("llama", mode)


def _unmasked(polynomial: Polynomial) -> Polynomial:
    return {name: size for name, size in polynomial.items() if name not in ("T·s", "s·s")}


@lru_cache
def _lines() -> tuple[str, ...]:
    return tuple(FILE.read_text(encoding="utf-8").splitlines())


def _parse(text: str) -> Polynomial:
    words = text.split()
    return {name: float(size) for size, name in zip(words[::2], words[1::2], strict=True)}


def write(found: dict[tuple[str, Mode], dict[str, list[Polynomial]]]) -> str:
    """The table as text: a line for each mode and all families that are alike in it."""
    alike: dict[tuple[str, str], list[str]] = {}
    for (family, mode), moments in found.items():
        text = "|".join(
            f"{name}:" + ";".join(" ".join(f"{size:g} {symbol}" for symbol, size in p.items()) for p in moments[name])
            for name in MOMENTS
        )
        alike.setdefault((mode.key, text), []).append(family)
    return "".join(f"{key}|{' '.join(families)}|{text}\n" for (key, text), families in alike.items())


def peaks(recipe: Recipe, model: ModelShape, setting: Setting, row: int) -> dict[str, tuple[int, int]]:
    """Moment → bytes at its peak, of rows of `row` tokens: (all but logits, logits). {} where the model's sizes are not
    known."""
    sizes = model.sizes
    if not (sizes.hidden_size and sizes.num_hidden_layers and sizes.num_attention_heads and sizes.vocab_size):
        return {}
    mode = mode_of(recipe, setting)
    table = polynomials(model.model_type or "", mode)
    value = symbols(sizes, setting.micro_batch_size * row, row, recipe.lora.r if recipe.lora else 1)
    if not needs_mask(recipe, setting):
        value["T·s"] = value["s·s"] = 0
    base, (saved,) = table["base"][0], table["saved"]
    kept, depth = kept_in_backward(saved, mode.checkpointing), sizes.num_hidden_layers
    found = {}
    for moment in MOMENTS[2:]:
        each = saved if moment in ("forward", "loss") else kept
        times = {"forward": depth - 1, "bottom": 1}.get(moment, depth)
        found[moment] = max(
            (_evaluate(value, ((base, 1), (each, times), (peak, 1))) for peak in table[moment]), key=sum
        )
    return found


def _evaluate(value: dict[str, int], parts: tuple[tuple[Polynomial, int], ...]) -> tuple[int, int]:
    total = {True: 0.0, False: 0.0}
    for polynomial, times in parts:
        for name, size in polynomial.items():
            total[name == "T·V"] += times * size * value.get(name, 0)
    return int(total[False]), int(total[True])
