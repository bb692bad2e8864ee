"""training.compile, without a compiler: which modules, and what is said where nothing or too much is compiled."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distft.errors import ClusterError, PlanError, RunError
from distft.train import compiled

CPU = torch.device("cpu")


class Part(nn.Linear):
    pass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Part(2, 2)


class Model(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self._no_split_modules = list(names)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = Part(2, 2)


def test_the_outermost_blocks() -> None:
    model = Model("Block", "Part", "Absent")
    assert compiled.blocks(model) == [*model.layers, model.head]
    names = list(model.state_dict())
    assert compiled.compile_blocks(model) == 3
    assert all(block._compiled_call_impl is not None for block in compiled.blocks(model))
    assert model.layers[0].part._compiled_call_impl is None
    assert list(model.state_dict()) == names
    assert torch._dynamo.config.recompile_limit == compiled.COMPILATIONS


def test_no_blocks() -> None:
    with pytest.raises(PlanError, match=r"training\.compile: Model has no blocks"):
        compiled.compile_blocks(Model())


def test_no_compiler() -> None:
    from torch._inductor import config, cpp_builder

    compiled.check_compiler(CPU)
    cpp_builder.cpp_compiler_search.cache_clear()
    with (
        config.patch({"cpp.cxx": (None, "/nowhere/g++")}),  # it reads CXX once
        pytest.raises(ClusterError, match=r"this node cannot compile: .*; install a C\+\+ compiler"),
    ):
        compiled.check_compiler(CPU)
    cpp_builder.cpp_compiler_search.cache_clear()


def test_one_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ClusterError, match=r"ACCELERATE_DYNAMO_BACKEND is set, .*: unset it"):
        compiled.check_compiler(CPU)


@pytest.fixture
def compilation() -> Iterator[compiled.Compilation]:
    made = compiled.Compilation(CPU)
    yield made
    logging.getLogger("torch._dynamo.convert_frame").removeFilter(made._see)


def test_blocks_that_ran_uncompiled(compilation: compiled.Compilation) -> None:
    compilation.begin()
    with pytest.raises(RunError, match="the blocks ran uncompiled"):
        compilation.check()
    compilation.counters["stats"]["unique_graphs"] += 1
    assert compilation.check() < 1


def test_dynamo_gives_up(compilation: compiled.Compilation) -> None:
    """The real thing: a function that is another graph for every number."""
    assert not compilation.gave_up

    def power(x: torch.Tensor, box: SimpleNamespace) -> torch.Tensor:
        return x + len(box.text)

    run = torch.compile(power, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for length in range(4):
            run(torch.ones(2), SimpleNamespace(text="x" * length))
    assert compilation.gave_up
    assert compilation.problem(gave_up=False) is None
    assert "now runs it uncompiled" in (compilation.problem(gave_up=True) or "")
    assert compilation.problem(gave_up=True) is None  # said once


def test_lengths_that_vary(monkeypatch: pytest.MonkeyPatch, compilation: compiled.Compilation) -> None:
    """One graph for the first length and one for all: of a model with three equal blocks, trained and evaluated."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, max_position_embeddings=64, use_cache=False))
    model.model.embed_tokens.weight.requires_grad_(False)  # as with adapters: the first block is another graph
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    assert compiled.compile_blocks(model) == 3
    whole = {}
    for length in range(3, 24, 2):
        ids = torch.arange(length)[None]
        whole[length] = model(ids, labels=ids).loss
        whole[length].backward()
        with torch.no_grad():
            model(ids)
    assert compilation.found()["graphs"] <= 6 and not compilation.gave_up
    with compiled.eagerly():
        for length, loss in whole.items():
            ids = torch.arange(length)[None]
            assert model(ids, labels=ids).loss.item() == pytest.approx(loss.item(), abs=1e-6)
    graphs = compilation.found()["graphs"]
    with compiled.eagerly():
        model(torch.zeros(3, 40, dtype=torch.long))
    assert compilation.found()["graphs"] == graphs
