"""training.loss: chunked: loss and gradients are those of all logits at once, whatever the model does to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from distft.data.formats import IGNORE
from distft.models import chunks
from distft.train import chunked_loss
from distft.train.losses import mean_loss
from distft.train.new_rows import add_new_rows, new_rows

VOCABULARY, ROWS, TOKENS = 300, 3, 70
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "output_router_logits": True}
EXPERTS |= {"router_aux_loss_coef": 0.5}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 4.0},
    "granite": {"logits_scaling": 0.25},
    "phi": {},  # its output layer has a bias
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
}


def make(model_type: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | MODELS[model_type] | more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # else all logits are near 0, where a cap does nothing
    return model


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS))
    labels = ids.masked_fill(torch.rand(ROWS, TOKENS) < 0.3, IGNORE)
    labels[1] = IGNORE  # a row of which nothing is trained
    return {"input_ids": ids, "labels": labels}


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Any, base: Any, loss_type: str = "nll", tolerance: float = 1e-5) -> None:
    """With a chunk of 64 tokens, so that there are several."""
    count = torch.tensor(100)
    inputs = batch()
    assert not hasattr(model, "hf_device_map")
    if loss_type == "nll":
        whole = model(**inputs, num_items_in_batch=count).loss
    else:
        labels = inputs["labels"]
        whole = mean_loss(loss_type)(model(input_ids=inputs["input_ids"]), labels, count)
    expected = gradients(model, whole)
    assert chunked_loss.obstacle(base, "ddp") is None
    chunked_loss.add(base)
    loss = model(**inputs, chunked=loss_type, num_items_in_batch=count).loss
    assert loss.item() == pytest.approx(whole.item(), rel=tolerance)
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=tolerance * float(gradient.abs().max())), name
    again = model(**inputs, num_items_in_batch=count).loss  # its own forward is still there
    if loss_type == "nll":
        assert again.item() == whole.item()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64 * 4 * VOCABULARY)
    assert chunks.chunk_tokens(VOCABULARY) == 64 < ROWS * TOKENS // 2


@pytest.mark.parametrize("model_type", MODELS)
def test_as_the_model_computes_it(model_type: str) -> None:
    model = make(model_type)
    model.train()
    assert_same(model, model)


@pytest.mark.parametrize("loss_type", ["dft", "eaft"])
def test_other_losses(loss_type: str) -> None:
    model = make("llama")
    assert_same(model, model, loss_type)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["adapter", "dora", "copy"],
)
def test_what_peft_puts_on_the_output_layer(options: dict[str, Any]) -> None:
    base = make("llama")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **options))
    assert_same(model, base)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens(tied: bool) -> None:
    base = make("llama", tie_word_embeddings=tied)
    add_new_rows(base, [7, 9])
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    rows = new_rows(model)
    assert rows is not None
    with torch.no_grad():
        for parameter in rows.requires_grad_(True).parameters():
            parameter.add_(1)
    assert_same(model, base)


def test_bfloat16_is_summed_in_float32() -> None:
    """The gradient of a trained output layer: nearer to float32's than 16-bit sums of chunks would be."""
    wide = make("llama")
    chunked_loss.add(wide)
    exact = gradients(wide, wide(**batch(), chunked="nll", num_items_in_batch=100).loss)["lm_head.weight"]
    low = make("llama").to(torch.bfloat16)
    whole = gradients(low, low(**batch(), num_items_in_batch=100).loss)["lm_head.weight"].float()
    chunked_loss.add(low)
    found = gradients(low, low(**batch(), chunked="nll", num_items_in_batch=100).loss)["lm_head.weight"].float()
    assert (found - exact).norm() < 1.1 * (whole - exact).norm()


def test_nothing_is_trained_and_nothing_is_kept() -> None:
    model = make("llama")
    chunked_loss.add(model)
    inputs = batch()
    nothing = inputs | {"labels": torch.full_like(inputs["labels"], IGNORE)}
    loss = model(**nothing, chunked="nll", num_items_in_batch=1).loss
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(model, loss).values())
    with torch.no_grad():
        assert not model(**inputs, chunked="nll").loss.requires_grad


def test_what_cannot() -> None:
    assert "no output layer" in str(chunked_loss.obstacle(torch.nn.Linear(2, 2), "ddp"))
    base = make("llama")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"]))
    assert "ZeRO-3" in str(chunked_loss.obstacle(base, "zero3"))
    assert chunked_loss.obstacle(base, "zero2") is None
    base.config.output_router_logits = True
    assert "a router loss of its own" in str(chunked_loss.obstacle(base, "ddp"))
