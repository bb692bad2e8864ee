"""Layouts of models as text, and the parameters that they stand for.

A layout has one row per module:

    name kind size size... [bias=switch] [if=switch,!switch] [times=size]

Kinds: linear (out in), conv1d (in out: GPT-2's transposed Linear), conv2d, output (the output layer), embedding,
norm, and router (a matrix that is no Linear) have a `.weight`; experts and param are bare parameters of that name.
A size is a symbol (`h`), a number, or `2f`, `P+2`; a switch is a key of the config, `yes` or `no`. With `times` the row
stands for that many modules, and `%` in its name for the index of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from math import prod
from typing import Any, NamedTuple


class Tensor(NamedTuple):
    """A parameter, named as in the model's named_parameters(); the kind is its module's, or `bias`."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a linear layer other than the output layer: what bitsandbytes quantizes."""
        return self.kind in ("linear", "conv1d")

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it is the matrix of a layer other than embeddings and the output layer."""
        return self.kind in ("linear", "conv1d", "router") and len(self.shape) == 2

    @property
    def features(self) -> tuple[int, int]:
        """Input and output features of the weight's module (of one expert, for `experts`)."""
        if self.kind in ("conv1d", "embedding"):
            return self.shape[0], self.shape[1]
        if self.kind == "experts":
            return self.shape[2], self.shape[1]
        return prod(self.shape[1:]), self.shape[0]


class _Row(NamedTuple):
    name: str
    kind: str
    shape: tuple[str, ...]
    bias: str
    when: str
    times: str


@cache
def _rows(layout: str) -> tuple[_Row, ...]:
    rows = []
    for line in filter(None, map(str.strip, layout.splitlines())):
        name, kind, *rest = line.split()
        shape = tuple(word for word in rest if "=" not in word)
        options = {"bias": "no", "if": "yes", "times": "1"} | dict(word.split("=") for word in rest if "=" in word)
        rows.append(_Row(name, kind, shape, *options.values()))
    return tuple(rows)


def tensors(layout: str, symbols: Mapping[str, int], switches: Mapping[str, Any]) -> Iterator[Tensor]:
    """The parameters of the rows whose switches are on."""

    def number(word: str) -> int:
        first, _, plus = word.partition("+")
        symbol = first.lstrip("0123456789")
        factor = first.removesuffix(symbol)
        return int(factor or 1) * (symbols[symbol] if symbol else 1) + int(plus or 0)

    def on(switch: str) -> bool:
        if switch in ("yes", "no"):
            return switch == "yes"
        return not on(switch[1:]) if switch.startswith("!") else bool(switches[switch])

    for row in _rows(layout):
        if not all(map(on, row.when.split(","))):
            continue
        shape, bias = tuple(map(number, row.shape)), on(row.bias)
        weight = "" if row.kind in ("experts", "param") else ".weight"
        for index in range(number(row.times)):
            name = row.name.replace("%", str(index))
            yield Tensor(name + weight, shape, row.kind)
            if bias:
                yield Tensor(f"{name}.bias", shape[-1:] if row.kind == "conv1d" else shape[:1], "bias")


def blocks(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors by block: those under the numbered prefix with the most numbers."""
    stacks: dict[str, dict[str, list[Tensor]]] = {}
    for tensor in tensors:
        if match := re.match(r"(.*?)\.(\d+)\.", tensor.name):
            stacks.setdefault(match[1], {}).setdefault(match[2], []).append(tensor)
    return list(max(stacks.values(), key=len).values()) if stacks else []
