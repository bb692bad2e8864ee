"""torch.nn.attention.varlen.varlen_attn on a CPU, which has no kernel for it: emulated, as its documentation says."""

from __future__ import annotations

from typing import Any

import torch


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """All scores at once, and then those that are allowed: of the same document, from `left` tokens before to `right`
    after, each of them without limit where it is -1."""
    assert cu_seq_q is cu_seq_k and max_q == max_k == cu_seq_q.diff().max()
    assert enable_gqa or query.shape[1] == key.shape[1]
    place = torch.arange(len(query))
    document = torch.bucketize(place, cu_seq_q, right=True)
    ahead = place[None] - place[:, None]
    left, right = (len(query) if size == -1 else size for size in window_size)
    allowed = (document[None] == document[:, None]) & (ahead >= -left) & (ahead <= right)
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * (scale or query.shape[-1] ** -0.5)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)


def instead(kernels: Any) -> None:
    """For launches, whose losses are held against CPU ranks: in their arithmetic, with what the kernel is given."""
    from distft.train.varlen import _by_document

    def given(query: Any, key: Any, value: Any, bounds: Any, *_: Any, scale: Any, window_size: Any, **__: Any) -> Any:
        left, right = window_size
        assert right == 0
        return _by_document(query, key, value, bounds.diff().tolist(), bounds, scale, left + 1 or None)

    kernels.varlen_attn = given
