"""training.optim: muon: its steps against torch's own classes, what it is for, and what the plan counts of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_model_shapes import TINY
from tiny import Tiny

from distft.config.loading import load_recipe
from distft.hardware.devices import named_device
from distft.hardware.topology import Topology
from distft.models.shapes import read_model_shape
from distft.planner.memory import Estimator, sizes_of
from distft.planner.plan import make_plan
from distft.planner.search import Where
from distft.planner.setting import Setting
from distft.simulation import fake_model
from distft.simulation.simulate import simulate
from distft.train import muon


@pytest.fixture
def loaded(tiny: Tiny, tmp_path: Path) -> Callable[..., Any]:
    def load(model: Path | str = "model", **changes: Any) -> Any:
        asked = {"lora": None, "training__optim": "muon", "model__name_or_path": str(tiny.path / model)}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(**asked | changes)))
        return load_recipe(tmp_path / "recipe.yaml")

    return load


@pytest.fixture
def built(loaded: Callable[..., Any]) -> Callable[..., Any]:
    from distft.train.model import build_model

    return lambda *args, **changes: build_model(loaded(*args, **changes), "ddp")


@pytest.mark.parametrize("model", ["model", "tied"])
def test_steps_are_those_of_torch(built: Callable[..., Any], model: str) -> None:
    """To the last bit, with torch.optim.Muon for the matrices and torch.optim.AdamW for the others, side by side."""
    ours, theirs = built(model), built(model)
    decaying = {name for name, p in ours.named_parameters() if p.ndim > 1}
    betas, rate = (0.9, 0.98), 0.01
    optimizer = muon.make(ours, decaying, lr=rate, weight_decay=0.1, betas=betas, eps=1e-7)
    named = dict(theirs.named_parameters())
    hidden = [p for name, p in named.items() if ".layers." in name and p.ndim == 2]
    ends = [p for name, p in named.items() if ".layers." not in name and p.ndim == 2]
    norms = [p for p in named.values() if p.ndim == 1]
    groups = [{"params": ends, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    beside = [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=betas, eps=1e-7, fused=True),
    ]
    rows = torch.arange(64)[None]
    for step in range(3):
        for built_model, steps in ((ours, [optimizer]), (theirs, beside)):
            built_model.zero_grad()
            built_model(input_ids=rows + step, labels=rows + step).loss.backward()
            for one in steps:
                for group in one.param_groups:
                    group["lr"] = rate * (1 - step / 4)
                one.step()
    assert all(torch.equal(p, named[name]) for name, p in ours.named_parameters())


def test_matrices_alone(built: Callable[..., Any]) -> None:
    """AdamW has nothing to do where train_only leaves it nothing."""
    model = built(training__train_only=[r"model\.layers\.0\.mlp"])
    optimizer = muon.make(model, (), lr=0.1, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
    assert optimizer.adamw is None
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = torch.arange(64)[None]
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".layers.0.mlp." in name}


@pytest.mark.parametrize("changes", [{}, {"training__train_only": [r"model\.layers\.-1", r"model\.norm"]}])
def test_states_are_those_of_a_step(loaded: Callable[..., Any], built: Callable[..., Any], changes: Any) -> None:
    recipe, model = loaded(**changes), built(**changes)
    optimizer = muon.make(model, (), lr=0.1, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
    rows = torch.arange(64)[None]
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    states = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if value.dim()
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert states < 8 * trained
    shape = read_model_shape(recipe)
    planned = Estimator(recipe, shape).memory(Setting("ddp"))
    simulated = simulate(recipe, Setting("ddp"))
    assert planned.optimizer == simulated.optimizer == states
    sharded = Estimator(recipe, shape).memory(Setting("fsdp", world_size=2, shard_size=2))
    assert sharded.optimizer == states // 2


@pytest.mark.parametrize(("precision", "low"), [("bf16", 2), ("no", 4)])
def test_temporaries_of_a_step(loaded: Callable[..., Any], tmp_path: Path, precision: str, low: int) -> None:
    """Of the largest matrix; they are not sharded."""
    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 320}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = loaded(tmp_path, data__max_length=8, training__mixed_precision=precision)
    sizes = sizes_of(recipe, read_model_shape(recipe))
    assert sizes.muon.step_bytes == 4 * 256 * 1024 + 2 * low * (256 * 1024 + 256 * 256)
    assert sizes.muon.flops == 2 * 5 * (4 * 6 * 256**3 + 3 * (4 * 256 * 256 * 1024 + 2 * 256**3))
    # FSDP2's gradients are float32; those of the simulation are in the compute dtype.
    for setting in (Setting("ddp"), *([Setting("fsdp", world_size=4, shard_size=4)] if precision == "no" else [])):
        simulated = simulate(recipe, setting).peaks["optimizer"]
        assert Estimator(recipe, read_model_shape(recipe)).memory(setting).peaks["optimizer"] == pytest.approx(
            simulated, rel=0.02
        )


@pytest.mark.parametrize("family", TINY)
def test_the_plan_knows_the_matrices(loaded: Callable[..., Any], tmp_path: Path, family: str) -> None:
    """Those of a real class, of every family that is planned by formula."""
    for number, config in enumerate(TINY[family]):
        folder = tmp_path / f"{family}-{number}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": family, **config}))
        recipe = loaded(folder)
        model = fake_model.base(recipe, "eager")
        assert sizes_of(recipe, read_model_shape(recipe)).muon == fake_model.sizes_of(recipe, model).muon


def test_zero_is_no_candidate(loaded: Callable[..., Any], tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    where = Where(Topology(1, 8), named_device("A100-80GB", 8))
    plan = make_plan(loaded(tmp_path, training__mixed_precision="bf16"), where)
    assert plan.strategy == "fsdp"
    assert all(c.broken for c in plan.candidates if c.setting.kind.engine == "deepspeed")
    adamw = make_plan(loaded(tmp_path, training__mixed_precision="bf16", training__optim="adamw_torch_fused"), where)
    sizes, ring = plan.search.estimator.sizes, 7 / 8
    sent = [{c.setting.strategy: c.speed.communication for c in found.candidates} for found in (plan, adamw)]
    more = {name: sent[0][name].bytes_per_step - sent[1][name].bytes_per_step for name in ("ddp", "fsdp")}
    # Results to all others, in bf16; float32 rows to one rank, and results back.
    assert more["ddp"] == pytest.approx(2 * sizes.muon.elements * ring, rel=1e-6)
    assert more["fsdp"] == pytest.approx((4 + 2) * sizes.muon.elements / 8 * ring, rel=1e-6)
    same = next(c for c in adamw.candidates if c.setting.strategy == "fsdp")
    assert plan.chosen.memory.optimizer < same.memory.optimizer
