"""Memory by formula: computed by hand, compared with the simulation, and how it changes with what it depends on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distft.config.loading import load_recipe
from distft.models import chunks
from distft.models.quantization import stored_bytes
from distft.models.shapes import read_model_shape
from distft.planner import activations
from distft.planner.activations import Mode
from distft.planner.memory import Estimator, Memory, bnb_state_bytes, put_together
from distft.planner.setting import Setting
from distft.planner.sharding import Sizes, Unit, share
from distft.strategies.kinds import KINDS

COMMON = {"vocab_size": 1000, "max_position_embeddings": 512, "tie_word_embeddings": False, "pad_token_id": None}
SIZES = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 688}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, **SIZES, **COMMON},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 64, **SIZES, **COMMON},
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 4, "head_dim": 32, **SIZES, **COMMON},
    "gpt2": {"model_type": "gpt2", "vocab_size": 1000, "n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": 512},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_key_value_heads": 4, "head_dim": 32, **SIZES, **COMMON, **EXPERTS},
    "phi3": {"model_type": "phi3", "num_key_value_heads": 8, **SIZES, **COMMON},
    "falcon": {"model_type": "falcon", "multi_query": True, "bias": False, **SIZES, **COMMON, "vocab_size": 1000},
}
FULL, BF16 = "lora=null", "training.mixed_precision=bf16"
LORA, OFT = "lora.r=8", "lora.oft={}"
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
    """The number of parameters of the llama above."""
    h, f, vocab = 256, 688, 1000
    return 2 * vocab * h + 6 * (2 * h * h + 2 * h * h // 4 + 3 * h * f + 2 * h) + h


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_what_is_whole_before_it_is_sharded(folder: Path, strategy: str) -> None:
    """DoRA starts from values of the whole base: with 4 bits that is on each GPU, without in each rank's host memory.
    Adapters of other kinds do not need it."""
    options: dict[str, Any] = {"strategy": strategy, "shard_size": 8, "world_size": 8, "nproc_per_node": 8}
    nf4, dora = "model.quantization=nf4", "lora.use_dora=true"
    adapters = 4 * estimate(folder, BF16, LORA).trainable_parameters
    linear = 6 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 688)
    quantized = 2 * (parameters() - linear) + stored_bytes("nf4", linear, 256, {})
    tensor = 2 * 1000 * 256
    loads = [estimate(folder, BF16, LORA, nf4, *more, **options).peaks["load"] for more in ((), (dora,))]
    assert loads[0] < quantized + adapters == pytest.approx(loads[1] - tensor, rel=0.1)
    trained = estimate(folder, BF16, LORA, dora).trainable_parameters
    saving = (4 + 8) * trained + 8 * trained
    hosts = [estimate(folder, BF16, LORA, dora, *more, **options).host_per_node for more in ((), (nf4,))]
    full = 8 * (2 * parameters() + 4 * trained)
    assert hosts == [pytest.approx(saving if strategy == "zero3" else full, abs=100), pytest.approx(saving, abs=100)]


# ---- by hand. Formula and simulation share sharding.py and put_together, so their agreement proves nothing about these
# two: here every number is written out from the definitions.


def test_the_optimizer_step_of_a_known_model(folder: Path) -> None:
    """Llama-3.1-8B, all weights, torch's foreach AdamW, ZeRO-3 over 8 ranks."""
    h, f, vocab, layers, kv = 4096, 14336, 128256, 32, 1024
    count = 2 * vocab * h + layers * (2 * h * h + 2 * h * kv + 3 * h * f + 2 * h) + h
    assert count == 8_030_261_248
    config = {"model_type": "llama", "hidden_size": h, "intermediate_size": f, "vocab_size": vocab}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8}
    (folder / "8b").mkdir(exist_ok=True)
    (folder / "8b" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    sets = (FULL, BF16, "training.optim=adamw_torch", f"model.name_or_path={folder / '8b'}")
    options = {"strategy": "zero3", "shard_size": 8, "world_size": 8, "nproc_per_node": 8}
    found = estimate(folder, *sets, **options, gradient_checkpointing=True)
    assert found.peaks["optimizer"] == sum(
        (
            2 * count // 8,  # weights in 16 bit
            2 * (2 * layers + 1) * h,  # norms, which ZeRO-3 leaves whole
            4 * count // 8,  # gradients
            (4 + 4 + 4) * count // 8,  # float32 weights, and two moments
            4 * 50_000_000,  # the bucket that gradients are reduced in
            4 * 100_000_000,  # float32 gradients of one sub-group
            4 * count // 8,  # square roots of all second moments of this rank
        )
    )
    assert found.peaks["optimizer"] / 2**30 == pytest.approx(21.1, abs=0.05)
    offloaded = estimate(folder, *sets, **options, offload="optimizer")
    fused = estimate(folder, *sets, "training.optim=adamw_torch_fused", **options, offload="optimizer")
    assert offloaded.peaks["optimizer"] == fused.peaks["optimizer"]  # it steps on the host


MILLION = 1_000_000
# A model with adapters: 4 million frozen weights in 16 bit, and 0.4 million trained ones: 0.1 for each of 4 ranks.
BY_HAND = Sizes(
    parameters=4 * MILLION,
    frozen_bytes=8 * MILLION,
    trained=400_000,
    largest_trained=150_000,
    low=2,
    largest_module=1 * MILLION,
    bnb_bytes=0,
    embedding=Unit(1_500_000, 0),
    block=Unit(2 * MILLION, 100_000),
    tail=Unit(1_600_000, 50_000),
    small_bytes=40_000,
    tied=False,
    largest_tensor=750_000,
    stored_quantized=False,
)
ZERO = {"reduce_bucket_size": 200_000, "overlap_comm": True, "sub_group_size": 60_000}
ZERO |= {"stage3_prefetch_bucket_size": 300_000, "stage3_max_reuse_distance": MILLION}
ZERO |= {"stage3_max_live_parameters": 3 * MILLION}
# What the step itself keeps, without states and the strategy's buffers; the foreach AdamW's square roots last.
STEP = {
    ("forward", -1): Counter(activations=1_000_000),
    ("loss", None): Counter(activations=800_000, logits=700_000),
    ("backward", None): Counter(activations=600_000, logits=900_000, gradients=100_000),
    ("backward", -1): Counter(activations=1_200_000, gradients=200_000),
    ("backward", 0): Counter(activations=300_000, gradients=1_600_000),
    ("optimizer", None): Counter(activations=1_600_000, gradients=1_600_000),
}
HEAD, TOP = 600_000 + 900_000, 1_200_000  # activations and logits of two of these


@pytest.mark.parametrize(
    ("strategy", "offload", "precision", "states", "host", "buffers", "load"),
    [  # states: parameters, gradients, optimizer. buffers: forward, loss, head, backward, optimizer
        # load: as far as it is sharded while it is read, and a tensor as it is stored, 1.5; FSDP also has a unit, 2.2
        # The adapter in float32; a bucketed copy of all gradients.
        ("ddp", "none", "bf16", (9_600_000, 1_600_000, 3_200_000), 0, [1_600_000] * 5, 11_100_000),
        # The adapter in 16 bit, its float32 copy and moments divided by 4; in the step, a flat copy of all gradients.
        ("zero1", "none", "bf16", (8_800_000, 1_600_000, 1_200_000), 0, [0, 0, 0, 0, 1_600_000], 10_300_000),
        # fp16: two buckets of 200,000 in float32, and the message.
        ("zero1", "none", "fp16", (8_800_000, 1_600_000, 1_200_000), 0, [0, 0, 2_400_000, 2_400_000, 0], 10_300_000),
        # Gradients divided; two buckets in 16 bit, and the message in float32.
        ("zero2", "none", "bf16", (8_800_000, 400_000, 1_200_000), 0, [0, 0, 1_600_000, 1_600_000, 0], 10_300_000),
        # On the host: float32 gradients, optimizer states, and 16-bit sums of gradients over micro-batches.
        ("zero2", "optimizer", "bf16", (8_800_000, 0, 0), 1_800_000, [0, 0, 1_600_000, 1_600_000, 0], 10_300_000),
        # A quarter of the parameters and the small ones whole. Gathered: half of the reuse distance, the prefetch and
        # a module, 1.0 + 0.6 + 1.0; the float32 bucket 0.8; the message 0.8. In the step: the bucket and a sub-group.
        (
            "zero3",
            "none",
            "bf16",
            (2_240_000, 400_000, 1_200_000),
            0,
            [3_400_000, 3_400_000, 4_200_000, 4_200_000, 1_040_000],
            3_240_000,
        ),
        (
            "zero3",
            "all",
            "bf16",
            (40_000, 0, 0),
            2_200_000 + 400_000 + 1_200_000,
            [3_400_000, 3_400_000, 4_200_000, 4_200_000, 1_040_000],
            1_040_000,
        ),
        # All divided by 4, the adapter in float32. Gathered: a block, its gather and the next (6.0); twice the tail or
        # block and tail (3.6); these and the tail's gradients (0.3); two blocks and a block's gradients (0.6).
        (
            "fsdp",
            "none",
            "bf16",
            (2_400_000, 400_000, 800_000),
            0,
            [6_000_000, 3_600_000, 3_900_000, 4_600_000, 0],
            6_100_000,
        ),
        ("fsdp", "all", "bf16", (0, 0, 0), 3_600_000, [6_000_000, 3_600_000, 3_900_000, 4_600_000, 0], 3_700_000),
        # Groups of 2 of the 4 ranks.
        (
            "hsdp",
            "none",
            "bf16",
            (4_800_000, 800_000, 1_600_000),
            0,
            [6_000_000, 3_600_000, 3_900_000, 4_600_000, 0],
            8_500_000,
        ),
    ],
)
def test_strategies_by_hand(
    folder: Path,
    strategy: str,
    offload: str,
    precision: str,
    states: tuple[int, int, int],
    host: int,
    buffers: list[int],
    load: int,
) -> None:
    recipe = load_recipe(
        folder / "recipe.yaml", [f"training.mixed_precision={precision}", "training.optim=adamw_torch"]
    )
    shards = {"ddp": 1, "hsdp": 2}.get(strategy, 4)
    setting = Setting(strategy, offload, shard_size=shards, world_size=4, nproc_per_node=4, micro_batch_size=16)
    zero = ZERO if strategy.startswith("zero") else None
    undivided = {"parameters": 9_600_000, "gradients": 1_600_000, "optimizer": 3_200_000}
    found = put_together(recipe, BY_HAND, undivided, STEP, setting, zero)
    assert (found.parameters, found.gradients, found.optimizer) == states
    # For checkpoints, a quarter of the float32 weights and moments for each of four ranks; for final/, two adapters.
    assert found.host_per_node == 4 * (host + (1_600_000 + 3_200_000) // 4) + 2 * 1_600_000
    forward, loss, head, backward, optimizer = buffers
    kept = states[0] + states[2]  # all the time; under DDP, and only there, gradients come one by one
    some, few, all_ = (100_000, 200_000, 1_600_000) if strategy == "ddp" else [states[1]] * 3
    temporaries = 0 if offload != "none" else 1_600_000 // shards
    assert found.peaks == {
        "load": load,
        "forward": kept + (0 if strategy == "ddp" else states[1]) + 1_000_000 + forward,
        "loss": kept + (0 if strategy == "ddp" else states[1]) + 1_500_000 + loss,
        "backward": kept + max(some + HEAD + head, few + TOP + backward, all_ + 300_000 + backward),
        "optimizer": kept + all_ + temporaries + optimizer,
    }
    # The reported parts add up to the peak.
    assert found.peak == max(found.peaks.values()) == found.peaks[found.moment]
    there = found.peak - (found.parameters + found.optimizer + found.activations + found.logits + found.buffers)
    assert there in (some, few, all_)


@pytest.mark.parametrize(
    ("optim", "expected"),
    [  # of 100,000 elements: the float32 weights, and two moments
        ("adamw_torch_fused", 400_000 + 2 * 400_000),
        ("paged_adamw_32bit", 400_000 + 2 * 400_000),
        ("adamw_bnb_8bit", 400_000 + 2 * 100_000 + 3_125),  # 8 bit, with a float32 scale per moment and 256 elements
        ("paged_adamw_8bit", 400_000 + 2 * 100_000 + 3_125),
    ],
)
def test_optimizer_states_of_a_shard_by_hand(folder: Path, optim: str, expected: int) -> None:
    recipe = load_recipe(folder / "recipe.yaml", ["training.mixed_precision=bf16", f"training.optim={optim}"])
    setting = Setting("zero2", shard_size=4, world_size=4)
    sizes = replace(BY_HAND, bnb_bytes=0 if optim == "adamw_torch_fused" else 1)
    assert put_together(recipe, sizes, {"optimizer": 3_200_000}, STEP, setting, ZERO).optimizer == expected


def test_a_tied_embedding_is_gathered_throughout() -> None:
    """FSDP2 has it in one unit with the final norm (1.6 MB here), which stays gathered to the end of the step."""
    buffers = share(KINDS["fsdp"], "none", 4, replace(BY_HAND, tied=True), 8.0, None, bf16=True).buffers
    assert buffers["forward"] == 3 * 2_000_000 + 1_600_000
    # Two blocks, a block's gradients in 16 bit and float32; the unit, and its gradients in 16 bit.
    assert buffers["backward"] == 2 * 2_000_000 + 6 * 100_000 + 1_600_000 + 2 * 50_000


def test_what_fsdp_keeps_from_the_forward_to_the_backward_pass() -> None:
    """All 8.8 MB that are gathered; beside them two blocks' gathers, one unit's, or gradients in 16 bit and float32."""
    kept = share(KINDS["fsdp"], "none", 4, BY_HAND, 8.0, None, bf16=True, reshard_after_forward=False).buffers
    whole = 8_000_000 + 2 * 400_000
    assert kept == {
        "forward": whole + 2 * 2_000_000,
        "loss": whole + 1_600_000,
        "head": whole + 6 * 50_000,
        "backward": whole + 6 * 100_000,
        "optimizer": 0,
    }


def test_whole_gradients_between_micro_batches(folder: Path) -> None:
    """Of adapters under FSDP2: 1.6 MB in float32 beside this rank's quarter. Not where layers are trained whole."""
    few, one = Setting("fsdp", shard_size=4, world_size=4), Setting("fsdp", shard_size=4, world_size=4)
    one = replace(one, micro_batch_size=16)  # all of a rank's share of 64
    saved = "lora.modules_to_save=[lm_head]"
    found = []
    for sets, setting in (([], few), ([], one), ([saved], few)):
        recipe = load_recipe(folder / "recipe.yaml", [BF16, *sets])
        found.append(put_together(recipe, BY_HAND, {"optimizer": 3_200_000}, STEP, setting, None).gradients)
    assert found == [1_600_000 + 400_000, 400_000, 400_000]
    offloaded = put_together(
        load_recipe(folder / "recipe.yaml", [BF16]),
        BY_HAND,
        {"optimizer": 3_200_000},
        STEP,
        replace(few, offload="all"),
        None,
    )
    assert offloaded.gradients == 1_600_000  # they are sums on the GPU


def test_bytes_of_a_quantized_weight_by_hand() -> None:
    rows, columns = 1024, 4096
    nf4 = rows * columns // 2 + rows * columns // 64 + 4 * (rows * columns // (64 * 256))
    assert stored_bytes("nf4", rows * columns, rows) == nf4 == 2_097_152 + 65_536 + 1_024
    assert stored_bytes("int8", rows * columns, rows) == 4_194_304 + 4 * rows
    assert bnb_state_bytes("adamw_bnb_8bit", 65_536, embedding=False) == 2 * (65_536 + 4 * 256)
    assert bnb_state_bytes("adamw_bnb_8bit", 4_095, embedding=False) == 8 * 4_095  # float32: it is small
    assert bnb_state_bytes("adamw_bnb_8bit", 65_536, embedding=True) == 8 * 65_536
    assert bnb_state_bytes("adamw_torch", 65_536, embedding=False) == 0


def test_buffers_of_the_model_are_counted_once(folder: Path) -> None:
    """Such as rotary frequencies, which the simulation counts in addition to the strategy's."""
    recipe = load_recipe(folder / "recipe.yaml", ["training.mixed_precision=bf16"])
    step = {("forward", -1): Counter(activations=1_000, buffers=500), ("optimizer", None): Counter()}
    undivided = {"parameters": 4_000, "gradients": 1_600_000, "optimizer": 3_200}
    found = put_together(recipe, BY_HAND, undivided, step, Setting("ddp", world_size=4, device_type="cpu"), None)
    assert found.moment == "forward"
    assert (found.activations, found.buffers, found.peak) == (1_000, 1_600_500, 4_000 + 3_200 + 1_000 + 1_600_500)


# ---- against the simulation

SAVED = "lora.modules_to_save=[embed_tokens,lm_head]"
TWO = {"world_size": 2, "shard_size": 2}
SIMULATED = [
    ("llama", [LORA, BF16, "training.loss_type=dft"], {"micro_batch_size": 2}),
    ("llama", [FULL, "training.loss_type=eaft"], {}),
    ("llama", [FULL, BF16], {"gradient_checkpointing": True}),
    ("llama", [FULL, "training.optim=galore_adamw"], {}),
    ("llama", [FULL, "training.optim=apollo_adamw", "training.optim_args.rank=8"], {}),
    ("llama", [LORA, BF16, QV], {"attn_implementation": "flash_attention_2"}),
    ("llama", [LORA, BF16, "lora.use_dora=true"], {"strategy": "zero2", "world_size": 2, "shard_size": 2}),
    ("llama", [LORA, BF16, "model.quantization=nf4"], {"micro_batch_size": 2}),
    ("llama", [OFT, BF16], {"gradient_checkpointing": True, "micro_batch_size": 2}),
    ("llama", [OFT, BF16, "lora.oft.num_cayley_neumann_terms=7"], {"attn_implementation": "flash_attention_2"}),
    ("llama", [OFT, BF16, QV, "lora.oft.use_cayley_neumann=false"], {"strategy": "zero2", **TWO}),
    ("llama", [OFT, "lora.oft.block_share=true", "training.optim=adafactor"], {}),
    ("llama", [OFT, BF16, "model.quantization=nf4"], {"strategy": "zero3", **TWO}),
    ("llama", [LORA, "lora.rank_pattern={down_proj: 32}", "lora.exclude_modules=[q_proj]"], {}),
    ("llama", [LORA, BF16, SAVED], {"strategy": "fsdp", "world_size": 2, "shard_size": 2}),
    ("llama", [LORA, BF16, "lora.layers_to_transform=[1]"], {"strategy": "zero3", "world_size": 2, "shard_size": 2}),
    ("qwen3", [LORA], {"strategy": "fsdp", "world_size": 4, "shard_size": 4}),
    ("qwen3_moe", [LORA], {"micro_batch_size": 2}),
    ("qwen3_moe", [FULL], {"gradient_checkpointing": True}),
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
    assert found.peak == pytest.approx(simulated.peak, rel=0.0125)
    assert found.moment == simulated.moment


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
@pytest.mark.parametrize("tuning", ["lora={}", "lora=null"])
def test_formula_is_the_simulation_with_several_chunks(
    folder: Path, strategy: str, tuning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distft.simulation.simulate import simulate

    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * 1000 * 128)  # 128 tokens of 2048
    sets = [BF16, tuning, f"model.name_or_path={folder / 'llama'}"]
    ranks = 1 if strategy == "ddp" else 2
    setting = Setting(strategy=strategy, micro_batch_size=4, world_size=ranks, shard_size=ranks)
    simulated = simulate(load_recipe(folder / "recipe.yaml", sets), setting)
    found = estimate(folder, *sets, **vars(setting))
    assert found.peaks["loss"] == pytest.approx(simulated.peaks["loss"], rel=0.01)
    whole = estimate(folder, *sets, "training.loss=full", **vars(setting))
    assert whole.peaks["loss"] > found.peaks["loss"] + 5 * 2048 * 1000


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("tuning", ["lora={}", "lora=null"])
def test_inputs_of_blocks_in_host_memory(folder: Path, strategy: str, tuning: str) -> None:
    from distft.simulation.simulate import simulate

    sets, offloading = [BF16, tuning], "training.activation_offloading=true"
    ranks = 1 if strategy == "ddp" else 2
    options = {"world_size": ranks, "shard_size": ranks, "nproc_per_node": ranks, "micro_batch_size": 4}
    setting = Setting(strategy, **options, gradient_checkpointing=True)
    simulated = simulate(load_recipe(folder / "recipe.yaml", [*sets, offloading]), setting)
    found, before = (estimate(folder, *sets, *more, **vars(setting)) for more in ([offloading], []))
    for moment, peak in found.peaks.items():
        assert 0.9875 < peak / simulated.peaks[moment] < 1.02, moment
    width = 4 if strategy == "ddp" and tuning == "lora=null" else 2
    inputs = width * 4 * 512 * 256  # of one of six blocks
    # An adapter's first input is kept on the GPU: it is a leaf.
    assert before.peaks["backward"] - found.peaks["backward"] == (4 if tuning == "lora={}" else 5) * inputs
    for memory in (found, simulated):
        assert memory.host_per_node - before.host_per_node == ranks * 6 * inputs  # 2**20 bytes or 2**21


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", ["gpt2", "falcon"])
def test_fsdp_under_autocast(folder: Path, model: str, checkpointing: bool) -> None:
    """accelerate leaves autocast on, which computes LayerNorm and gelu_new's powers in float32."""
    from distft.simulation.simulate import simulate

    sets = [BF16, "lora=null", f"model.name_or_path={folder / model}"]
    options = {"strategy": "fsdp", "world_size": 2, "shard_size": 2, "micro_batch_size": 4}
    setting = Setting(**options, gradient_checkpointing=checkpointing)
    simulated = simulate(load_recipe(folder / "recipe.yaml", sets), setting)
    least = 0.9 if checkpointing else 0.97  # of one block's temporaries, which is much of a toy
    assert least < estimate(folder, *sets, **vars(setting)).peak / simulated.peak < 1.1


@pytest.mark.parametrize(
    ("sets", "options"),
    [
        ([], {}),
        ([BF16], {"micro_batch_size": 4, "gradient_checkpointing": True}),
        ([BF16], {"strategy": "fsdp", "world_size": 2, "shard_size": 2}),
    ],
)
def test_frozen_layers_keep_nothing_below_the_trained_ones(
    folder: Path, sets: list[str], options: dict[str, Any]
) -> None:
    """The formula takes each layer above for a trained one, so that it may count a little more."""
    from distft.simulation.simulate import simulate

    sets = [FULL, *sets, r"training.train_only=['model\.layers\.-[12]', lm_head]"]
    setting = Setting(**{"strategy": "ddp"} | options)
    simulated = simulate(load_recipe(folder / "recipe.yaml", sets), setting)
    found = estimate(folder, *sets, **vars(setting))
    assert found.states == pytest.approx(simulated.states, rel=1e-6)
    assert 0.985 < found.peak / simulated.peak < 1.03
    assert found.peak < 0.9 * estimate(folder, FULL, *sets[1:-1], **vars(setting)).peak


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("llama", Mode("autocast", "lora", "flash", False)),
        ("gpt2", Mode("low", "full", "masked", True)),
        ("qwen3_moe", Mode("float32", "lora", "masked", False)),
    ],
)
def test_the_table_is_what_these_classes_give(family: str, mode: Mode) -> None:
    """Fails when a new transformers or peft keeps something else: then run `make activations`."""
    from distft.simulation import activation_table

    assert activations.polynomials(family, mode) == activation_table.polynomials(family, mode)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [  # bytes of parameters, gradients, optimizer states per parameter; N = 4
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
    batch = "training.global_batch_size=2"
    found = estimate(folder, LORA, BF16, QV, batch, strategy=strategy, world_size=2, shard_size=shards)
    trained, count = 6 * 8 * (256 + 256 + 256 + 64), parameters()
    assert (found.model_parameters, found.trainable_parameters) == (count, trained)
    frozen = {"ddp": 2 * count + 4 * trained, "zero2": 2 * (count + trained), "fsdp": count + 2 * trained}
    assert found.parameters == frozen[strategy]
    assert found.gradients == 4 * trained // shards
    assert found.optimizer == {"ddp": 8, "zero2": 12 / 2, "fsdp": 8 / 2}[strategy] * trained


def test_states_of_a_quantized_base(folder: Path) -> None:
    linear = 6 * (2 * 256**2 + 2 * 256 * 64 + 3 * 256 * 688)
    found = estimate(folder, LORA, BF16, "model.quantization=nf4")
    # Half a byte, an 8-bit scale per 64 weights and a float32 one per 64 * 256.
    expected = linear * (1 / 2 + 1 / 64 + 4 / 64 / 256) + 2 * (parameters() - linear) + 4 * found.trainable_parameters
    assert found.parameters == pytest.approx(expected, rel=0.001)


def test_a_falcon_is_never_quantized(folder: Path) -> None:
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


@pytest.mark.parametrize(
    ("model", "tuning"),
    [
        *((model, tuning) for model in CONFIGS for tuning in ([FULL], [LORA])),
        *((model, [LORA, "lora.use_dora=true"]) for model in CONFIGS if "moe" not in model),  # experts have no DoRA
    ],
)
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
    assert away.gradients == away.optimizer == 0
    sums = 2 * here.trainable_parameters if strategy == "zero2" else 0  # of gradients, in 16 bit
    moved = away.host_per_node - here.host_per_node  # which has room for checkpoints
    assert moved == pytest.approx(4 * (here.states - away.states) + sums, rel=0.01)
    assert away.peak < here.peak


def test_an_unknown_family_is_estimated_as_llama(folder: Path) -> None:
    mode = Mode("autocast", "lora", "flash", False)
    assert activations.polynomials("unheard-of", mode) == activations.polynomials("llama", mode)
    # Falcon has no such mode in the table: its own, without the mask, stands in, not Llama's.
    masked = activations.polynomials("falcon", Mode("autocast", "lora", "masked", False))
    without = [{name: size for name, size in p.items() if name != "T·s"} for p in masked["saved"]]
    assert activations.polynomials("falcon", mode)["saved"] == without != masked["saved"]


def test_the_table_says_how_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *rest = activations.FILE.read_text().splitlines()
    assert re.search(r"`make activations` .* transformers 5\.\d+, torch 2\.\d+, peft 0\.\d+\.$", second)
    assert not any(line.startswith("#") for line in rest)
    # The generator writes the same lines, and the reader skips them.
    mode, p = Mode("autocast", "lora", "flash", True), {"T·h": 4.0, "h·q": 2.0}
    made = {("llama", mode): {moment: [p] for moment in activations.MOMENTS}}
    text = activations.write(made, {"transformers": "5.30.0.dev0", "torch": "2.14.1+cpu", "peft": "0.22.0"})
    assert text.splitlines()[0] == first
    assert text.splitlines()[1].endswith("transformers 5.30, torch 2.14, peft 0.22.")
    monkeypatch.setattr(activations, "FILE", tmp_path / "activations.txt")
    activations.FILE.write_text(text)
    assert activations._table.__wrapped__() == {
        (mode.key, "llama"): "|".join(f"{moment}:4 T·h 2 h·q" for moment in activations.MOMENTS)
    }


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
