"""Which FlashAttention `auto` takes on a GPU: emulated packages, and a real choice among them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from tiny import Tiny

from distft.config.recipe import Recipe
from distft.errors import DataError
from distft.train import model, varlen

Choose = Callable[..., str]


@pytest.fixture
def choose(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Choose:
    """The choice with these packages on a GPU of this capability; varlen fails there."""

    def chosen(*versions: int, capability: tuple[int, int] = (9, 0), packing: bool = True, **config: object) -> str:
        for version in (2, 3, 4):
            name = f"flash_attention_{version}"
            _, package, module = model.PACKAGES[name]
            monkeypatch.setitem(model.PACKAGES, name, (lambda version=version: version in versions, package, module))
            parts = module.split(".")
            for part in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
                monkeypatch.setitem(sys.modules, part, ModuleType(part))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(varlen, "fails", lambda dtype: "no kernel")
        tree = tiny.recipe(training__mixed_precision="bf16", data__packing=packing)
        tree["model"]["attn_implementation"] = "auto"
        return model.choose_attention(Recipe.model_validate(tree), {"model_type": "llama"} | config)

    return chosen


def test_the_newest_that_can_run(choose: Choose) -> None:
    assert choose(2, 3, 4) == "flash_attention_4"
    assert choose(2, 3, 4, capability=(8, 0)) == "flash_attention_3"
    assert choose(2, 4, capability=(8, 0)) == "flash_attention_2"
    assert choose(2, 3, 4, head_dim=192) == "flash_attention_3"
    assert choose(2, 3, 4, attention_dropout=0.1) == "flash_attention_2"
    assert choose(4, capability=(8, 0)) == "sdpa"
    assert choose(2, 3, 4, capability=(12, 0)) == "flash_attention_2"  # an RTX 5090: the others have no kernels
    assert choose(2, 3, capability=(10, 0)) == "flash_attention_2"
    assert choose(2, 3, 4, text_config={"attention_dropout": 0.1}) == "flash_attention_2"
    assert choose(2, 3, 4, model_type="llama4") == "sdpa"


def test_one_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that was built for another torch."""
    monkeypatch.setitem(model.PACKAGES, "flash_attention_2", (lambda: True, "flash-attn", "no_such_module"))
    assert model._missing("flash_attention_2") == "flash-attn cannot be imported: No module named 'no_such_module'"
    assert model._missing("flash_attention_4") == "flash-attn-4 is not installed"


def test_a_model_without_flex_attention(tiny: Tiny) -> None:
    """transformers refuses it when it makes the model; here, on the CPU, where a rule would have refused it before."""
    from transformers import MptConfig, MptForCausalLM

    folder = tiny.path / "mpt"
    MptForCausalLM(MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=320)).save_pretrained(folder)
    tree = tiny.recipe(model__name_or_path=str(folder), model__attn_implementation="flex_attention")
    with pytest.raises(DataError, match=r"model\.attn_implementation: MptForCausalLM does not support an attention"):
        model.build_model(Recipe.model_validate(tree), "ddp")
