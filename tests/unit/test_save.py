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
from distft.train import save, tensor_files
from distft.train.ranks import RankGroup
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
def test_damage_of_an_adapter_is_found(
    tiny: Tiny, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What peft has written is damaged before it is read back; the save before it stays."""
    model, target = adapter_of(tiny), tmp_path / "final"
    options = {"tokenizer": _Tokenizer(), "ranks": RankGroup(), "dtype": torch.float32}
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


WHOLE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "another value": (lambda t: t[first(t)].view(-1)[-1].add_(1), "other values on disk than in memory"),
    "zeros": (lambda t: t[first(t)].zero_(), "other values on disk than in memory"),
    "cut": (lambda t: t.update({first(t): t[first(t)][:1].clone()}), "other values on disk than in memory"),
    "emptied": (lambda t: t.update({first(t): torch.zeros(0)}), "other values on disk than in memory"),
    "left over": (lambda t: t.update(other=torch.ones(1)), "other: was not trained"),
    "missing": (lambda t: t.pop(first(t)), "q_proj.weight: missing"),
    "no file": (lambda t: None, "No such file or directory"),
}


@pytest.mark.parametrize("damage", WHOLE)
def test_damage_of_a_whole_model_is_found(
    tiny: Tiny, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is read back as it is written, and all names at the end; the save before it stays."""
    model, target = full_of(tiny), tmp_path / "final"
    options = {"tokenizer": _Tokenizer(), "ranks": RankGroup(), "dtype": torch.float32}
    save_trained(model, target, **options)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    edit, problem = WHOLE[damage]
    write = tensor_files.save_file

    def write_damaged(tensors: dict[str, torch.Tensor], path: Path, **kwargs: Any) -> None:
        damaged = {name: tensor.clone() for name, tensor in tensors.items()}
        if any("q_proj.weight" in name for name in tensors):
            edit(damaged)
        if damage == "missing":
            tensors.pop(first(tensors))  # as if it had never come
        write(damaged, path, **kwargs)
        if damage == "no file":
            path.unlink()

    monkeypatch.setattr(tensor_files, "save_file", write_damaged)
    with pytest.raises(RunError) as error:
        save_trained(model, target, **options)
    assert problem in str(error.value)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_whole_model_in_several_files(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers itself reads it, in the dtype that was asked for."""
    from transformers import AutoModelForCausalLM

    model = full_of(tiny)
    monkeypatch.setattr(save, "SHARD_BYTES", 100_000)
    save_trained(model, tmp_path / "final", tokenizer=_Tokenizer(), ranks=RankGroup(), dtype=torch.bfloat16)
    files = sorted(path.name for path in (tmp_path / "final").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert loaded.dtype == torch.bfloat16
    for (name, want), (other, have) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(want.to(torch.bfloat16), have)


def test_an_adapter_that_is_dropped_is_found(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft leaves out a parameter that it does not know, so fewer tensors are saved than were trained."""
    model = adapter_of(tiny)
    model.register_parameter("stray", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(RunError, match=r"peft saves \d+ of the \d+ trained tensors"):
        save_trained(model, tmp_path / "final", tokenizer=_Tokenizer(), ranks=RankGroup(), dtype=torch.float32)
    assert not (tmp_path / "final").exists()


def test_an_adapter_is_loaded_as_it_was(tiny: Tiny, tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapter_of(tiny)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    save_trained(model, tmp_path / "final", tokenizer=_Tokenizer(), ranks=RankGroup(), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(full_of(tiny), tmp_path / "final")
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, loaded(ids).logits)


class _Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
