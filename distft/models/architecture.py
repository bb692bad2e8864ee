"""What transformers builds from a config.json: its parameters, and the sizes that formulas need.

No torch, no transformers, no weights; a few milliseconds for any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distft.errors import PlanError
from distft.models.families import FAMILIES, Config, Family
from distft.models.layout import Tensor, tensors


@dataclass(frozen=True)
class Sizes:
    """Sizes of the language model. None: of an unknown family, whose config.json does not say."""

    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None  # of a dense MLP
    vocab_size: int | None = None
    tie_word_embeddings: bool | None = None
    gated_mlp: bool | None = None  # act(gate(x)) * up(x), not act(up(x))
    parallel_attention: bool | None = None  # attention and MLP of a layer read the same input
    sliding_window: int | None = None  # tokens; None: no layer has one
    layer_types: tuple[str, ...] = ()  # of each layer: full_attention | sliding_attention
    experts: Experts | None = None


@dataclass(frozen=True)
class Experts:
    """Sizes of a mixture of experts."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int  # of one expert
    shared_intermediate_size: int = 0  # of the expert that every token uses
    layers: tuple[bool, ...] = ()  # which layers have experts; the others are dense


@dataclass(frozen=True)
class Architecture:
    """A model of a known family. `tied` weights are shared with one of `tensors`, and not counted again."""

    sizes: Sizes
    tensors: tuple[Tensor, ...]
    tied: tuple[Tensor, ...] = ()
    peft_experts: str | None = None  # see Family

    @property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors)


# A config.json with larger sizes or counts has a typo, and planning it would fill the memory of this machine.
LARGEST, MOST = 2**24, 2**12
COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts", "num_kv_heads")

# Sizes that a config gives as numbers, with the smallest value allowed.
NUMBERS = {
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 1,
    "intermediate_size": 1,
    "vocab_size": 1,
    "max_position_embeddings": 1,
    "sliding_window": 0,
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "moe_intermediate_size": 1,
    "shared_intermediate_size": 0,
    "decoder_sparse_step": 1,
    "word_embed_proj_dim": 1,
    "num_kv_heads": 1,
    "num_channels": 1,
    "image_size": 1,
    "patch_size": 1,
}
MAY_BE_NULL = (
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "sliding_window",
    "word_embed_proj_dim",
    "num_kv_heads",
)


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether `describe` knows the family of this config.json."""
    return isinstance(config.get("model_type"), str) and config["model_type"] in FAMILIES


def describe(config: Config) -> Architecture:
    """The model that config.json describes, of a known family.

    Raises:
        PlanError: a size that is not a number, or out of range.
    """
    family = FAMILIES[config["model_type"]]
    c = _resolve(family, config if family.vision is None else _part(config, "text_config"))
    if family.vision:  # the text's own flag is not read
        c["tie_word_embeddings"] = config.get("tie_word_embeddings", family.defaults["tie_word_embeddings"])
    layers = range(c["num_hidden_layers"])
    sparse = tuple(bool(c.get("num_experts") and family.sparse(c, i)) for i in layers)
    names = symbols(c)
    parameters: list[Tensor] = []
    if family.vision:
        vision = _resolve(family.vision, _part(config, "vision_config"))
        parameters += _stack(family.vision, vision, symbols(vision), (False,) * vision["num_hidden_layers"])
        names["vision"] = vision["hidden_size"]
    parameters += _stack(family, c, names, sparse)
    tied = tuple(tensor for tensor in parameters if tensor.kind == "output" and c["tie_word_embeddings"])
    return Architecture(
        _sizes(family, c, sparse), tuple(t for t in parameters if t not in tied), tied, family.peft_experts
    )


def _part(config: Config, key: str) -> Config:
    part = config.get(key) or {}
    if not isinstance(part, dict):
        raise PlanError(f"model.name_or_path: config.json: {key} is not an object")
    return part


def _stack(family: Family, c: Config, names: Mapping[str, int], sparse: tuple[bool, ...]) -> list[Tensor]:
    """All parameters of a stack of blocks and of what is around it."""
    blocks = {kind: list(tensors(family.block, names, {**c, "sparse": kind})) for kind in set(sparse)}
    return list(tensors(family.outside, names, c)) + [
        Tensor(f"{family.blocks}.{index}.{tensor.name}", tensor.shape, tensor.kind)
        for index, kind in enumerate(sparse)
        for tensor in blocks[kind]
    ]


def _resolve(family: Family, config: Config) -> Config:
    """The values of a config that its family reads, by the names in Sizes, with defaults and rules applied."""
    c: Config = {
        "layer_types": config.get("layer_types"),
        "sliding_window_pattern": config.get("sliding_window_pattern"),
    }
    for name, default in family.defaults.items():
        keys = family.keys.get(name, name).split() if name not in family.unread else []
        key = next((key for key in keys if key in config), None)
        c[name] = default if key is None else config[key]
        if name not in NUMBERS or (c[name] is None and name in MAY_BE_NULL):
            continue
        if type(c[name]) is not int or c[name] < NUMBERS[name]:
            need = f"need an integer >= {NUMBERS[name]}"
            raise PlanError(f"model.name_or_path: config.json: {key or name}: got {c[name]!r}, {need}")
        if c[name] > (most := MOST if name in COUNTS else LARGEST):
            raise PlanError(f"model.name_or_path: config.json: {key or name}: got {c[name]:,}, need at most {most:,}")
    c["intermediate_size"] = c["intermediate_size"] or 4 * c["hidden_size"]
    c["head_dim"] = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    c["num_key_value_heads"] = c.get("num_key_value_heads") or c["num_attention_heads"]
    c.setdefault("moe_intermediate_size", c["intermediate_size"])
    if c["num_attention_heads"] % c["num_key_value_heads"]:
        heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
        raise PlanError(
            f"model.name_or_path: config.json: num_key_value_heads: got {groups}, which does not divide {heads} heads"
        )
    if not c.get("use_sliding_window", True):
        c["sliding_window"] = None
    return c | family.derive(c)


def symbols(c: Config) -> dict[str, int]:
    """The sizes that layouts refer to, by symbol."""
    heads, kv_heads, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    names = {
        "h": c["hidden_size"],
        "heads": heads,
        "kv_heads": kv_heads,
        "d": d,
        "q": heads * d,
        "kv": kv_heads * d,
        "qkv": (heads + 2 * kv_heads) * d,
        "f": c["intermediate_size"],
        "V": c.get("vocab_size"),
        "P": c.get("max_position_embeddings"),
        "e": c.get("num_experts"),
        "m": c["moe_intermediate_size"],
        "s": c.get("shared_intermediate_size"),
        "width": c.get("word_embed_proj_dim"),
        "channels": c.get("num_channels"),
        "patch": c.get("patch_size"),
    }
    if "image_size" in c:
        names["patches"] = (c["image_size"] // c["patch_size"]) ** 2
    return names


def _sizes(family: Family, c: Config, sparse: tuple[bool, ...]) -> Sizes:
    window = c.get("sliding_window") or None
    types = c["layer_types"] if window else None  # newer configs list them
    types = tuple(
        types
        or ("sliding_attention" if window and family.sliding(c, i) else "full_attention" for i in range(len(sparse)))
    )
    experts = None
    if any(sparse):
        experts = Experts(
            c["num_experts"],
            c["num_experts_per_tok"],
            c["moe_intermediate_size"],
            c.get("shared_intermediate_size", 0),
            sparse,
        )
    return Sizes(
        hidden_size=c["hidden_size"],
        num_hidden_layers=c["num_hidden_layers"],
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        intermediate_size=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        tie_word_embeddings=bool(c["tie_word_embeddings"]),
        gated_mlp=family.gated,
        parallel_attention=family.parallel == "yes" or bool(c.get(family.parallel)),
        sliding_window=window if "sliding_attention" in types else None,
        layer_types=types,
        experts=experts,
    )


def guess_sizes(config: Config) -> Sizes:
    """The sizes of an unknown family, by the usual names; nothing is assumed about its layers."""
    text: Mapping[str, Any] = config["text_config"] if isinstance(config.get("text_config"), dict) else config

    def first(*names: str) -> int | None:
        return next((text[name] for name in names if type(text.get(name)) is int), None)

    hidden, heads = first("hidden_size", "n_embd", "d_model"), first("num_attention_heads", "n_head", "n_heads")
    tied = text.get("tie_word_embeddings")
    experts = first("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    active = first("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
    return Sizes(
        hidden_size=hidden,
        num_hidden_layers=first("num_hidden_layers", "n_layer", "n_layers"),
        num_attention_heads=heads,
        num_key_value_heads=first("num_key_value_heads") or heads,
        head_dim=first("head_dim") or (hidden // heads if hidden and heads else None),
        intermediate_size=first("intermediate_size", "ffn_dim", "n_inner"),
        vocab_size=first("vocab_size"),
        tie_word_embeddings=tied if isinstance(tied, bool) else None,
        sliding_window=first("sliding_window"),
        experts=Experts(experts, active, first("moe_intermediate_size") or 0) if experts and active else None,
    )
