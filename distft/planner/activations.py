"""What a training step keeps besides the states: polynomials in a model's sizes, by family and mode.

The table is activations.txt, which simulation/activation_table.py generates from the real classes. Symbols: T tokens of
a micro-batch, s tokens of a row, h hidden size, q and kv the widths of queries and keys, a heads, d head size, f MLP, V
vocabulary, r LoRA's rank; in a mixture of experts m one expert's MLP, n the shared MLP, e experts, k experts a token.
Coefficients are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.models.attention import UNPADDED
from distft.models.chunks import chunk_tokens, head_is_trained, why_full
from distft.models.lora import module_of, rank_of
from distft.models.oft import blocks_of

if TYPE_CHECKING:
    from distft.config.recipe import Oft, Recipe
    from distft.models.architecture import Sizes
    from distft.models.layout import Tensor
    from distft.models.shapes import ModelShape
    from distft.planner.setting import Setting

FILE = Path(__file__).parent / "activations.txt"
MOMENTS = ("base", "saved", "forward", "loss", "head", "top", "bottom")
ATTENTIONS = ("flash", "masked", "eager")  # least memory first

Polynomial = dict[str, float]  # monomial → bytes


@dataclass(frozen=True)
class Mode:
    """Everything but sizes that changes what a step keeps."""

    dtype_regime: str  # autocast (DDP) | low (ZeRO and FSDP compute in 16 bit) | float32
    adapters: str  # full | lora | nf4 | int8
    attention: str  # flash | masked | eager
    checkpointing: bool

    @property
    def key(self) -> str:
        return (
            f"{self.dtype_regime} {self.adapters} {self.attention} {'checkpointing' if self.checkpointing else 'keep'}"
        )


def symbols(sizes: Any, tokens: int, row: int, rank: int) -> dict[str, int]:
    """The value of every monomial for a model's `Sizes`, none of which is None."""
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
        found |= {f"e·{name}": one["e"] * found[name] for name in ("h·m", "r·h", "r·m") if name in found}
    return found


def filled(sizes: Sizes) -> Sizes:
    """The sizes of an unknown family, with a usual value for each that its config.json does not say: what is planned
    with them is a guess."""
    h, experts = sizes.hidden_size or 0, sizes.experts
    heads = sizes.num_attention_heads or max(1, h // 128)
    return replace(
        sizes,
        num_attention_heads=heads,
        num_key_value_heads=sizes.num_key_value_heads or heads,
        head_dim=sizes.head_dim or h // heads,
        intermediate_size=sizes.intermediate_size
        or (experts and experts.num_experts_per_tok * experts.intermediate_size)
        or 4 * h,
        vocab_size=sizes.vocab_size or 1,
    )


def kept_in_backward(saved: Polynomial, checkpointing: bool) -> Polynomial:
    """What of `saved` the backward pass still has. After the forward pass autocast's 16-bit copies of weights are gone,
    except those that operators kept; under checkpointing there are none."""
    return {name: size for name, size in saved.items() if "T" in name} if checkpointing else saved


def mode_of(recipe: Recipe, setting: Setting) -> Mode:
    """The table's mode for a run."""
    low = recipe.training.mixed_precision != "no"
    regime = (
        ("autocast" if setting.kind.regime(recipe.training.is_pure_bf16) == "autocast" else "low") if low else "float32"
    )
    attention = {"eager": "eager"}.get(setting.attn_implementation, "masked")
    if setting.attn_implementation in UNPADDED:
        attention = "flash"
    if attention == "masked" and low and not needs_mask(recipe, setting):
        attention = "flash"  # what SDPA takes where there is no mask
    adapters = (recipe.model.quantization or "lora") if recipe.lora else "full"
    if recipe.lora and recipe.lora.oft:
        adapters = "lora"  # peft casts what it rotates in the same way on a quantized layer
    return Mode(regime, adapters, attention, setting.gradient_checkpointing)


def needs_mask(recipe: Recipe, setting: Setting) -> bool:
    """Whether SDPA needs a mask: packed rows hold several documents, and rows of different lengths are padded."""
    return recipe.data.packs or setting.micro_batch_size > 1


@lru_cache
def polynomials(family: str, mode: Mode) -> dict[str, list[Polynomial]]:
    """Moment → what may be its peak. Where a family lacks a mode, a costlier one stands in (SDPA without its mask for
    FlashAttention, eager for Gemma 2's SDPA); for an unknown family, Llama."""
    # The language model of Gemma 3 is the same with and without images.
    family = "gemma3_text" if family == "gemma3" else family
    for name, regime in ((family, mode.dtype_regime), (family, "low"), ("llama", mode.dtype_regime)):
        for attention in ATTENTIONS[ATTENTIONS.index(mode.attention) :]:
            if found := _table().get((replace(mode, dtype_regime=regime, attention=attention).key, name)):
                without = ("T·s", "s·s") if mode.attention == "flash" and attention == "masked" else ()
                return {
                    moment: [_parse(text, without) for text in peaks.split(";")]
                    for moment, _, peaks in (part.partition(":") for part in found.split("|"))
                }
    raise AssertionError(f"{FILE} has no {mode.key}")


@lru_cache
def _table() -> dict[tuple[str, str], str]:
    """(mode, family) → its moments."""
    found = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        key, families, moments = line.split("|", 2)
        found.update(dict.fromkeys(((key, family) for family in families.split()), moments))
    return found


def _parse(text: str, without: tuple[str, ...]) -> Polynomial:
    words = text.split()
    return {name: float(size) for size, name in zip(words[::2], words[1::2], strict=True) if name not in without}


HEADER = """\
# Bytes that a training step keeps besides the states: mode|families|moment:polynomial;...|... (see activations.py).
# Generated by `make activations` (python -m distft.simulation.activation_table) from the classes of {versions}.
"""
MADE_WITH = ("transformers", "torch", "peft")  # the packages whose classes are traced


def write(found: dict[tuple[str, Mode], dict[str, list[Polynomial]]], versions: Mapping[str, str]) -> str:
    """The table as text: a line for each mode and all families that are alike in it.

    Args:
        versions: of the packages in MADE_WITH.
    """
    made_with = ", ".join(f"{name} {'.'.join(versions[name].split('.')[:2])}" for name in MADE_WITH)
    alike: dict[tuple[str, str], list[str]] = {}
    for (family, mode), moments in found.items():
        text = "|".join(
            f"{name}:" + ";".join(" ".join(f"{size:g} {symbol}" for symbol, size in p.items()) for p in moments[name])
            for name in MOMENTS
        )
        alike.setdefault((mode.key, text), []).append(family)
    lines = (f"{key}|{' '.join(families)}|{text}\n" for (key, text), families in alike.items())
    return HEADER.format(versions=made_with) + "".join(lines)


def peaks(
    recipe: Recipe,
    model: ModelShape,
    setting: Setting,
    row: int,
    chosen: frozenset[str],
    block: list[Tensor],
    bare: tuple[int, int] = (0, 0),
) -> dict[str, tuple[int, int]]:
    """Moment → bytes at its peak, for rows of `row` tokens: (all but logits, logits). {} where the model's sizes are
    unknown.

    Args:
        chosen: names of the weights that have adapters.
        block: tensors of one block.
        bare: number of blocks without adapters (lora.layers_to_transform): below all others, and above one of these.
            Without checkpointing the former keep nothing, since there is no backward pass through them.
    """
    if not (model.sizes.hidden_size and model.sizes.num_hidden_layers):
        return {}
    sizes: Any = model.sizes if model.is_known else filled(model.sizes)
    mode = mode_of(recipe, setting)
    table = polynomials(model.model_type or "", mode)
    value = symbols(sizes, setting.micro_batch_size * row, row, _rank(recipe, chosen, block))
    if not needs_mask(recipe, setting):
        value["T·s"] = value["s·s"] = 0
    experts = any(tensor.kind == "experts" and tensor.name in chosen for tensor in block)
    if recipe.lora and recipe.lora.target_modules != "all-linear" and not experts:
        value["e·h·m"] = 0  # an adapter on experts is multiplied out and added to their weights
    base, (saved,) = table["base"][0], table["saved"]
    more_wide = _autocast_in_float32(model.model_type or "", mode) if setting.kind.engine == "fsdp2" else {}
    kept, depth = kept_in_backward(saved, mode.checkpointing), sizes.num_hidden_layers
    if model.train_only is not None:  # nothing is kept below the lowest trained block; all above count as trained
        depth = max(1, min(depth, model.backward_blocks))
    if not mode.checkpointing:
        depth -= bare[0]
    change = difference(recipe, model, mode, setting.micro_batch_size * row, chosen, block)
    less = difference(recipe, model, mode, setting.micro_batch_size * row, frozenset(), block) if bare[1] else None
    found = {}
    for moment in MOMENTS[2:]:
        each = saved if moment in ("forward", "loss") else kept
        times = {"forward": depth - 1, "bottom": 1}.get(moment, depth)
        here = times  # inputs of blocks that are on the GPU
        if recipe.training.activation_offloading and mode.checkpointing:
            # The embeddings' output in the forward pass, and under adapters, whose leaf it is, to the end; in the
            # backward pass the block's own.
            here = int(moment in ("forward", "loss") or bool(recipe.lora)) + int(moment in ("top", "bottom"))
        recomputed = moment in ("top", "bottom", "forward")
        inputs = {name: size for name, size in each.items() if here != times and "T" in name}
        common = [
            (base, 1),
            (each, times),
            (inputs, here - times),
            (more_wide, int(recomputed) if mode.checkpointing else times),
        ]
        rest, logits = max((_evaluate(value, (*common, (peak, 1))) for peak in table[moment]), key=sum)
        if less and not mode.checkpointing and moment != "bottom":
            rest += bare[1] * (less.tokens + less.weights)
            times -= bare[1]
        if change:
            if not mode.checkpointing:
                rest += times * (change.tokens + change.weights)
            elif moment in ("forward", "loss"):
                rest += times * change.weights
            if (moment == "forward" and change.matrices) or (mode.checkpointing and moment in ("top", "bottom")):
                # What the block computes again, plus the matrices of one layer.
                whole = polynomials(model.model_type or "", replace(mode, checkpointing=False))["saved"][0]
                wide = 0
                dora = recipe.lora is not None and recipe.lora.use_dora
                if mode.dtype_regime == "autocast" and mode.adapters in ("nf4", "int8") and dora:
                    # Everything is float32 (see `difference`): as much again, and the gradients of the MLP.
                    wide = sum(_evaluate(value, ((whole, 1),))) + 12 * value.get("T·f", 0)
                again = _evaluate(value, (*common, (whole, 1)))[0] + change.tokens + change.matrices + wide
                rest = max(again, rest + (change.tokens if mode.checkpointing else 0))
            if moment in (("top", "bottom") if mode.checkpointing else ("forward",)):
                rest += change.turned
        found[moment] = rest, logits
    if why_full(recipe, model, setting.kind.zero_stage) is None:
        found |= _in_chunks(found, value, model, mode, _float32_norms(mode, block), head_is_trained(recipe, model))
    return found


def _rank(recipe: Recipe, chosen: frozenset[str], block: list[Tensor]) -> int:
    """Rank of a block's adapters; the mean where lora.rank_pattern gives them several."""
    if recipe.lora is None:
        return 1
    if recipe.lora.oft:
        return 0
    ranks = [rank_of(recipe.lora, module_of(tensor)) for tensor in block if tensor.name in chosen]
    return round(sum(ranks) / len(ranks)) if ranks else recipe.lora.r


def _in_chunks(
    found: Mapping[str, tuple[int, int]],
    value: Mapping[str, int],
    model: ModelShape,
    mode: Mode,
    wide: bool,
    trained: bool,
) -> dict[str, tuple[int, int]]:
    """The moments of the loss with training.loss: chunked (train/chunked_loss.py).

    Kept are the hidden states of the trained tokens and their gradient; of an output layer that is `trained`, the
    float32 sum of its gradient. A chunk has its logits, their float32 copy and as much again while the cross-entropy is
    computed; then the logits and their gradient, beside the chunk's gradient of the output layer.

    Args:
        wide: the last norm gives float32.
    """
    low = 4 if mode.dtype_regime == "float32" else 2
    states = (12 - low if wide else 2 * low) * value["T·h"]
    words = value["T·V"] // value["T"]
    chunk = min(value["T"], chunk_tokens(words)) * words
    # Gemma 2 caps them, also where its config.json does not say so.
    capped = low * chunk if model.config.get("final_logit_softcapping", model.model_type == "gemma2") else 0
    sums = 4 * value["h·V"] if trained else 0
    gradients = {"autocast": 6, "low": 2, "float32": 4}[mode.dtype_regime] * value["h·V"] if trained else 0
    normed = 12 * value["T·h"]  # the last norm, in float32, before there is a chunk and after all
    first = (states, (low + 8) * chunk + capped), (states + gradients, 2 * low * chunk + capped), (normed, 0)
    kept, logits = max(first, key=sum)
    # Beside the sum there is, where weights are 16 bit, the gradient that is made of it.
    rounded = 2 * value["h·V"] if trained and mode.dtype_regime == "low" else 0
    head = found["head"][0] + states + sums + max(rounded, 0 if low == 4 or wide else normed)
    return {"loss": (found["loss"][0] + kept + sums, logits), "head": (head, 0)}


@lru_cache
def _autocast_in_float32(family: str, mode: Mode) -> Polynomial:
    """What a block keeps under FSDP beyond the table's mode `low`: accelerate leaves autocast on (accelerator.py,
    prepare_model), which computes the powers of gelu_new and LayerNorm in float32."""
    if mode.dtype_regime != "low":
        return {}
    with_it, without = (
        polynomials(family, replace(mode, dtype_regime=regime, adapters="full", checkpointing=False))["saved"][0]
        for regime in ("autocast", "low")
    )
    more = {name: with_it.get(name, 0) - without.get(name, 0) for name in ("T", "T·f", "T·h")}
    found = {name: more[name] for name in ("T", "T·f") if more[name] > 0}
    # T is LayerNorm's statistics; without it, T·h is autocast's float32 hidden states, which FSDP has not.
    return found | {"T·h": max(8.0, more["T·h"])} if "T" in found else found


def _float32_norms(mode: Mode, block: Sequence[Tensor]) -> bool:
    """Whether norms give float32: autocast computes LayerNorm so, and RMSNorm returns the dtype that it was given."""
    return mode.dtype_regime == "autocast" and any(
        tensor.kind == "bias" and ("norm" in tensor.name or ".ln_" in tensor.name) for tensor in block
    )


@dataclass(frozen=True)
class Difference:
    """Bytes that a block keeps beyond the table, which assumes plain LoRA on every linear layer and groups of heads."""

    tokens: int  # inputs and results of adapters, keys and values
    weights: int  # autocast's copies of adapters
    matrices: int  # DoRA: what one layer computes from its weight, during its forward pass
    turned: int = 0  # OFT: inputs of one layer as they are turned, or their gradients


def difference(
    recipe: Recipe, model: ModelShape, mode: Mode, tokens: int, chosen: frozenset[str], block: list[Tensor]
) -> Difference | None:
    """The difference made by chosen layers, DoRA, and heads without groups (`_views`); None for none.

    A layer without an adapter keeps nothing. An adapter keeps its input and the product of width r. Layers that read
    the same input share it, except under autocast, where each has its own 16-bit copy (peft first casts the input to
    the adapter's float32, though not for a quantized layer). The last layer of an attention reads what FlashAttention
    keeps anyway, and LLM.int8() keeps inputs itself. OFT keeps the inputs, too, and its rotations; its table is the one
    of LoRA of rank 0 on plain layers, which peft casts in the same way. DoRA keeps the results of layer and adapter,
    and computes the adapter's matrix, from an identity, and its sum with the weight (peft tuners/lora/dora.py).
    """
    low, lora = 4 if mode.dtype_regime == "float32" else 2, recipe.lora
    views = _views(model, mode) * low * tokens
    everything = lora and lora.target_modules == "all-linear" and not lora.exclude_modules and chosen
    oft = lora.oft if lora else None
    if lora is None or (everything and not lora.use_dora and not oft):
        return Difference(views, 0, 0) if views else None
    linear = [tensor for tensor in block if tensor.is_linear]
    float32_norms = _float32_norms(mode, block)
    inputs = products = weights = results = matrices = rotations = 0
    parents: dict[str, list[Tensor]] = {}
    for tensor in linear:
        parents.setdefault(_parent(tensor), []).append(tensor)
    for parent, layers in parents.items():
        for tensor in layers:
            width_in, width_out = tensor.features
            if tensor.name in chosen:
                if oft:
                    rotations += rotations_kept(oft, width_in, mode.dtype_regime)
                    if recipe.model.quantization == "int8":  # MatMul8bitLt has its input in ctx.tensors
                        weights += low * tokens * width_in
                if lora.use_dora:
                    results += 2 * low * tokens * width_out
                    if mode.dtype_regime == "autocast" and mode.adapters != "lora":
                        # The float32 of the magnitude is not cast back: what follows is float32, and int8 casts again.
                        results += 4 * tokens * width_out + (2 * tokens * width_in if mode.adapters == "int8" else 0)
                    square, size = width_in * width_in, width_in * width_out
                    matrices = max(matrices, low * (square + 3 * size))
                    if mode.dtype_regime == "autocast":
                        matrices = max(matrices, 6 * square + 2 * size, 2 * square + 16 * size)
                continue
            products += 0 if oft else low * tokens * lora.r
            if mode.dtype_regime == "autocast":
                weights -= 0 if oft else 2 * lora.r * (width_in + width_out)
            if mode.adapters == "int8":
                continue
            last = tensor is layers[-1] and len(layers) > 1
            if (mode.dtype_regime == "autocast" and mode.adapters == "lora") or (float32_norms and not last):
                inputs += 2 * tokens * width_in
            elif last:
                inputs += 0 if "att" in parent and mode.attention != "eager" else low * tokens * width_in
            elif tensor is layers[0] and not chosen & {other.name for other in layers[:-1]}:
                inputs += low * tokens * width_in
    turned = 0
    if oft:  # counted by the simulation: where the widest layer's gradients are float32, and come from a product
        h = model.sizes.hidden_size or 0
        wide = max((tensor.features[0] for tensor in linear if tensor.name in chosen), default=0)
        turned = tokens * {"autocast": max(0, 8 * wide - 4 * h), "low": 2 * h, "float32": 0}[mode.dtype_regime]
        turned = turned if wide > h else 0
    return Difference(views + results + rotations - inputs - products, weights, matrices, turned)


def rotations_kept(oft: Oft, width: int, dtype_regime: str) -> int:
    """Bytes of the matrices of its rotations that a layer of this width keeps (peft tuners/oft/layer.py,
    _cayley_batch).

    The powers of the series, of which autocast casts both factors each time; or what solving keeps, in float32. Beside
    these the rotations themselves, in the compute dtype, a copy for each block.
    """
    _, size = blocks_of(oft, width)
    low = 4 if dtype_regime == "float32" else 2
    terms = max(oft.num_cayley_neumann_terms, 4)  # 3 has as many products as 4
    if not oft.use_cayley_neumann:
        each, copies = 12, low if oft.block_share or low == 2 else 0
    elif oft.num_cayley_neumann_terms == 2:
        each, copies = 0, low
    else:
        each, copies = (2 * low if dtype_regime == "autocast" else low) * (terms - 2), low
    return size * (each * (size if oft.block_share else width) + copies * width)


def _views(model: ModelShape, mode: Mode) -> int:
    """Elements per token that a block keeps beyond the table because keys and values are views. The table's families
    have groups of heads, so keys and values are copied for every head where the kernel has no groups (modeling_*.py,
    repeat_kv).

    With one key-value head these copies are views of it; with as many as heads there are none, and Phi-3's values stay
    a part of its fused projection, which is kept as a whole.
    """
    sizes = model.sizes
    heads, kv_heads, d = sizes.num_attention_heads or 0, sizes.num_key_value_heads or 0, sizes.head_dim or 0
    if mode.attention == "masked" and kv_heads == 1 < heads and model.model_type not in ("falcon", "gpt_bigcode"):
        return -2 * (heads - 1) * d
    return 2 * heads * d if mode.attention != "flash" and model.model_type == "phi3" and kv_heads == heads else 0


def _parent(tensor: Tensor) -> str:
    return tensor.name.rpartition(".")[0].rpartition(".")[0]


def _evaluate(value: dict[str, int], parts: tuple[tuple[Polynomial, int], ...]) -> tuple[int, int]:
    total = {True: 0.0, False: 0.0}
    for polynomial, times in parts:
        for name, size in polynomial.items():
            total[name == "T·V"] += times * size * value.get(name, 0)
    return int(total[False]), int(total[True])
