"""Memory by formula: against the simulation, by hand, and how it must change with what it depends on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distft.config.loading import load_recipe
from distft.models.shapes import read_model_shape
from distft.planner import activations
from distft.planner.activations import Mode
from distft.planner.memory import Estimator, Memory
from distft.planner.setting import Setting

COMMON = {"vocab_size": 1000, "max_position_embeddings": 512, "tie_word_embeddings": False, "pad_token_id": None}
SIZES = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 688}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, **SIZES, **COMMON},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 64, **SIZES, **COMMON},
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 4, "head_dim": 32, **SIZES, **COMMON},
    "gpt2": {"model_type": "gpt2", "vocab_size": 1000, "n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": 512},
    "phi3": {"model_type": "phi3", "num_key_value_heads": 8, **SIZES, **COMMON},
    "falcon": {"model_type": "falcon", "multi_query": True, "bias": False, **SIZES, **COMMON, "vocab_size": 1000},
}
FULL, BF16 = "lora=null", "training.mixed_precision=bf16"
LORA = "lora.r=8"
QV = "lora.target_modules=[q_proj, v_proj]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    for name, config in CONFIGS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "data.jsonl").write_text("{}\n")
    (folder / "recipe.yaml").write_text(
        "name: t\nmodel: {name_or_path: llama}\ndata: {train: data.jsonl, max_length: 512}\n"
        "training: {global_batch_size: 64, mixed_precision: 'no'}\n"
    )
    return folder


def estimate(folder: Path, *sets: str, **options: Any) -> Memory:
    recipe = load_recipe(folder / "recipe.yaml", sets)
    return Estimator(recipe, read_model_shape(recipe)).memory(Setting(**{"strategy": "ddp"} | options))


def parameters() -> int:
    """Of the llama above."""
    h, f, vocab = 256, 688, 1000
    return 2 * vocab * h + 6 * (2 * h * h + 2 * h * h // 4 + 3 * h * f + 2 * h) + h


SIMULATED = [
    ("llama", [FULL, BF16], {"gradient_checkpointing": True}),
    ("llama", [LORA, BF16, QV], {"attn_implementation": "flash_attention_2"}),
    ("llama", [LORA, BF16, "lora.use_dora=true"], {"strategy": "zero2", "world_size": 2, "shard_size": 2}),
    ("llama", [LORA, BF16, "model.quantization=nf4"], {"micro_batch_size": 2}),
    ("qwen3", [LORA], {"strategy": "fsdp", "world_size": 4, "shard_size": 4}),
    ("gemma2", [LORA, BF16], {"attn_implementation": "flash_attention_2"}),
    ("gpt2", [FULL, "training.mixed_precision=fp16"], {"micro_batch_size": 4}),
    ("phi3", [FULL, BF16], {"strategy": "zero3", "world_size": 2, "shard_size": 2, "micro_batch_size": 4}),
    ("falcon", [LORA, BF16, "model.quantization=nf4"], {"micro_batch_size": 2}),
]


@pytest.mark.parametrize(("model", "sets", "options"), SIMULATED, ids=[f"{m}-{'-'.join(s)}" for m, s, _ in SIMULATED])
def test_formula_is_the_simulation(folder: Path, model: str, sets: list[str], options: dict[str, Any]) -> None:
    from distft.simulation.simulate import simulate

    sets = [*sets, f"model.name_or_path={folder / model}"]
    setting = Setting(**{"strategy": "ddp", "micro_batch_size": 1} | options)
    simulated = simulate(load_recipe(folder / "recipe.yaml", sets), setting)
    found = estimate(folder, *sets, **vars(setting))
    assert found.states == pytest.approx(simulated.states, rel=0.01)
    assert found.peak == pytest.approx(simulated.peak, rel=0.01)
    assert found.moment == simulated.moment


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("llama", Mode("autocast", "lora", "flash", False)),
        ("gpt2", Mode("low", "full", "masked", True)),
    ],
)
def test_the_table_is_what_these_classes_give(family: str, mode: Mode) -> None:
    """Fails when a new transformers or peft keeps something else: make the table anew."""
    from distft.simulation import activation_table

    assert activations.polynomials(family, mode) == activation_table.polynomials(family, mode)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [  # bytes of parameters, gradients, optimizer states a parameter; N = 4
        ("ddp", (4, 4, 8)),
        ("zero1", (2, 4, 12 / 4)),
        ("zero2", (2, 4 / 4, 12 / 4)),
        ("zero3", (2 / 4, 4 / 4, 12 / 4)),
        ("fsdp", (4 / 4, 4 / 4, 8 / 4)),
        ("hsdp", (4 / 2, 4 / 2, 8 / 2)),
    ],
)
def test_states_of_full_fine_tuning(folder: Path, strategy: str, expected: tuple[float, ...]) -> None:
    ranks = {"world_size": 4, "nproc_per_node": 4, "shard_size": {"ddp": 1, "hsdp": 2}.get(strategy, 4)}
    found, count = estimate(folder, FULL, BF16, strategy=strategy, **ranks), parameters()
    assert found.model_parameters == found.trainable_parameters == count
    # ZeRO-3 keeps tensors of less than 100,000 elements whole: norms, and q, k, v, o of this model.
    whole = 2 * (6 * (2 * 256**2 + 2 * 256**2 // 4 + 2 * 256) + 256) if strategy == "zero3" else 0
    assert found.parameters == pytest.approx(expected[0] * count + whole, abs=8)
    assert found.gradients == pytest.approx(expected[1] * count, abs=8)
    assert found.optimizer == pytest.approx(expected[2] * count, abs=32)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp"])
def test_states_of_lora(folder: Path, strategy: str) -> None:
    shards = 1 if strategy == "ddp" else 2
    found = estimate(folder, LORA, BF16, QV, strategy=strategy, world_size=2, shard_size=shards)
    trained, count = 6 * 8 * (256 + 256 + 256 + 64), parameters()
    assert (found.model_parameters, found.trainable_parameters) == (count, trained)
    frozen = {"ddp": 2 * count + 4 * trained, "zero2": 2 * (count + trained), "fsdp": count + 2 * trained}
    assert found.parameters == frozen[strategy]
    assert found.gradients == 4 * trained // shards
    assert found.optimizer == {"ddp": 8, "zero2": 12 / 2, "fsdp": 8 / 2}[strategy] * trained


def test_states_of_a_quantised_base(folder: Path) -> None:
    linear = 6 * (2 * 256**2 + 2 * 256 * 64 + 3 * 256 * 688)
    found = estimate(folder, LORA, BF16, "model.quantization=nf4")
    # Half a byte, an 8-bit scale per 64 weights and a float32 one per 64 * 256.
    expected = linear * (1 / 2 + 1 / 64 + 4 / 64 / 256) + 2 * (parameters() - linear) + 4 * found.trainable_parameters
    assert found.parameters == pytest.approx(expected, rel=0.001)


def test_a_falcon_is_never_quantised(folder: Path) -> None:
    plain, wanted = (
        estimate(folder, LORA, BF16, f"model.name_or_path={folder / 'falcon'}", *sets)
        for sets in ([], ["model.quantization=nf4"])
    )
    assert wanted.parameters == plain.parameters


@pytest.mark.parametrize(("optim", "bytes_each"), [("adamw_torch", 8), ("adamw_bnb_8bit", 2), ("paged_adamw_32bit", 8)])
def test_optimizers(folder: Path, optim: str, bytes_each: int) -> None:
    found = estimate(folder, FULL, BF16, f"training.optim={optim}")
    embedding = 1000 * 256 * 8 if "8bit" in optim else 0  # stays in float32
    expected = bytes_each * found.trainable_parameters + embedding
    assert found.optimizer == pytest.approx(expected, rel=0.1)
    paged = "paged" in optim  # not in torch's allocator
    assert found.peaks["optimizer"] >= found.parameters + found.gradients + (0 if paged else found.optimizer)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp", "hsdp"])
@pytest.mark.parametrize("tuning", [FULL, LORA])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_more_shards_never_take_more(folder: Path, strategy: str, tuning: str, checkpointing: bool) -> None:
    options = {"strategy": strategy, "world_size": 64, "gradient_checkpointing": checkpointing}
    found = [estimate(folder, tuning, BF16, **options, shard_size=size) for size in (2, 4, 8, 16, 32, 64)]
    assert [m.peak for m in found] == sorted((m.peak for m in found), reverse=True)
    assert [m.states for m in found] == sorted((m.states for m in found), reverse=True)


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("tuning", [[FULL], [LORA], [LORA, "lora.use_dora=true"]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_more_rows_and_tokens_never_take_less(folder: Path, model: str, tuning: list[str], checkpointing: bool) -> None:
    sets = [*tuning, BF16, f"model.name_or_path={folder / model}"]
    options = {"gradient_checkpointing": checkpointing, "attn_implementation": "flash_attention_2"}
    rows = [estimate(folder, *sets, **options, micro_batch_size=size).peak for size in (1, 2, 3, 4, 8, 16)]
    assert rows == sorted(rows)
    longer = [estimate(folder, *sets, f"data.max_length={size}", **options).peak for size in (128, 512, 2048, 8192)]
    assert longer == sorted(longer)


def test_checkpointing_and_fewer_adapters_take_less(folder: Path) -> None:
    everything, some = estimate(folder, LORA, BF16), estimate(folder, LORA, BF16, QV)
    assert some.peak < everything.peak
    assert estimate(folder, LORA, BF16, gradient_checkpointing=True).peak < everything.peak
    assert estimate(folder, LORA, BF16, "lora.use_dora=true").peak > everything.peak


def test_accumulated_gradients_live_through_the_forward_pass(folder: Path) -> None:
    once, twice = (estimate(folder, FULL, f"training.global_batch_size={size}") for size in (1, 2))
    assert twice.peaks["loss"] - once.peaks["loss"] == once.gradients


@pytest.mark.parametrize(("strategy", "offload"), [("zero2", "optimizer"), ("zero3", "all"), ("fsdp", "all")])
def test_offload_moves_states_to_the_host(folder: Path, strategy: str, offload: str) -> None:
    options = {"strategy": strategy, "world_size": 4, "shard_size": 4, "nproc_per_node": 4}
    here, away = (estimate(folder, FULL, BF16, **options, offload=where) for where in ("none", offload))
    assert here.host_per_node == 0
    assert away.gradients == away.optimizer == 0
    sums = 2 * here.trainable_parameters if strategy == "zero2" else 0  # of gradients, in 16 bit
    assert away.host_per_node == pytest.approx(4 * (here.states - away.states) + sums, rel=0.01)
    assert away.peak < here.peak


def test_an_unknown_family_is_taken_for_llama(folder: Path) -> None:
    mode = Mode("autocast", "lora", "flash", False)
    assert activations.polynomials("unheard-of", mode) == activations.polynomials("llama", mode)
    # Falcon has no such mode in the table, and is not taken for Llama but for itself less the mask.
    masked = activations.polynomials("falcon", Mode("autocast", "lora", "masked", False))
    without = [{name: size for name, size in p.items() if name != "T·s"} for p in masked["saved"]]
    assert activations.polynomials("falcon", mode)["saved"] == without != masked["saved"]


def test_overhead_is_of_the_device(folder: Path) -> None:
    gpu, pair = estimate(folder), estimate(folder, world_size=2)
    assert gpu.process - gpu.peak > 0.47 * 2**30
    assert pair.overhead - gpu.overhead >= 2**30  # NCCL
    assert estimate(folder, device_type="cpu").overhead > 2**29


def test_torch_is_not_imported(folder: Path) -> None:
    code = f"""
import sys
from distft.config.loading import load_recipe
from distft.planner.memory import Estimator
from distft.planner.setting import Setting
from distft.models.shapes import read_model_shape
recipe = load_recipe({str(folder / "recipe.yaml")!r})
Estimator(recipe, read_model_shape(recipe)).memory(Setting("zero3", shard_size=2))
sys.exit(bool({{"torch", "transformers", "peft"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
