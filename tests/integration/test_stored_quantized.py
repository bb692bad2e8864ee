"""Checkpoints that are stored quantized: planned as they are, trained the same under every strategy, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import distft
from safetensors.torch import load_file, save_file
from tiny import Tiny, make_tokenizer

LLAMA_70B = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
LLAMA_70B |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def plan(tiny: Tiny, folder: Path, command: str, stored: dict[str, Any], *more: str, **changes: Any) -> Any:
    """`distft plan` or another command for a 70B that is stored like this."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text(json.dumps(LLAMA_70B | stored))
    changes = {"training__mixed_precision": "bf16", **changes}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(model__name_or_path="model", **changes)))
    return distft(command, "recipe.yaml", "--gpus-per-node", "1", *more, cwd=folder)


@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_is_planned_in_its_own_bytes(double: bool, tiny: Tiny, tmp_path: Path) -> None:
    """As model.quantization: nf4 of the plain model; scales that are not quantized take 3 bytes in 64 elements more."""
    gpu = ("--gpu", "h200", "--json")
    stored = {"quantization_config": BNB4 | {"bnb_4bit_use_double_quant": double}}
    found = json.loads(plan(tiny, tmp_path, "plan", stored, *gpu).stdout)
    plain = json.loads(plan(tiny, tmp_path, "plan", {}, *gpu, model__quantization="nf4").stdout)
    linear = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    more = 0 if double else linear // 64 * 3 - 4 * linear // 64 // 256
    assert found["memory"]["parameters"] == plain["memory"]["parameters"] + more
    assert found["model"]["trainable_parameters"] == plain["model"]["trainable_parameters"]
    stored["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "model.layers.1.mlp"]
    kept = json.loads(plan(tiny, tmp_path, "plan", stored, *gpu).stdout)
    mlp = 3 * 8192 * 28672
    assert kept["memory"]["parameters"] - found["memory"]["parameters"] == pytest.approx(1.5 * mlp, rel=0.05)


@pytest.mark.parametrize(
    ("stored", "changes", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, {}, "(awq), and nothing is trained on top"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, {}, "(modelopt), and nothing is trained on top"),
        ({"quant_method": "mxfp4"}, {"lora": None}, "(mxfp4) and cannot be trained; add `lora:`"),
        (BNB4, {"lora": None}, "(bitsandbytes) and cannot be trained; add `lora:`"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    stored: dict[str, Any], changes: dict[str, Any], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    """By plan, validate and launch alike; nothing is written."""
    for command in ("plan", "validate", "launch"):
        done = plan(tiny, tmp_path, command, {"quantization_config": stored}, **changes)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "unquantized repository" in done.stderr
        assert not (tmp_path / "runs").exists()


def test_older_and_multimodal_configs(tiny: Tiny, tmp_path: Path) -> None:
    """Where else a config.json has it."""
    for stored in (
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}},
    ):
        assert "(compressed-tensors), and nothing" in plan(tiny, tmp_path, "plan", stored).stderr


def quantize(tiny: Tiny, folder: Path, kind: str) -> None:
    """A tiny base in fp8 (as DeepSeek's and Qwen's) or mxfp4 (as gpt-oss)."""
    if kind == "mxfp4":
        from transformers import GptOssConfig, GptOssForCausalLM

        sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        types = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
        torch.manual_seed(0)
        GptOssForCausalLM(GptOssConfig(**sizes, **types)).save_pretrained(folder)
        make_tokenizer(folder)
    else:
        folder.mkdir()
        for path in (tiny.path / "model").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    made, generator = {}, torch.Generator().manual_seed(0)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if kind == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, width_in, width_out = tensor.shape
            blocks = (experts, width_out, width_in // 32, 16)
            made[f"{name}_blocks"] = torch.randint(0, 256, blocks, dtype=torch.uint8, generator=generator)
            made[f"{name}_scales"] = torch.full(blocks[:3], 121, dtype=torch.uint8)
        elif kind == "fp8" and name.endswith("proj.weight"):
            scale = tensor.abs().max() / 448
            made[name] = (tensor / scale).to(torch.float8_e4m3fn)
            made[name.replace(".weight", ".weight_scale_inv")] = scale.reshape(1, 1).bfloat16()
        else:
            made[name] = tensor.bfloat16()
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    stored: dict[str, Any] = {"quant_method": kind}
    if kind == "fp8":
        stored |= {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "quantization_config": stored}))


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_dequantized(kind: str, tiny: Tiny, trained: Any, tmp_path: Path, once: Any) -> None:
    """The same losses under every strategy, near those of the plain model; what a merge could not do is said."""
    base = once(f"stored-{kind}", lambda folder: quantize(tiny, folder / "base", kind)) / "base"
    changes = {"data__packing": False, "training__mixed_precision": "bf16", "training__max_steps": 3}
    changes |= {"model": {"name_or_path": str(base), "attn_implementation": "eager"}}
    runs = [
        trained(tiny.recipe(**changes, parallelism__strategy=strategy), ranks)
        for strategy, ranks in (("ddp", 1), ("zero3", 2), ("fsdp", 2))
    ]
    for run in runs:
        assert run.column("loss") == pytest.approx(runs[0].column("loss"), rel=2e-3)
        assert any("the base is stored quantized" in text for text in run.status["warnings"])
    if kind == "fp8":
        plain = changes | {"model": {"name_or_path": str(tiny.path / "model"), "attn_implementation": "eager"}}
        assert runs[0].column("loss") == pytest.approx(trained(tiny.recipe(**plain)).column("loss"), rel=1e-2)
