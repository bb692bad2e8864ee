"""metrics.jsonl: a line per optimizer step."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets import Dataset

from distft.hardware.devices import data_sheet
from distft.train.sampler import StreamSampler


class MetricsLog:
    """Writes metrics.jsonl, to `path`.

    `tokens`: trained on before the first step, by all ranks. `token_share`: the part of what the GPUs can compute in a
    second that one token takes (`token_share`); None: unknown.
    """

    def __init__(self, path: Path, tokens: int, token_share: float | None = None):
        self.file = _Appender(path)
        self.tokens, self.token_share = tokens, token_share
        self.clock = time.perf_counter()

    def start_clock(self) -> None:
        """The first step begins now."""
        self.clock = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """So long no step was made: tokens per second are those of steps."""
        self.clock += seconds

    def write(
        self, step: int, tokens: int, logs: dict[str, float], peak_memory: int, eval_loss: float | None = None
    ) -> None:
        """Write the line of a step.

        Args:
            step: number of the step, from 1.
            tokens: trained on so far, by all ranks.
            logs: what transformers.Trainer logs at a step.
            peak_memory: bytes, the largest of any rank so far.
            eval_loss: None where it was not measured.
        """
        now = time.perf_counter()
        speed = (tokens - self.tokens) / (now - self.clock)
        line = {
            "step": step,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs["learning_rate"],
            "tokens": tokens,
            "tokens_per_second": speed,
            "peak_memory_bytes": peak_memory,
            "time": time.time(),
            "mfu": self.token_share and speed * self.token_share,
        }
        if eval_loss is not None:
            line["eval_loss"] = eval_loss
        self.clock, self.tokens = now, tokens
        self.file.write(json.dumps(line) + "\n")


def token_share(plan: Mapping[str, Any]) -> float | None:
    """Seconds for which a token would occupy all GPUs of a run at the data sheet's rate; times tokens per second, the
    MFU (PaLM, arXiv 2204.02311, appendix B). None on a CPU or an unknown GPU.

    The FLOPs are the plan's (planner/speed.py): those of the model, without what gradient checkpointing repeats, and
    with attention over rows of max_length.
    """
    flops = plan["time"]["flops_per_token"]
    sheet = data_sheet(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if sheet is None or not flops:
        return None
    peak = 1e12 * (sheet.float32_tflops if plan["mixed_precision"] == "no" else sheet.tflops)
    return float(flops / (plan["topology"]["world_size"] * peak))


class _Appender:
    """Appends to a file. What a full disk does not take is kept for the next write."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.unwritten = b""

    def write(self, text: str) -> None:
        self.unwritten += text.encode()
        with contextlib.suppress(OSError):
            while self.unwritten:
                self.unwritten = self.unwritten[os.write(self.descriptor, self.unwritten) :]


def tokens_per_step(dataset: Dataset, stream: StreamSampler, global_batch_size: int) -> list[int]:
    """Tokens of every global batch, from the rows' lengths: every rank knows them, so nothing has to be gathered."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(dataset.data.column("input_ids")).to_numpy()
    order = numpy.fromiter(stream, dtype=numpy.int64, count=len(stream))
    return lengths[order].reshape(-1, global_batch_size).sum(axis=1).tolist()


def peak_memory() -> int:
    """This rank's peak so far, in bytes: the allocator's on a GPU, the process's resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
