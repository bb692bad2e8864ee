"""Models whose published tensors transformers converts while it loads them: trained whole, saved, merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from running import Result, inject, launch
from safetensors.torch import load_file, save_file
from tiny import Tiny, make_tokenizer

from distft.config.loading import load_recipe
from distft.errors import RunError
from distft.runs.directory import RunDir
from distft.train import before_training
from distft.train.merge import merge
from distft.train.ranks import RankGroup

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
ONES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_experts": 4, "num_local_experts": 4, **EXPERTS}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16}
        | {"q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8, **EXPERTS},
    ),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma3": ("Gemma3ForConditionalGeneration", {"image_size": 28, "patch_size": 14}),
}


def make_base(folder: Path, family: str, dtype: str) -> None:
    """A random model of a family as it is published: saved by transformers in its original format."""
    import transformers

    name, more = ONES[family]
    kind = getattr(transformers, name)
    config: dict[str, Any] = SIZES | more
    if family == "gemma3":
        config = {"text_config": SIZES, "vision_config": VISION | more, "mm_tokens_per_image": 4}
        config |= {"image_token_index": 319, "boi_token_index": 318, "eoi_token_index": 317}
    torch.manual_seed(0)
    kind(kind.config_class(**config)).to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer(folder)


@pytest.fixture(scope="module")
def base(once: Callable[..., Path]) -> Callable[..., Path]:
    def made(family: str, dtype: str = "float32") -> Path:
        return once(f"converted/{family}-{dtype}", lambda folder: make_base(folder, family, dtype))

    return made


@pytest.mark.parametrize(
    ("family", "strategies"),
    [
        ("qwen3_moe", (("ddp", 1), ("fsdp", 2), ("zero3", 2))),
        ("deepseek_v3", (("ddp", 1),)),
        ("gemma3", (("zero3", 2),)),
    ],
)
def test_whole(
    family: str,
    strategies: tuple[tuple[str, int], ...],
    base: Callable[..., Path],
    tiny: Tiny,
    trained: Callable[..., Result],
) -> None:
    """final/ has the published names, and what every strategy trained."""
    model = base(family)
    changes = {"model__name_or_path": str(model), "lora": None, "training__max_steps": 3}
    runs = [trained(tiny.recipe(**changes, parallelism__strategy=name), ranks) for name, ranks in strategies]
    before = load_file(model / "model.safetensors")
    finals = [load_file(run.run_dir / "final/model.safetensors") for run in runs]
    for run, final in zip(runs, finals, strict=True):
        assert run.column("loss") == pytest.approx(runs[0].column("loss"), abs=1e-5)
        assert {name: t.shape for name, t in final.items()} == {name: t.shape for name, t in before.items()}
        for name, tensor in final.items():
            torch.testing.assert_close(tensor, finals[0][name], atol=1e-4, rtol=0)
    moved = [name for name, tensor in finals[0].items() if not torch.equal(tensor, before[name])]
    assert any("experts" in name or "language_model" in name for name in moved)


SMALL = "import os, distft.train.save as save; save.SHARD_BYTES = 50_000\n"
FULL_DISK = """
def flush(writer):
    raise OSError(28, "No space left on device")
if os.environ["RANK"] == "1":
    save.ShardWriter.flush = flush
"""


def test_ranks_write_a_part_each(
    base: Callable[..., Path], tiny: Tiny, trained: Callable[..., Result], tmp_path: Path
) -> None:
    """Small files, and experts that are stored one by one. A rank that cannot write ends the run, which says why."""
    changes = {"model__name_or_path": str(base("qwen3_moe")), "lora": None, "training__max_steps": 3}
    recipe = tiny.recipe(**changes, parallelism__strategy="fsdp")
    one = load_file(trained(recipe, 2).run_dir / "final/model.safetensors")
    done = launch(recipe, tmp_path, ranks=2, env=inject(tmp_path, "distft.train.run:save_trained", SMALL))
    several = [load_file(path) for path in sorted((done.run_dir / "final").glob("*.safetensors"))]
    assert len(several) > 3
    together = {name: tensor for tensors in several for name, tensor in tensors.items()}
    assert sum(map(len, several)) == len(together) == len(one)
    for name, tensor in one.items():
        torch.testing.assert_close(together[name], tensor, atol=1e-5, rtol=0)
    env = inject(tmp_path, "distft.train.run:save_trained", SMALL + FULL_DISK)
    failed = launch(recipe, tmp_path, ranks=2, env=env, expect=1)
    assert "No space left on device" in failed.status["reason"]
    assert not (failed.run_dir / "final").exists()


@pytest.mark.parametrize(
    ("family", "dtype", "strategy", "weights"),
    [
        ("mixtral", "float32", "ddp", 14),  # with router and experts: two parameters a block
        ("mixtral", "bfloat16", "ddp", 14),
        ("qwen3_moe", "float32", "ddp", 14),
        ("deepseek_v3", "float32", "ddp", 13),
        ("gemma3", "float32", "zero3", None),
    ],
)
def test_merge(
    family: str,
    dtype: str,
    strategy: str,
    weights: int | None,
    base: Callable[..., Path],
    tiny: Tiny,
    trained: Callable[..., Result],
    tmp_path: Path,
) -> None:
    """The default adapter, merged into tensors of the published names: the logits of base and adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = base(family, dtype)
    changes = {"model__name_or_path": str(model), "training__max_steps": 3, "parallelism__strategy": strategy}
    run = trained(tiny.recipe(**changes))
    assert not any("merge" in text for text in run.status["warnings"])
    answer = merge(RunDir(run.run_dir), tmp_path / "out")
    assert weights in (None, answer.weights.merged)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    rows = torch.arange(64).view(2, 32)
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # noqa: E731
    with torch.no_grad():
        found = load(tmp_path / "out")(rows).logits
        plain = load(model)
        untrained = plain(rows).logits
        wanted = PeftModel.from_pretrained(plain, run.run_dir / "final").eval()(rows).logits
    tolerance = 1e-5 if dtype == "float32" else 0.02
    assert (found - wanted).abs().max() / wanted.abs().max() < tolerance
    assert (untrained - wanted).abs().max() / wanted.abs().max() > 0.1


# ---- a base that does not fit its config.json


def spoilt(base: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> str:
    """A copy of a base with other tensors."""
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def before(recipe: dict[str, Any], folder: Path) -> list[str]:
    """What a rank does before its first step."""
    from distft.train.model import build_model

    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(folder / "recipe.yaml")
    return before_training.check(loaded, build_model(loaded, "ddp"), RunDir(folder), RankGroup())


def test_a_weight_is_missing(tiny: Tiny, tmp_path: Path) -> None:
    """It is named before the first step: transformers would draw it at random."""
    model = spoilt(tiny.path / "model", tmp_path / "base", lambda tensors: tensors.pop("lm_head.weight"))
    recipe = tiny.recipe(model__name_or_path=model, parallelism__strategy="zero3")
    run = launch(recipe, tmp_path, ranks=2, expect=1)
    assert f"{model} lacks lm_head.weight of LlamaForCausalLM, which would start as random" in run.status["reason"]
    assert run.metrics == []


@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 1), ("zero3", 2)])
def test_a_weight_of_another_shape(strategy: str, ranks: int, tiny: Tiny, tmp_path: Path) -> None:
    """It is named with both shapes, not shown as transformers' traceback."""
    name = "model.layers.1.mlp.up_proj.weight"
    model = spoilt(tiny.path / "model", tmp_path / "base", lambda t: t.update({name: t[name][:100].contiguous()}))
    run = launch(
        tiny.recipe(model__name_or_path=model, parallelism__strategy=strategy), tmp_path, ranks=ranks, expect=1
    )
    said = f"{model} does not fit its config.json: {name} is stored with the shape (100, 64), and LlamaForCausalLM has "
    assert f"DataError: model.name_or_path: {said}(128, 64)" in run.status["reason"]
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight"])
def test_a_base_of_another_model(name: str, tiny: Tiny, tmp_path: Path) -> None:
    """A bias that config.json turns off, a block beyond the last: the trained model would not be the published one."""
    model = spoilt(tiny.path / "model", tmp_path / "base", lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(RunError, match=f"does not fit its config.json: LlamaForCausalLM has no place for {name}"):
        before(tiny.recipe(model__name_or_path=model), tmp_path)


def test_weights_beside_the_model(tiny: Tiny, tmp_path: Path) -> None:
    """A value head is left out, which is said; buffers of old checkpoints are nothing to speak of."""
    names = ("v_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    more = {name: torch.ones(1) for name in names}
    model = spoilt(tiny.path / "model", tmp_path / "base", lambda tensors: tensors.update(more))
    assert before(tiny.recipe(model__name_or_path=model), tmp_path) == [f"not used of {model}: v_head.weight"]


def test_tied_weights_are_not_missing(tiny: Tiny, tmp_path: Path) -> None:
    assert before(tiny.recipe(model__name_or_path=str(tiny.path / "tied"), lora=None), tmp_path) == []


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_disk_without_room(lora: Any, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"final/ needs 0.00 GiB, and 0.00 GiB of this disk are free"):
        before(tiny.recipe(lora=lora), tmp_path)
