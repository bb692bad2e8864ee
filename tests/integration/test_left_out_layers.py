"""Models with layers that get no adapter or are not trained: image encoders, routers, state-space mixers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import small_model
from running import Result
from safetensors.torch import load_file
from test_conversion import SIZES, make_base
from tiny import Tiny, make_tokenizer

from distft.runs.directory import RunDir

EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "jamba": ("JambaForCausalLM", {**SIZES, **EXPERTS, **MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "phimoe": ("PhimoeForCausalLM", {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 2}),
}
LEFT_OUT = {"qwen2_5_vl": ("qkv",), "jamba": ("dt_proj", "x_proj", "out_proj", "router"), "phimoe": ("router",)}


def make_other(folder: Path, family: str) -> None:
    import transformers

    if family == "qwen2_5_vl":  # which AutoModelForCausalLM does not have
        small_model(family).save_pretrained(folder)
        make_tokenizer(folder)
        return
    name, config = OTHERS[family]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    kind(kind.config_class(**config)).float().save_pretrained(folder)
    make_tokenizer(folder)


def adapters(run: Result) -> dict[str, torch.Tensor]:
    return load_file(run.run_dir / "final/adapter_model.safetensors")


@pytest.mark.parametrize("lora", [{"r": 4}, None])
def test_images_and_text(lora: Any, once: Callable[..., Path], tiny: Tiny, trained: Callable[..., Result]) -> None:
    """Only Gemma 3's language model is trained, by adapters or whole: with the same losses under every strategy."""
    model = once("left_out/gemma3", lambda folder: make_base(folder, "gemma3", "float32"))
    changes = {"model__name_or_path": str(model), "lora": lora, "training__max_steps": 3}
    strategies = (("ddp", 1), ("ddp", 2), ("fsdp", 2), ("zero3", 2))
    runs = [trained(tiny.recipe(**changes, parallelism__strategy=name), ranks) for name, ranks in strategies]
    for run in runs:
        assert run.column("loss") == pytest.approx(runs[0].column("loss"), abs=1e-5)
        assert run.column("grad_norm") == pytest.approx(runs[0].column("grad_norm"), abs=1e-4)
    if lora:
        assert all(".language_model." in name for run in runs for name in adapters(run))
        return
    before = load_file(model / "model.safetensors")
    for run in runs:
        after = load_file(run.run_dir / "final/model.safetensors")
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if "language_model" in name}


@pytest.mark.parametrize("lora", [{"r": 4}, None])
def test_layers_that_images_alone_go_through(
    lora: Any, once: Callable[..., Path], tiny: Tiny, trained: Callable[..., Result]
) -> None:
    """Llama 3.2 Vision: its layers of cross attention are skipped where there is no image."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision = {"hidden_size": 32, "attention_heads": 2, "num_hidden_layers": 2, "num_global_layers": 1, "image_size": 32}
    vision |= {"intermediate_size": 32, "vision_output_dim": 64, "patch_size": 16, "intermediate_layers_indices": [0]}

    def make(folder: Path) -> None:
        text = {**SIZES, "num_hidden_layers": 3, "cross_attention_layers": [1], "pad_token_id": 0}
        config = AutoConfig.for_model("mllama", text_config=text, vision_config=vision)
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).float().save_pretrained(folder)
        make_tokenizer(folder)

    model = once("left_out/mllama", make)
    changes = {"model__name_or_path": str(model), "lora": lora, "training__max_steps": 3}
    runs = [
        trained(tiny.recipe(**changes, parallelism__strategy=name), ranks)
        for name, ranks in (("ddp", 1), ("ddp", 2), ("fsdp", 2))
    ]
    for run in runs:
        assert run.column("loss") == pytest.approx(runs[0].column("loss"), abs=1e-5)
    if lora:
        assert all(not any(".layers.1." in name for name in adapters(run)) for run in runs)


@pytest.mark.parametrize("family", LEFT_OUT)
def test_every_adapter_is_trained(
    family: str, once: Callable[..., Path], tiny: Tiny, trained: Callable[..., Result], tmp_path: Path
) -> None:
    """The default recipe leaves out what cannot have one."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from distft.train.merge import merge

    model = once(f"left_out/{family}", lambda folder: make_other(folder, family))
    changes = {"model__name_or_path": str(model), "training__max_steps": 3, "data__packing": False}
    run = trained(tiny.recipe(**changes, parallelism__strategy="ddp"), 2)
    found = adapters(run)
    assert all(tensor.any() for name, tensor in found.items() if "lora_B" in name)
    for layer in LEFT_OUT[family]:
        assert not any(f".{layer}." in name for name in found)
    assert any(".q_proj." in name for name in found)
    if family == "qwen2_5_vl":
        card, out = (run.run_dir / "final/README.md").read_text(), tmp_path / "merged"
        assert "model = AutoModelForImageTextToText.from_pretrained(" in card
        merge(RunDir(run.run_dir), out)
        assert "from transformers import AutoModelForImageTextToText\n" in (out / "README.md").read_text()
        plain, merged = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (model, out))
        rows = torch.arange(32)[None]
        with torch.no_grad():
            wanted = PeftModel.from_pretrained(plain, run.run_dir / "final").eval()(input_ids=rows).logits
            torch.testing.assert_close(merged.eval()(input_ids=rows).logits, wanted, atol=1e-5, rtol=1e-5)
