"""model.attn_implementation: varlen: how torch's kernel is called, what is refused. Models: test_packing.py."""

from __future__ import annotations

import pytest
import torch
from fake_cuda.varlen import dense
from torch.nn.attention import varlen as kernels

from distft.models.attention import no_varlen
from distft.train import varlen

LENGTHS = (5, 1, 9)  # one is longer than the windows of 7 tokens


def positions() -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS])[None]


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_how_the_kernel_is_called(monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], window: int | None) -> None:
    """What torch's documentation says of its arguments, computed densely, is what is computed document by document."""
    monkeypatch.setattr(kernels, "varlen_attn", dense)
    torch.manual_seed(0)
    query, key, value = (torch.randn(sum(LENGTHS), n, 8) for n in (heads[0], heads[1], heads[1]))
    lengths, bounds = varlen._bounds(positions(), 1)
    assert (lengths, bounds.tolist(), bounds.dtype) == ([5, 1, 9], [0, 5, 6, 15], torch.int32)
    results = [
        kernel(query, key, value, lengths, bounds, 0.3, window) for kernel in (varlen._on_gpu, varlen._by_document)
    ]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_with_a_mask_it_is_the_same(heads: tuple[int, int], window: int | None) -> None:
    torch.manual_seed(0)
    drawn = [torch.randn(sum(LENGTHS), n, 8) for n in (heads[0], heads[1], heads[1])]
    results = []
    for kernel in (varlen._by_mask, varlen._by_document):
        tensors = [tensor.clone().requires_grad_() for tensor in drawn]
        out = kernel(*tensors, *varlen._bounds(positions(), 1), 0.3, window)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_is_a_part_of_a_graph(window: int | None) -> None:
    """Traced on the CPU, which has no such kernel: a graph for the first lengths, and two for all others."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    attend = torch.compile(varlen._on_gpu, backend=backend, fullgraph=True)
    for lengths in ((5, 1, 9), (7, 9, 4), (5, 6, 8, 2), (4, 6), (3, 1, 1, 1, 12), (30, 1)):
        query, key, value = (torch.randn(sum(lengths), heads, 8, requires_grad=True) for heads in (4, 2, 2))
        bounds = varlen.bounds_of(torch.cat([torch.arange(length) for length in lengths]))
        with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
            attend(query, key, value, [max(lengths)], bounds, 0.3, window)
    assert len(graphs) <= 3 and all("varlen_attn" in code for code in graphs)


def test_documents_of_several_rows() -> None:
    """Rows without documents of their own have the same positions, which models make themselves."""
    assert varlen._bounds(torch.arange(4)[None], 3)[0] == [4, 4, 4]
    assert varlen._bounds(torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]), 2)[0] == [2, 2, 4]


def test_what_it_does_not_do() -> None:
    module, tensors = torch.nn.Module(), [torch.randn(1, 2, 3, 4)] * 3
    ids = torch.arange(3)[None]
    mask = torch.ones(1, 1, 3, 3)
    for options in ({"dropout": 0.1}, {"softcap": 5.0}, {"s_aux": torch.ones(2)}, {"is_causal": False}):
        with pytest.raises(RuntimeError, match="has no mask, dropout, cap of scores, or sinks"):
            varlen.attend(module, *tensors, None, position_ids=ids, **options)
    with pytest.raises(RuntimeError, match="has no mask"):
        varlen.attend(module, *tensors, mask, position_ids=ids)
    with pytest.raises(RuntimeError, match="not told where documents begin"):
        varlen.attend(module, *tensors, None)


def test_which_models() -> None:
    llama = {"model_type": "llama"}
    assert no_varlen(llama | {"attention_dropout": 0.0}) is None
    assert "no dropout" in str(no_varlen(llama | {"attention_dropout": 0.1}))
    assert "no dropout" in str(no_varlen({"model_type": "gpt2", "attn_pdrop": 0.1}))
    assert "gpt_bigcode models" in str(no_varlen({"model_type": "gpt_bigcode"}))
    assert "llama models" in str(no_varlen(llama | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}))


def test_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU (here the CPU, which is said to be one) the kernel is tried first, and not used where it is wrong."""
    assert varlen.fails(torch.bfloat16) is None  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(varlen, "DEVICE", "cpu")
    assert "varlen_attn" in str(varlen.fails(torch.bfloat16))  # no kernel for it
    monkeypatch.setattr(kernels, "varlen_attn", lambda query, key, value, cu_seq_q: query)  # another torch's
    assert "argument" in str(varlen.fails(torch.bfloat16))
    monkeypatch.setattr(kernels, "varlen_attn", dense)
    assert varlen.fails(torch.bfloat16) is None and varlen.fails(torch.float16) is None
    monkeypatch.setattr(kernels, "varlen_attn", lambda *args, **options: dense(*args, **options | {"scale": 0.5}))
    assert "differs from SDPA" in str(varlen.fails(torch.bfloat16))
