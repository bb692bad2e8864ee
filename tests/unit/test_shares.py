"""Optimizer states as checkpoints hold them (train/shards.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from torch._subclasses import FakeTensorMode

from distft.train.shards import Shares


def test_paged_states_are_on_the_cpu_and_their_scales_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes makes them (functional.py, get_paged): its kernels take tensors of one device. Fake tensors."""
    given: list[tuple[str, ...]] = []

    def dequantize(value: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, **_: Any) -> torch.Tensor:
        given.append((value.device.type, absmax.device.type, code.device.type))
        return torch.empty(value.shape, device=value.device)

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_blockwise", dequantize)
    with FakeTensorMode():
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.empty(256, 512))
        paged = torch.empty(256, 512, dtype=torch.uint8)
        scales = torch.empty(512, device="cuda"), torch.empty(256, device="cuda")
        state = {"step": 3, "state1": paged, "absmax1": scales[0], "qmap1": scales[1]}
        shares = Shares(model, SimpleNamespace(state={model.weight: state}, param_groups=[])).read()
    assert given == [("cpu", "cpu", "cpu")]
    assert [share.states["state1"].device.type for share in shares] == ["cpu"]
