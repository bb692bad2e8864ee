"""training.compile: each block of the model is compiled by itself, as torchtitan does it.

A block is compiled in place (nn.Module.compile), before the strategy wraps the model: names of modules and parameters
stay, and FSDP2's and DeepSpeed's hooks remain outside of what is compiled. All equal blocks share one compilation,
because dynamo keeps its results by code, and guards on shapes and settings, not on which module it is.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
import time
from typing import Any

import torch
from torch import nn

from distft.errors import ClusterError, PlanError, RunError, first_line
from distft.train.blocks import block_classes
from distft.train.ranks import largest

log = logging.getLogger("distft")

# Compilations of one piece of code after which dynamo runs it uncompiled. Its 8 are too few: all blocks share the code
# of nn.Module's call, and each kind of block has one for training and one for evaluation, for the first length of rows
# and for all lengths.
COMPILATIONS = 64
LIMIT_HIT = "hit config."  # torch/_dynamo/convert_frame.py


def check_compiler(device: torch.device) -> None:
    """Look for what compiles for this rank's device: on a GPU by compiling a function, which takes seconds there.

    Raises:
        ClusterError: this node has none; or accelerate was told to compile, too.
    """
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ClusterError("ACCELERATE_DYNAMO_BACKEND is set, and training.compile compiles: unset it")
    on_gpu = device.type == "cuda"
    try:
        if on_gpu:
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
        else:
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
    except Exception as error:  # of dynamo, inductor, triton, or of the system
        need = (
            "Triton, a C compiler (gcc) and Python's headers" if on_gpu else "a C++ compiler (g++, or what CXX names)"
        )
        raise ClusterError(
            f"training.compile: this node cannot compile: {first_line(error)}; install {need}, or set "
            "training.compile: false"
        ) from error


def compile_blocks(model: nn.Module) -> int:
    """Have the blocks of a model compiled when they are first called. Returns how many.

    Raises:
        PlanError: it has none that transformers names.
    """
    found = blocks(model)
    if not found:
        raise PlanError(
            f"training.compile: {type(model).__name__} has no blocks that transformers names (_no_split_modules); use "
            "training.compile: false"
        )
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, COMPILATIONS)
    # It would split a block's graph where a bucket of DDP's ends; blocks are pieces already.
    config.optimize_ddp = False
    for block in found:
        block.compile()
    return len(found)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of the classes that FSDP2 shards as units (train/blocks.py)."""
    names, found = set(block_classes(model)), []

    def look(module: nn.Module) -> None:
        for child in module.children():
            found.append(child) if type(child).__name__ in names else look(child)

    look(model)
    return found


def takes_bounds(model: Any) -> bool:
    """Whether a model, with adapters or without, hands on what its attention alone reads (train/trainer.py,
    Collator)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = [inspect.signature(type(part).forward).parameters.values() for part in (base, base.base_model)]
    return all(any(p.kind is p.VAR_KEYWORD for p in parameters) for parameters in kinds)


def eagerly() -> Any:
    """Inside, compiled blocks run uncompiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


class Compilation:
    """What dynamo makes of this rank's blocks, from now on."""

    def __init__(self, device: torch.device):
        from torch._dynamo.utils import counters

        self.counters, self.device, self.began = counters, device, 0.0
        self.gave_up = self.told = False
        counters.clear()
        logging.getLogger("torch._dynamo.convert_frame").addFilter(self._see)

    def _see(self, record: logging.LogRecord) -> bool:
        self.gave_up = self.gave_up or LIMIT_HIT in record.getMessage()
        return True

    def found(self) -> dict[str, int]:
        """`graphs` that were compiled, and `graph_breaks`: places where a block is left for Python."""
        graphs, breaks = self.counters["stats"]["unique_graphs"], sum(self.counters["graph_break"].values())
        return {"graphs": graphs, "graph_breaks": breaks}

    def begin(self) -> None:
        """The first step begins: what an evaluation has compiled is not of the training."""
        self.counters.clear()
        self.began = time.perf_counter()

    def check(self) -> float:
        """The first step has ended. Returns its seconds; what was compiled is logged. The same on all ranks.

        Raises:
            RunError: nothing was compiled.
        """
        found, seconds = self.found(), time.perf_counter() - self.began
        if not -largest(-found["graphs"], self.device):
            why = next((f": {first_line(RuntimeError(reason))}" for reason in self.counters["graph_break"]), "")
            raise RunError(
                f"training.compile: the blocks ran uncompiled: torch.compile did not take effect{why}; set "
                "training.compile: false, or training.gradient_checkpointing: false, with which a block need not be "
                "one graph"
            )
        log.info("first step: %.1f s, with %d graphs compiled and %d graph breaks", seconds, *found.values())
        for reason, count in self.counters["graph_break"].items():
            log.info("graph break, %d x: %s", count, first_line(RuntimeError(reason)))
        return seconds

    def problem(self, gave_up: bool) -> str | None:
        """For status.json's warnings, once: that dynamo `gave_up` on some rank. None where it has not."""
        if not gave_up or self.told:
            return None
        self.told = True
        return (
            "training.compile: torch.compile has compiled a block so often, for other lengths or settings each time, "
            "that it now runs it uncompiled: the ranks' logs have the reason; set training.compile: false"
        )
