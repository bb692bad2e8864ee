"""A save that loses something fails the run: what is on disk is compared with what was in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Tiny

from distft.config.recipe import Recipe
from distft.errors import RunError
from distft.train.save import save_trained


def adapter_of(tiny: Tiny) -> Any:
    from transformers import AutoModelForCausalLM

    from distft.train.model import add_adapters

    recipe = Recipe.model_validate(tiny.recipe())
    return add_adapters(AutoModelForCausalLM.from_pretrained(tiny.path / "model"), recipe)


def full_of(tiny: Tiny) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.path / "model")


def change(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """An edit of the first weights file of a folder."""

    def apply(folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return apply


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(name for name in tensors if "lora_A" in name or "q_proj.weight" in name)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (change(lambda t: t.pop(first(t))), "missing"),
    "left over": (change(lambda t: t.update(other=torch.ones(1))), "other: was not trained"),
    "emptied": (change(lambda t: t.update({first(t): torch.zeros(0)})), "shape (0,)"),
    "cut": (change(lambda t: t.update({first(t): t[first(t)][:1].clone()})), "shape (1, "),
    "zeros": (change(lambda t: t.update({first(t): torch.zeros_like(t[first(t)])})), "all zeros on disk"),
    "another value": (change(lambda t: t[first(t)].view(-1)[-1].add_(1)), "other values on disk"),
    "no file": (lambda folder: next(folder.glob("*.safetensors")).unlink(), "missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("make", [adapter_of, full_of])
def test_damage_is_found(
    tiny: Tiny, tmp_path: Path, make: Callable, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What peft or transformers has written is damaged before it is read back; the save before it stays."""
    model, target = make(tiny), tmp_path / "final"
    options = {"tokenizer": _Tokenizer(), "writes": True, "dtype": torch.float32}
    save_trained(model, target, **options)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    write, (edit, problem) = model.save_pretrained, DAMAGE[damage]

    def write_and_damage(folder: Path, **kwargs: Any) -> None:
        write(folder, **kwargs)
        edit(folder)

    monkeypatch.setattr(model, "save_pretrained", write_and_damage)
    with pytest.raises(RunError, match="what was saved is not what was trained") as error:
        save_trained(model, target, **options)
    assert problem in str(error.value)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_an_adapter_that_is_dropped_is_found(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft leaves out a parameter that it does not know, so fewer tensors are saved than were trained."""
    model = adapter_of(tiny)
    model.register_parameter("stray", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(RunError, match=r"peft saves \d+ of the \d+ trained tensors"):
        save_trained(model, tmp_path / "final", tokenizer=_Tokenizer(), writes=True, dtype=torch.float32)
    assert not (tmp_path / "final").exists()


def test_an_adapter_is_loaded_as_it_was(tiny: Tiny, tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapter_of(tiny)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    save_trained(model, tmp_path / "final", tokenizer=_Tokenizer(), writes=True, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(full_of(tiny), tmp_path / "final")
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, loaded(ids).logits)


class _Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
