"""The simulation, compared with real tensors, with the full depth, and with itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from distft.config.loading import load_recipe
from distft.planner.counting import Counted
from distft.planner.memory import Memory
from distft.planner.setting import Setting
from distft.simulation import depth
from distft.simulation.depth import sample
from distft.simulation.fake_model import base, build, sizes_of
from distft.simulation.simulate import Traced, simulate
from distft.simulation.trace import Trace, trace

TOKENS, VOCABULARY, HIDDEN = 2 * 64, 480, 64
TOP = r"training.train_only=['model\.layers\.-[12345]', lm_head]"
MIDDLE = r"training.train_only=['model\.layers\.3\.mlp']"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulate")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes).save_pretrained(folder / "llama")
    LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=7, **sizes).save_pretrained(folder / "deep")
    GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_head=4, n_layer=2, n_positions=64).save_pretrained(
        folder / "gpt2"
    )
    large = {"vocab_size": 128256, "num_key_value_heads": 8}
    LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **large
    ).save_pretrained(folder / "8b")
    LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **large
    ).save_pretrained(folder / "70b")
    (folder / "data.jsonl").write_text('{"text": "a"}\n')
    (folder / "recipe.yaml").write_text(
        "name: t\nmodel: {name_or_path: llama}\ndata: {train: data.jsonl, max_length: 64}\n"
        "training: {global_batch_size: 2, micro_batch_size: 2, mixed_precision: 'no'}\n"
    )
    return folder


def recipe(folder: Path, *sets: str) -> Any:
    return load_recipe(folder / "recipe.yaml", sets)


def run(folder: Path, *sets: str, **options: Any) -> Memory:
    options = {"strategy": "ddp", "micro_batch_size": 2} | options
    return simulate(recipe(folder, *sets), Setting(**options))


def traced(folder: Path, *sets: str, **options: Any) -> Trace:
    wanted = recipe(folder, *sets)
    options = {"dtype_regime": "autocast", "micro_batch_size": 2, "gradient_checkpointing": False} | options
    # Eager attention: which kernel SDPA takes on a CPU differs between fake and real tensors.
    model = build(wanted, options["dtype_regime"], "eager")
    return trace(wanted, model, attn_implementation="eager", **options)


def real_parameters() -> int:
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2
    return 2 * (attention + 3 * HIDDEN * 176 + 2 * HIDDEN) + 2 * VOCABULARY * HIDDEN + HIDDEN


def test_states_of_full_fine_tuning(folder: Path) -> None:
    found, count = run(folder, "lora=null"), real_parameters()
    assert found.model_parameters == found.trainable_parameters == count
    assert (found.parameters, found.gradients) == (4 * count, 4 * count)
    assert 8 * count <= found.optimizer <= 8 * count + 4 * 100  # and a step counter per tensor


def test_states_of_lora(folder: Path) -> None:
    found, count = run(folder, "lora.r=4", "training.mixed_precision=bf16"), real_parameters()
    trained = 2 * 4 * (2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + HIDDEN // 2) + 3 * (HIDDEN + 176))
    assert (found.model_parameters, found.trainable_parameters) == (count, trained)
    assert (found.parameters, found.gradients) == (2 * count + 4 * trained, 4 * trained)
    assert 8 * trained <= found.optimizer <= 8 * trained + 4 * 2 * 7 * 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "sets",
    [
        ["lora=null"],
        ["lora.r=4"],
        ["lora.r=4", "training.mixed_precision=bf16"],
        ["lora=null", "model.name_or_path=gpt2"],
    ],
    ids=["full", "lora", "lora-bf16", "gpt2"],
)
def test_the_peak_of_fake_tensors_is_that_of_real_ones(folder: Path, sets: list[str], checkpointing: bool) -> None:
    # One row without packing: a real run checks whether a mask is needed, a fake one must assume that it is.
    options = {"gradient_checkpointing": checkpointing, "cuda": False, "micro_batch_size": 1}
    sets = [*(s.replace("=gpt2", f"={folder / 'gpt2'}") for s in sets), "data.packing=false"]
    fake, real = traced(folder, *sets, **options), traced(folder, *sets, fake=False, **options)
    assert fake.states == real.states
    assert fake.peaks.keys() == real.peaks.keys()
    for segment in fake.peaks:
        assert fake.total(segment) == pytest.approx(real.total(segment), rel=0.01), segment


@pytest.mark.parametrize(
    ("strategy", "sets", "checkpointing"),
    [
        ("ddp", ["lora=null"], False),
        ("ddp", ["training.mixed_precision=bf16"], True),
        ("fsdp", ["training.mixed_precision=bf16"], False),
        ("zero2", ["training.mixed_precision=bf16", "lora=null"], True),
        ("ddp", ["lora=null", "training.global_batch_size=8"], False),
        ("ddp", ["lora=null", TOP], False),
        ("zero3", ["lora=null", TOP, "training.mixed_precision=bf16"], True),
        ("ddp", ["lora=null", MIDDLE], False),
    ],
)
def test_some_blocks_are_all_of_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, sets: list[str], checkpointing: bool
) -> None:
    options = {"strategy": strategy, "gradient_checkpointing": checkpointing, "world_size": 2, "shard_size": 2}
    sets = [*sets, f"model.name_or_path={folder / 'deep'}"]
    more = {2, 3, 5} if TOP in sets else {3, 4, 5} if MIDDLE in sets else set()
    assert sample(base(recipe(folder, *sets), "sdpa")).chosen == tuple(sorted({0, 1, 6} | more))
    some = run(folder, *sets, **options)
    monkeypatch.setattr(depth, "sample", depth.whole)
    assert some == run(folder, *sets, **options)


@pytest.mark.parametrize(
    ("sets", "trained"),
    [
        (["lora.layers_to_transform=[3,4]"], 2),
        (["lora.layers_to_transform=[0,1,2,3,4,5,6]"], 7),
        ([r"lora.target_modules='model\.layers\.[23]\..*_proj'"], 2),
        ([r"lora.alpha_pattern={'layers\.5\..*': 8}"], 7),
        (["lora.rank_pattern={q_proj: 8}", "lora.exclude_modules=[k_proj]"], 0),
    ],
)
def test_blocks_with_adapters_of_their_own_are_all_traced(folder: Path, sets: list[str], trained: int) -> None:
    wanted = recipe(folder, f"model.name_or_path={folder / 'deep'}", "lora.r=4", *sets)
    counted = Traced(wanted)
    assert counted.sample.is_whole is bool(trained)
    if trained:
        attention, mlp = 2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + HIDDEN // 2), 3 * (HIDDEN + 176)
        assert counted.sizes.trained == trained * 4 * (attention + mlp)
    assert simulate(wanted, Setting("ddp", micro_batch_size=2)).trainable_parameters == counted.sizes.trained


EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
# Linear attention in three of four blocks; experts in all blocks but two; layers whose type is in the config.
MIXED = {
    "qwen3_next": {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "num_experts": 4, **EXPERTS},
    "glm4_moe": {"first_k_dense_replace": 2, "n_routed_experts": 4, **EXPERTS},
    "gemma3_text": {"sliding_window": 16, "sliding_window_pattern": 3, "head_dim": 16},
}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_one_block_of_each_kind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, strategy: str
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model_type": kind, **sizes, "vocab_size": 480, "num_hidden_layers": 8, "pad_token_id": 0, **MIXED[kind]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sets = [f"model.name_or_path={tmp_path}", "training.mixed_precision=bf16", "data.packing=false"]
    setting = Setting(strategy, micro_batch_size=2, world_size=2, shard_size=2 if strategy == "zero3" else 1)
    some = Traced(wanted := recipe(folder, *sets))
    found = Counted(wanted, some).exactly(setting)
    assert not some.sample.is_whole
    monkeypatch.setattr(depth, "sample", depth.whole)
    every = simulate(recipe(folder, *sets), setting)
    assert found.peak == pytest.approx(every.peak, rel=0.01)
    assert found.states == every.states
    assert (found.model_parameters, found.trainable_parameters) == (every.model_parameters, every.trainable_parameters)


# What a model asks of values that fake tensors do not have.
ASKING = {
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 16, "num_local_experts": 4},  # a list of tokens per expert
    "longcat_flash": {  # a loop over the experts that have tokens
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 48,
        "n_routed_experts": 4,
        "zero_expert_num": 0,
        "moe_topk": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 32,
        "num_key_value_heads": 4,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "head_dim": 8,
        "v_head_dim": 16,
    },
    "llama": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},  # the last position
}


@pytest.mark.parametrize("kind", ASKING)
def test_what_depends_on_values(folder: Path, tmp_path: Path, kind: str) -> None:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = {"model_type": kind, **sizes, "vocab_size": VOCABULARY, "pad_token_id": 0, **ASKING[kind]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"cuda": False, "micro_batch_size": 1}
    sets = [f"model.name_or_path={tmp_path}", "data.packing=false", "lora.target_modules=[q_proj, kv_proj, q_b_proj]"]
    fake, real = traced(folder, *sets, **options), traced(folder, *sets, fake=False, **options)
    assert fake.states == real.states
    for segment in real.peaks:
        assert fake.total(segment) == pytest.approx(real.total(segment), rel=0.02), segment


@pytest.mark.parametrize("tuning", ["lora={}", "lora=null"])
def test_experts_in_float32(folder: Path, tmp_path: Path, tuning: str) -> None:
    """torch tells the shapes of grouped products in bf16 alone: they are those of a real step."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, **EXPERTS}
    config = {"model_type": "qwen3_moe", **sizes, "vocab_size": VOCABULARY, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sets = [f"model.name_or_path={tmp_path}", "data.packing=false", tuning]
    options = {"cuda": False, "micro_batch_size": 1}
    fake, real = traced(folder, *sets, **options), traced(folder, *sets, fake=False, **options)
    assert fake.states == real.states
    for segment in real.peaks:
        assert fake.total(segment) == pytest.approx(real.total(segment), rel=0.02), segment
    simulated = simulate(recipe(folder, *sets), Setting("ddp", micro_batch_size=2))
    half = simulate(recipe(folder, *sets, "training.mixed_precision=bf16"), Setting("ddp", micro_batch_size=2))
    assert half.activations < simulated.activations < 2.1 * half.activations


def test_the_line_is_what_is_traced(folder: Path) -> None:
    wanted = recipe(folder, "training.mixed_precision=bf16", "training.global_batch_size=64")
    counted = Counted(wanted, Traced(wanted))
    for strategy in ("ddp", "zero3"):
        setting = Setting(strategy, micro_batch_size=16, world_size=2, shard_size=2 if strategy == "zero3" else 1)
        assert counted.memory(setting).peak == pytest.approx(counted.exactly(setting).peak, rel=0.02)


def test_checkpointing_keeps_one_hidden_state_a_layer(folder: Path) -> None:
    off, on = (traced(folder, gradient_checkpointing=value) for value in (False, True))
    assert on.peaks["loss", None]["activations"] < off.peaks["loss", None]["activations"]
    below, above = (on.peaks["forward", index]["activations"] for index in (0, 1))
    assert above - below == 4 * TOKENS * HIDDEN
    assert on.peaks["backward", 1]["activations"] < off.peaks["backward", 1]["activations"]


def test_logits(folder: Path) -> None:
    assert run(folder).peaks.keys() == {"load", "forward", "loss", "backward", "optimizer"}
    # float32: the output is its own upcast; plus log-probabilities and their gradient in the backward pass.
    assert traced(folder).peaks["backward", None]["logits"] == 3 * 4 * TOKENS * VOCABULARY
    half = traced(folder, "training.mixed_precision=bf16")
    assert half.peaks["loss", None]["logits"] == (2 + 4 + 4) * TOKENS * VOCABULARY


def test_accumulated_gradients_live_through_the_forward_pass(folder: Path) -> None:
    once, twice = run(folder, "lora=null"), run(folder, "lora=null", "training.global_batch_size=4")
    assert twice.peaks["loss"] - once.peaks["loss"] == once.gradients


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp", "hsdp"])
@pytest.mark.parametrize("lora", ["lora=null", "lora.r=4"])
def test_what_strategies_divide(folder: Path, strategy: str, lora: str) -> None:
    options = {"strategy": strategy, "world_size": 4, "nproc_per_node": 4}
    wanted = [lora, "training.mixed_precision=bf16"]
    two, four = (run(folder, *wanted, shard_size=size, **options) for size in (2, 4))
    assert four.optimizer == pytest.approx(two.optimizer / 2, rel=0.01)
    assert (four.gradients < two.gradients) == (strategy != "zero1")
    assert (four.parameters < two.parameters) == (strategy in ("zero3", "fsdp", "hsdp"))
    if strategy in ("fsdp", "hsdp"):
        everything = run(folder, *wanted)
        assert four.parameters == pytest.approx(everything.parameters / 4, rel=0.01)


def test_offload_moves_the_states_to_the_host(folder: Path) -> None:
    here = run(folder, "lora=null", strategy="zero2", shard_size=2, world_size=2, nproc_per_node=2)
    away = run(folder, "lora=null", strategy="zero2", offload="optimizer", shard_size=2, world_size=2, nproc_per_node=2)
    assert (away.optimizer, away.gradients) == (0, 0)
    sums = 4 * here.trainable_parameters  # of gradients, over micro-batches
    moved = away.host_per_node - here.host_per_node  # which has room for checkpoints
    assert moved == pytest.approx(2 * (here.optimizer + here.gradients) + sums, rel=0.01)


@pytest.mark.parametrize(("quantization", "bytes_per_weight"), [("nf4", 0.5 + 0.0159), ("int8", 1.0)])
def test_quantized_base(folder: Path, quantization: str, bytes_per_weight: float) -> None:
    sets = ["training.mixed_precision=bf16", f"model.quantization={quantization}", "lora.r=4"]
    found = run(folder, *sets, gradient_checkpointing=True)
    linear = real_parameters() - 2 * VOCABULARY * HIDDEN - 5 * HIDDEN
    rest = 2 * (real_parameters() - linear) + 4 * found.trainable_parameters
    tables = 2 * 7 * 4 * (256 + 16 + 256)  # code books, and int8's scale per row
    assert 0 <= found.parameters - rest - bytes_per_weight * linear <= tables
    divided = sizes_of(recipe(folder, *sets), build(recipe(folder, *sets), "zero", "sdpa"))
    assert divided.frozen_bytes == pytest.approx(found.parameters - 4 * found.trainable_parameters, rel=0.3)


@pytest.mark.parametrize(
    ("optim", "low", "high"), [("adamw_torch", 8, 8.1), ("adafactor", 0, 4), ("adamw_bnb_8bit", 2, 8)]
)
def test_optimizers(folder: Path, optim: str, low: float, high: float) -> None:
    found = run(folder, "lora=null", f"training.optim={optim}")
    assert low <= found.optimizer / found.trainable_parameters <= high
    if optim == "adamw_torch":  # foreach: a square root of every second moment at once
        fused = run(folder, "lora=null")
        assert found.peaks["optimizer"] - fused.peaks["optimizer"] >= 4 * found.trainable_parameters


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2", "eager"])
def test_attention(folder: Path, attention: str) -> None:
    sets = ["training.mixed_precision=bf16", "data.max_length=256"]
    peak = run(folder, *sets, attn_implementation=attention).peaks["backward"]
    flash = run(folder, *sets, attn_implementation="flash_attention_2").peaks["backward"]
    # A mask for every layer, and scores for every head of every layer.
    assert peak == flash if attention == "flash_attention_2" else peak - flash > 2 * 2 * 256**2 * 2


@pytest.mark.parametrize(
    "step",
    [
        "smollm2-360m  lora32  eager 1x4096",
        "tinyllama     nf4:32  eager 2x2048",
        "smollm2-135m  nf4:32  sdpa  2x512",
        "qwen2.5-7b    nf4:16  sdpa  1x1024",
    ],
)
def test_steps_that_were_measured_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import accuracy_measured

    found = accuracy_measured.run(tmp_path, step)
    assert len(found["table"]) == 1
    assert abs(found["table"][0]["ratio"] - 1) <= 0.01, capsys.readouterr().out


@pytest.mark.parametrize(("model", "limit"), [("8b", 15), ("70b", 60)])
def test_time(folder: Path, model: str, limit: float) -> None:
    sets = ["data.max_length=2048", "training.mixed_precision=bf16", f"model.name_or_path={folder / model}"]
    start = time.perf_counter()
    found = run(folder, *sets, strategy="zero3", shard_size=8, world_size=8, gradient_checkpointing=True)
    seconds = time.perf_counter() - start
    print(f"{model}: {seconds:.1f} s, peak {found.peak / 2**30:.1f} GiB")
    assert seconds < 4 * limit  # a loaded machine


def test_torch_is_not_imported() -> None:
    code = "import sys, distft.jobs.planned, distft.planner.sharding; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
