"""Makes distft/planner/activations.txt: `make activations` (an hour on two cores, no GPU).

The real classes of every family that the planner knows are traced on fake tensors (trace.py), in every mode that
changes what a step keeps. Their sizes are chosen so that the bytes of a storage tell which sizes it is the product of;
a trace then gives polynomials in the sizes, which hold for any model of the family. Where the peak of a moment can be
at several operators, depending on the sizes, the table has the polynomial of each that is highest at one of PROBES.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from distft.config.loading import load_recipe
from distft.errors import DistftError
from distft.models.architecture import describe
from distft.models.families import FAMILIES
from distft.planner.activations import FILE, MADE_WITH, Mode, Polynomial, kept_in_backward, symbols, write
from distft.simulation import fake_model, trace

# No two products of these that occur differ by a small factor. Row lengths are multiples of 32: some kernels pad to it.
LENGTH, ROWS, RANK, DEPTH = 32 * 37, 2, 13, 4
GENERIC = {
    "vocab_size": 3023,
    "hidden_size": 850,
    "intermediate_size": 1055,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 25,
    "num_key_value_heads": 5,
    "head_dim": 86,
    "moe_intermediate_size": 346,
    "shared_intermediate_size": 634,
    "num_experts": 11,
    "num_experts_per_tok": 5,
    "max_position_embeddings": 1187,
    "sliding_window": 211,
}
# The kernel for mixtures of experts needs multiples of 16 bytes.
MIXTURE = {
    "hidden_size": 1000,
    "intermediate_size": 1048,
    "moe_intermediate_size": 344,
    "shared_intermediate_size": 632,
}
# Families whose classes compute the head size from hidden size and heads, whatever config.json says.
NO_HEAD_DIM = ("phi", "olmoe")
# Rotary positions for a part of each head, of an even size.
EXTRA = {"phi": {"hidden_size": 900}, "gptj": {"n_embd": 900, "rotary_dim": 16}}
FACTORS = (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# Sizes of real models at which peaks are compared: h, heads, kv heads, head size, f, V, tokens, row, rank.
PROBES = (
    (768, 12, 12, 64, 3072, 50257, 4096, 1024, 8),
    (896, 14, 2, 64, 4864, 151936, 1024, 1024, 16),
    (2048, 8, 1, 256, 16384, 256000, 4096, 4096, 16),
    (2560, 32, 32, 80, 10240, 51200, 2048, 2048, 16),
    (3072, 32, 32, 96, 8192, 32064, 8192, 4096, 64),
    (4096, 32, 8, 128, 14336, 128256, 512, 512, 16),
    (4096, 32, 8, 128, 14336, 128256, 32768, 8192, 16),
    (4096, 32, 32, 128, 11008, 32000, 4096, 4096, 128),
    (8192, 64, 8, 128, 28672, 128256, 4096, 4096, 16),
)


def modes() -> Iterator[Mode]:
    """Every combination that exists. fp16 keeps the same as bf16, and FSDP the same as ZeRO."""
    for regime, adapters, attention, checkpointing in itertools.product(
        ("autocast", "low", "float32"), ("full", "lora", "nf4", "int8"), ("flash", "masked", "eager"), (False, True)
    ):
        if regime == "float32" and (attention == "flash" or adapters == "int8"):
            continue
        yield Mode(regime, adapters, attention, checkpointing)


class Symbols(trace.Ledger):
    """A ledger that counts polynomials besides bytes."""

    names: dict[int, Polynomial]
    probes: list[dict[str, int]]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.now: Polynomial = {}
        self.sums = [0.0] * len(self.probes)
        self.best: dict[trace.Segment, list[tuple[float, Polynomial]]] = {}
        self.at_entry: dict[trace.Segment, Polynomial] = {}

    def count(self, tensor: Any, kind: str) -> None:
        known = id(tensor.untyped_storage()) in self.live
        super().count(tensor, kind)
        if not known:
            self._add(id(tensor.untyped_storage()), 1)
            self.look()

    def free(self, key: int) -> None:
        self._add(key, -1)
        super().free(key)

    def call(self, tensor: Any, kind: str) -> None:
        self.count(tensor, kind)
        key = id(tensor.untyped_storage())
        self._add(key, -1)
        super().call(tensor, kind)
        self._add(key, 1)

    def _add(self, key: int, sign: int) -> None:
        _, size, kind = self.live[key]
        if kind in ("activations", "logits", "buffers"):
            self._sum(decode(size, self.names), sign)

    def _sum(self, polynomial: Polynomial, sign: int) -> None:
        for monomial, factor in polynomial.items():
            self.now[monomial] = self.now.get(monomial, 0.0) + sign * factor
        for index, probe in enumerate(self.probes):
            self.sums[index] += sign * sum(factor * probe[monomial] for monomial, factor in polynomial.items())

    def enter(self, moment: str, block: int | None = None) -> None:
        super().enter(moment, block)
        self.at_entry[self.segment] = dict(self.now)

    def look(self, workspace: int = 0) -> None:
        super().look(workspace)
        extra = decode(workspace, self.names) if workspace else {}
        if extra:
            self._sum(extra, 1)
        best = self.best.setdefault(self.segment, [(-1.0, {})] * len(self.probes))
        snapshot = None
        for index, total in enumerate(self.sums):
            if total > best[index][0]:
                snapshot = snapshot or dict(self.now)
                best[index] = (total, snapshot)
        if extra:
            self._sum(extra, -1)


def decode(size: int, names: dict[int, Polynomial]) -> Polynomial:
    """The polynomial for a number of bytes; {} for small odd numbers.

    Raises:
        ValueError: it is not a product of the sizes.
    """
    if size in names:
        return names[size]
    if size < 600_000:  # such as nf4's scales: less than a thousandth of what a layer keeps
        return {}
    if size % (LENGTH * ROWS) == 0 and size < 4 * LENGTH * ROWS * GENERIC["hidden_size"]:
        return {"T·h": round(size / (LENGTH * ROWS * GENERIC["hidden_size"]), 3)}  # a part of each head: partial rotary
    raise ValueError(f"{size} bytes are no product of the sizes")


def _names(values: dict[str, int]) -> dict[int, Polynomial]:
    """Bytes → the monomial that they are a small multiple of. Larger monomials first: T·h rather than many h."""
    found: dict[int, Polynomial] = {}
    for name, value in sorted(values.items(), key=lambda item: -item[1]):
        for factor in FACTORS:
            if float(factor * value).is_integer():
                found.setdefault(int(factor * value), {name: factor})
    qkv = {f"{prefix}{name}": weight for prefix in ("T·", "h·") for name, weight in (("q", 1), ("kv", 2))}
    for prefix in ("T·", "h·"):
        parts = {key: weight for key, weight in qkv.items() if key.startswith(prefix) and key in values}
        for factor in FACTORS:
            size = factor * sum(values[key] * weight for key, weight in parts.items())
            if float(size).is_integer():
                found.setdefault(int(size), {key: factor * weight for key, weight in parts.items()})
    # Copies of learned positions: too few to count.
    positions, h = GENERIC["max_position_embeddings"], GENERIC["hidden_size"]
    ignored: dict[int, Polynomial] = {int(factor * (positions + more) * h): {} for factor in FACTORS for more in (0, 2)}
    return found | ignored | {positions * positions: {}}  # and GPT-BigCode's mask of all positions


def polynomials(family: str, mode: Mode) -> dict[str, list[Polynomial]]:
    """Moment → what may be its peak, for a family in a mode."""
    layout = FAMILIES[family]
    left_out = {*layout.unread, *(["head_dim"] if family in NO_HEAD_DIM else [])}
    left_out |= {"sliding_window"} if not layout.defaults.get("sliding_window") else set()
    sizes = GENERIC | (MIXTURE if "num_experts" in layout.defaults else {})
    config = {
        layout.keys.get(name, name).split()[0]: size
        for name, size in sizes.items()
        if name in layout.defaults and name not in left_out
    } | {"model_type": family, "pad_token_id": None, **EXTRA.get(family, {})}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        (Path(folder) / "data.jsonl").write_text("{}\n")
        (Path(folder) / "recipe.yaml").write_text(json.dumps(_recipe(mode)))
        recipe = load_recipe(str(Path(folder) / "recipe.yaml"))
        kind = {"low": "zero"}.get(mode.dtype_regime, "autocast")
        attention = {"flash": "flash_attention_2", "masked": "sdpa", "eager": "eager"}[mode.attention]
        model = fake_model.build(recipe, kind, attention)
        Symbols.names = _names(symbols(describe(config).sizes, LENGTH * ROWS, LENGTH, RANK))
        Symbols.probes = list(_probes(describe(config).sizes))
        books: list[Symbols] = []

        def book(*args: Any) -> Symbols:
            books.append(Symbols(*args))
            return books[-1]

        with patch.object(trace, "Ledger", book):
            trace.trace(
                recipe,
                model,
                dtype_regime=kind,
                micro_batch_size=ROWS,
                gradient_checkpointing=mode.checkpointing,
                attn_implementation=attention,
            )
    return _moments(books[0], mode.checkpointing)


def _recipe(mode: Mode) -> dict[str, Any]:
    quantization = mode.adapters if mode.adapters in ("nf4", "int8") else None
    return {
        "name": "table",
        "model": {"name_or_path": ".", "quantization": quantization},
        "lora": None if mode.adapters == "full" else {"r": RANK},
        "data": {"train": ["data.jsonl"], "max_length": LENGTH, "packing": True},
        "training": {
            "mixed_precision": "no" if mode.dtype_regime == "float32" else "bf16",
            "global_batch_size": ROWS,
            "loss": "full",
        },
    }


def _probes(sizes: Any) -> Iterator[dict[str, int]]:
    """PROBES, with the sizes that the family ties to others."""
    from dataclasses import replace

    for h, heads, kv_heads, d, f, vocab, tokens, row, rank in PROBES:
        equal = sizes.num_attention_heads * sizes.head_dim == sizes.hidden_size
        if sizes.num_key_value_heads == sizes.num_attention_heads:
            kv_heads = heads
        probe = replace(
            sizes,
            hidden_size=h,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=h // heads if equal else d,
            intermediate_size=4 * h if sizes.intermediate_size == 4 * sizes.hidden_size else f,
            vocab_size=vocab,
        )
        yield symbols(probe, tokens, row, rank)


def _moments(book: Symbols, checkpointing: bool) -> dict[str, list[Polynomial]]:
    """Peaks less what exists anyway: `base`, and `saved` of each block."""
    base = book.at_entry["forward", 0]
    saved = _less(book.at_entry["forward", -1], (book.at_entry["forward", -2], 1))
    kept = kept_in_backward(saved, checkpointing)
    found = {"base": [_plain(base)], "saved": [_plain(saved)]}
    for moment, segment, blocks in (
        ("forward", ("forward", -1), DEPTH - 1),
        ("loss", ("loss", None), DEPTH),
        ("head", ("backward", None), DEPTH),
        ("top", ("backward", -1), DEPTH),
        ("bottom", ("backward", 0), 1),
    ):
        peaks = [
            _plain(_less(peak, (base, 1), (saved if moment in ("forward", "loss") else kept, blocks)))
            for _, peak in book.best[segment]
        ]
        found[moment] = [peak for index, peak in enumerate(peaks) if peak not in peaks[:index]]
    return found


def _less(total: Polynomial, *parts: tuple[Polynomial, int]) -> Polynomial:
    result = dict(total)
    for part, times in parts:
        for monomial, factor in part.items():
            result[monomial] = result.get(monomial, 0.0) - times * factor
    return result


def _plain(polynomial: Polynomial) -> Polynomial:
    return {monomial: factor for monomial, factor in sorted(polynomial.items()) if factor}


def of_family(family: str) -> dict[tuple[str, Mode], dict[str, list[Polynomial]]]:
    """All modes of a family; those that its classes or the trace refuse are reported and left out."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    found = {}
    for mode in modes():
        try:
            found[family, mode] = polynomials(family, mode)
        except (DistftError, RuntimeError, ValueError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
            print(f"{family}, {mode.key}: left out, {reason}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    families = [family for family in FAMILIES if family != "gemma3"]  # its language model is gemma3_text
    with ProcessPoolExecutor() as pool:
        found = {key: moments for each in pool.map(of_family, families) for key, moments in each.items()}
    in_order = {(f, m): found[f, m] for m in modes() for f in families if (f, m) in found}
    FILE.write_text(write(in_order, {name: version(name) for name in MADE_WITH}), encoding="utf-8")


if __name__ == "__main__":
    main()
