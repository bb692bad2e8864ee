"""training.master_weights: none: what its AdamW keeps of each step, against torch's and optimi's; what is planned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optimi
import pytest
import torch
import yaml
from tiny import Tiny

from distft.config.loading import load_recipe
from distft.hardware.devices import named_device
from distft.hardware.topology import Topology
from distft.models.shapes import read_model_shape
from distft.planner import limits, memory, speed
from distft.planner.memory import Estimator
from distft.planner.plan import make_plan
from distft.planner.search import Where
from distft.planner.setting import Setting
from distft.runs.checkpoints import differences, identity
from distft.simulation.simulate import simulate
from distft.strategies.deepspeed import deepspeed_config
from distft.train import kahan
from distft.train.kahan import KahanAdamW

SIZE, RATE = 20_000, 2e-5
WEIGHTS = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()


def gradients(steps: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(SIZE, generator=generator).bfloat16() for _ in range(steps))


def trained(make: Callable[..., Any], steps: int, dtype: torch.dtype, **options: Any) -> tuple[torch.Tensor, Any]:
    """The weights after some steps, with what is kept beside them, and the optimizer."""
    weight = torch.nn.Parameter(WEIGHTS.to(dtype).clone())
    options = {"lr": RATE, "betas": (0.9, 0.999), "eps": 1e-8, **options}
    optimizer = make([weight], **options)
    for gradient in gradients(steps):
        weight.grad = gradient.to(dtype)
        optimizer.step()
    kept = optimizer.state[weight].get("kahan_comp")
    return weight.detach().double() + (kept.double() if kept is not None else 0), optimizer


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far from where float32 gets to, as a part of the way there."""
    return float((found - wanted).norm() / (wanted - WEIGHTS.double()).norm())


def test_gets_to_where_float32_does() -> None:
    wanted, _ = trained(torch.optim.AdamW, 200, torch.float32, weight_decay=0.1)
    found, _ = trained(KahanAdamW, 200, torch.bfloat16, weight_decay=0.1)
    plain, _ = trained(torch.optim.AdamW, 200, torch.bfloat16, weight_decay=0.1)
    library, _ = trained(
        lambda parameters, **options: optimi.AdamW(parameters, triton=False, foreach=False, **options),
        200,
        torch.bfloat16,
        weight_decay=0.0,
    )
    without, _ = trained(KahanAdamW, 200, torch.bfloat16)
    assert distance(found, wanted) < 0.03
    assert distance(plain, wanted) > 0.5
    assert distance(without, library) < 0.05  # the same algorithm, where nothing decays


def test_weights_decay() -> None:
    """By less than half of a weight's last bit in each step, so that a product with 1 - lr * decay is the weight."""
    decay, steps = 0.1, 500
    (found, _), (plain, _) = (trained(KahanAdamW, steps, torch.bfloat16, weight_decay=d) for d in (decay, 0.0))
    start = WEIGHTS.double()
    shrunk = float((plain - found) @ start / (start @ start))
    assert shrunk == pytest.approx(steps * RATE * decay, rel=0.05)


def test_nothing_is_too_small_for_the_buffer() -> None:
    """Steps of less than half of its last bit: of weights of 1 at a rate of 1e-6, and of a decay where there is no
    gradient."""
    spread = torch.linspace(0.7, 1.3, 1000)  # else all would be rounded alike
    for start, rate, decay, gradient in ((1.0, 1e-6, 0.0, 1.0), (0.02, 2e-5, 0.1, 0.0), (-0.02, 2e-5, 0.1, 0.0)):
        moved = []
        for make, dtype in ((torch.optim.AdamW, torch.float32), (KahanAdamW, torch.bfloat16)):
            weight = torch.nn.Parameter((start * spread).bfloat16().to(dtype))
            first = weight.detach().double()
            optimizer = make([weight], lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
            noise = torch.Generator().manual_seed(0)
            for _ in range(1000):
                weight.grad = (gradient * (1 + torch.randn(1000, generator=noise))).to(dtype)
                optimizer.step()
            kept = optimizer.state[weight].get("kahan_comp", torch.zeros(()))
            moved.append(float((weight.detach().double() + kept.double() - first).mean()))
        assert moved[1] == pytest.approx(moved[0], rel=0.05), (start, gradient)


def test_the_second_moment_can_fall() -> None:
    """0.999 of a bf16 number rounds to the number."""
    values = torch.full((SIZE,), 1.0)
    plain = values.bfloat16()
    ours = plain.clone()
    for step, gradient in enumerate(gradients(1000)):
        mean, ours_32 = gradient.float(), ours.float() * 0.999
        values *= 0.999
        plain.mul_(0.999)
        ours.copy_(kahan.rounded(ours_32, mean, step))
    assert plain.eq(1).all()
    assert float((ours.float() / values).mean()) == pytest.approx(1, abs=0.01)
    special = torch.tensor([0.0, 1.0, torch.inf, -torch.inf])
    assert torch.equal(kahan.rounded(special, torch.ones(4), 1), special)
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)  # CUDA's is the first
    assert kahan.rounded(nans, torch.ones(3), 7).bfloat16().isnan().all()


def test_pieces_and_chunks_step_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that sharding changes nothing."""
    whole, optimizer = trained(KahanAdamW, 5, torch.bfloat16)
    monkeypatch.setattr(kahan, "CHUNK", 777)
    chunked, other = trained(KahanAdamW, 5, torch.bfloat16)
    assert torch.equal(whole, chunked)
    ((state,), (same,)) = (found.state.values() for found in (optimizer, other))
    assert all(torch.equal(state[name], same[name]) for name in kahan.STATES)
    assert {state[name].dtype for name in kahan.STATES} == {torch.bfloat16}


@pytest.fixture
def loaded(tiny: Tiny, tmp_path: Path) -> Callable[..., Any]:
    def load(model: Path | str = "model", **changes: Any) -> Any:
        asked = {"lora": None, "training__mixed_precision": "bf16", "training__master_weights": "none"}
        asked["model__name_or_path"] = str(tiny.path / model)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(**asked | changes)))
        return load_recipe(tmp_path / "recipe.yaml")

    return load


LLAMA = {"model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
LLAMA |= {"num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True}


@pytest.mark.parametrize("changes", [{}, {"training__train_only": [r"model\.layers\.-1", r"model\.norm"]}])
def test_ten_bytes_a_weight(loaded: Callable[..., Any], changes: Any) -> None:
    recipe = loaded(**changes)
    shape = read_model_shape(recipe)
    trained, frozen = shape.trainable_parameters, shape.parameters - shape.trainable_parameters
    for found in (Estimator(recipe, shape).memory(Setting("ddp")), simulate(recipe, Setting("ddp"))):
        assert (found.parameters, found.gradients) == (2 * (trained + frozen), 2 * trained)
        assert found.optimizer == 6 * trained
    for strategy, states in (("fsdp", 5 * trained), ("hsdp", 5 * trained), ("zero2", (2 + 8) / 2 * trained)):
        setting = Setting(strategy, world_size=4, shard_size=2)
        found = Estimator(recipe, shape).memory(setting)
        whole = found.states - (found.parameters if strategy == "zero2" else frozen)
        assert whole == pytest.approx(states, rel=1e-3), strategy


def test_temporaries_of_a_step(loaded: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 1}))
    recipe = loaded(tmp_path, data__max_length=8)
    setting = Setting("ddp")
    planned, counted = Estimator(recipe, read_model_shape(recipe)).memory(setting), simulate(recipe, setting)
    states = planned.states
    assert planned.peaks["optimizer"] - states == memory.KAHAN_STEP * memory.KAHAN_CHUNK
    assert planned.peaks["optimizer"] == pytest.approx(counted.peaks["optimizer"], rel=1e-3)
    assert memory.KAHAN_CHUNK == kahan.CHUNK


def test_what_it_saves_is_planned_and_said(loaded: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    where = Where(Topology(1, 1), named_device("A100-40GB", 1))
    ddp = {"parallelism__strategy": "ddp"}
    fits = make_plan(loaded(tmp_path, **ddp), where)
    assert fits.fits
    (reason,) = [text for text in fits.reasons if text.startswith("master_weights none")]
    assert reason == "master_weights none: weights, gradients and states take 29.9 GiB of a rank, not 47.9 GiB"
    needs_more = make_plan(loaded(tmp_path, **ddp, training__master_weights="float32"), where)
    assert not needs_more.fits
    assert limits.would_fit(needs_more.search)[0].startswith("training.master_weights: none (ddp, ")
    other = make_plan(loaded(tmp_path, **ddp, training__master_weights="float32", training__optim="adafactor"), where)
    assert not any("master_weights" in change for change in limits.would_fit(other.search))
    sizes = [plan.search.estimator.sizes for plan in (fits, needs_more)]
    assert [speed.optimizer_traffic(size) for size in sizes] == [370, 28]


def test_buckets_of_ddp(loaded: Callable[..., Any], tmp_path: Path) -> None:
    """A copy of all gradients, and two that travel in float32."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    recipe = loaded(tmp_path)
    shape = read_model_shape(recipe)
    one, two = (Estimator(recipe, shape).memory(Setting("ddp", world_size=ranks)) for ranks in (1, 2))
    largest = 3072 * 128_256
    assert two.peaks["backward"] - one.peaks["backward"] == 2 * shape.trainable_parameters + 2 * 4 * largest


def test_deepspeed_is_told(loaded: Callable[..., Any]) -> None:
    from distft.config.batch import Batch

    def config(**changes: Any) -> dict[str, Any]:
        given = {"strategy": "zero2", "offload": "none", "world_size": 2, "device_type": "cpu"}
        return deepspeed_config(**given, recipe=loaded(**changes), batch=Batch(1, 1, 1), trainable_parameters=1)

    found, plain = config(), config(training__master_weights="float32")
    for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        assert (found["bf16"][name], plain["bf16"][name]) == (True, False)
    assert [c["data_types"]["grad_accum_dtype"] for c in (found, plain)] == ["bf16", "fp32"]
    assert found["communication_data_type"] == "fp32"


def test_a_checkpoint_of_the_other_kind(loaded: Callable[..., Any]) -> None:
    saved, now = (identity(loaded(training__master_weights=kind), with_data=False) for kind in ("float32", "none"))
    assert differences(saved, now) == {"training.master_weights": "was 'float32', is 'none'"}
    saved.pop("training.master_weights")  # of a version without the field
    assert differences(saved, now) == {"training.master_weights": "was 'float32', is 'none'"}
    assert not differences(saved, now | {"training.master_weights": "float32"})
