"""Attention that stays within the documents of a row, with torch alone: `model.attn_implementation: varlen`.

On GPUs it is torch's varlen_attn, whose FlashAttention kernels take the documents' bounds as flash-attn's do; on CPU
ranks SDPA, document by document. transformers finds it by its name (AttentionInterface). Nothing is padded: a
micro-batch is one row, in which position ids start again at each document (train/trainer.py, Collator).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distft.errors import first_line

NAME = "varlen"
DEVICE = "cuda"  # of the trial
# Position ids → lengths of documents and their bounds. Each layer gets the same tensor; to look into it waits for the
# GPU. The keys are weak: it holds the micro-batches that are alive.
_documents: Any = WeakIdKeyDictionary()


def register() -> None:
    """Make the name known to transformers."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)


def fails(dtype: torch.dtype) -> str | None:
    """Why this machine's GPU cannot run it, after a trial; None where it can, and on a CPU."""
    try:
        return _tried(dtype) if torch.cuda.is_available() else None
    except (RuntimeError, ImportError, TypeError) as error:  # no kernel for this GPU, or another one in this torch
        return f"torch's varlen_attn: {first_line(error)}"


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: query (rows, heads, tokens, size), key and value with as many heads or fewer.

    Args:
        cu_seq_lens_q, max_length_q: the documents' bounds and the longest one, of a single row. Compiled blocks need
            them (train/trainer.py, Collator): to find them here would end the graph.

    Returns:
        (rows, tokens, heads, size of a value), and no scores.

    Raises:
        RuntimeError: the model asks for what it does not do, such as a mask.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None or dropout or softcap is not None or s_aux is not None or not causal:
        raise RuntimeError("model.attn_implementation: varlen has no mask, dropout, cap of scores, or sinks")
    if position_ids is None or position_ids.dim() != 2:
        raise RuntimeError("model.attn_implementation: varlen was not told where documents begin")
    rows, tokens = query.shape[0], query.shape[2]
    on_gpu, compiling = torch.cuda.is_available(), torch.compiler.is_compiling()
    if cu_seq_lens_q is not None and max_length_q is not None and (on_gpu or compiling):
        lengths, bounds = [max_length_q], cu_seq_lens_q
    else:
        lengths, bounds = _bounds(position_ids, rows)
    if dtype := get_target_dtype(query, module) if on_gpu else None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    size = value.shape[-1]  # smaller than a key's in multi-head latent attention
    value = pad(value, [0, key.shape[-1] - size])
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    kernel = _on_gpu if on_gpu else _by_mask if compiling else _by_document
    out = kernel(query, key, value, lengths, bounds, scaling, sliding_window)
    return out[..., :size].unflatten(0, (rows, tokens)), None


def _bounds(position_ids: torch.Tensor, rows: int) -> tuple[list[int], torch.Tensor]:
    """The documents' lengths, and the tokens before each (int32, documents + 1), of all rows one after another."""
    if (known := _documents.get(position_ids)) is None:
        bounds = bounds_of(position_ids.expand(rows, -1).reshape(-1))
        known = _documents[position_ids] = (bounds.diff().tolist(), bounds)
    return known


def bounds_of(positions: torch.Tensor) -> torch.Tensor:
    """The tokens before each document (int32, documents + 1), from position ids that start again at each."""
    starts = torch.cat([positions.new_ones(1, dtype=torch.bool), positions.diff() != 1]).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([len(positions)])]).to(torch.int32)


def _on_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    bounds: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """(tokens, heads, size), by torch's kernel. Its window counts the keys before a token, transformers' the token, too
    (masking_utils.py, sliding_window_overlay)."""
    from torch.nn.attention.varlen import varlen_attn

    longest, grouped = max(lengths), query.shape[1] != key.shape[1]
    reach = window - 1 if window and window < longest else -1
    out = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=(reach, 0), enable_gqa=grouped
    )
    assert isinstance(out, torch.Tensor)  # the log-sum-exp too, if it were asked for
    return out


def _by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    bounds: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """The same by SDPA."""
    parts = []
    for q, k, v in zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True):
        mask = None
        if window and window < q.shape[1]:
            mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril().triu(1 - window)
        grouped = q.shape[0] != k.shape[0]
        out = scaled_dot_product_attention(
            q[None], k[None], v[None], mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        parts.append(out[0])
    return torch.cat(parts, dim=1).transpose(0, 1).contiguous()


def _by_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    bounds: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """The same in a form that can be compiled, for CPU ranks: all tokens at once, with a mask."""
    place = torch.arange(query.shape[0], device=query.device)
    document = torch.bucketize(place, bounds, right=True)
    back = place[:, None] - place
    mask = (document[:, None] == document) & (back >= 0)
    if window:
        mask = mask & (back < window)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=grouped)[0].transpose(0, 1)


def _tried(dtype: torch.dtype) -> str | None:
    """Why the kernel is not used: it differs from SDPA on a row of three documents, with gradients. None where not."""
    lengths = [40, 1, 87]
    bounds = torch.tensor([0, 40, 41, 128], dtype=torch.int32, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    results = []
    drawn = [torch.randn(128, heads, 64, generator=generator) for heads in (4, 2, 2)]
    for kernel in (_on_gpu, _by_document):
        q, k, v = (tensor.to(DEVICE, dtype).requires_grad_() for tensor in drawn)
        out = kernel(q, k, v, lengths, bounds, None, 16)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    # Rounding of 16 bit, as far as sums of 128 products carry it.
    for found, wanted in zip(*results, strict=True):
        difference = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        if not difference < 0.05:
            return f"torch's varlen_attn differs from SDPA by {difference:.2g} on this GPU"
    return None
