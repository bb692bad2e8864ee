"""GaLore and APOLLO: their steps by hand (and against their packages, where these are installed), and their bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import Tiny

from distft.config.loading import load_recipe
from distft.config.recipe import OWN_OPTIMIZERS, OptimArgs
from distft.models.shapes import read_model_shape
from distft.planner.memory import ddp_states, sizes_of
from distft.rules import trainer_overrides
from distft.train import low_rank
from distft.train.low_rank import LowRank

assert set(OWN_OPTIMIZERS) == set(trainer_overrides.OWN_OPTIMIZERS)
SHAPES = [(24, 16), (16, 24), (20, 20), (40, 4)]
RATE, DECAY, BETAS, EPSILON = 0.01, 0.1, (0.9, 0.98), 1e-8


def gradient(number: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(SHAPES[number], generator=generator) * (step + 1)


def trained(optimizer: Any, parameters: list[torch.nn.Parameter], steps: int = 5) -> list[torch.Tensor]:
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / 8)
        for number, parameter in enumerate(parameters):
            parameter.grad = gradient(number, step)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def start() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def ours(is_apollo: bool, parameters: list[torch.nn.Parameter], **arguments: Any) -> LowRank:
    group = {"params": parameters, "of_matrices": True, "weight_decay": DECAY}
    return LowRank([group], OptimArgs(**arguments), is_apollo, lr=RATE, betas=BETAS, eps=EPSILON)


@pytest.mark.parametrize("kind", ["galore", "channel", "tensor"])
def test_steps_by_hand(kind: str) -> None:
    """In float64, a matrix at a time, with the longer side first."""
    scale_type = {} if kind == "galore" else {"scale_type": kind}
    optimizer = ours(kind != "galore", start(), rank=3, scale=4.0, **scale_type)
    found = trained(optimizer, optimizer.param_groups[0]["params"])
    for number, weights in enumerate(start()):
        is_wide = weights.shape[0] < weights.shape[1]

        def long(matrix: torch.Tensor, is_wide: bool = is_wide) -> torch.Tensor:
            return (matrix.T if is_wide else matrix).detach().double()

        weight, projection = long(weights), optimizer.state[optimizer.param_groups[0]["params"][number]]["projection"]
        if kind == "galore":
            projection = torch.linalg.svd(long(gradient(number, 0))).Vh[:3]
        projection, last = projection.double(), 0.0
        first, second = torch.zeros(len(weight), 3).double(), torch.zeros(len(weight), 3).double()
        for step in range(5):
            whole = long(gradient(number, step))
            low = whole @ projection.T
            first, second = first * 0.9 + low * 0.1, second * 0.98 + low**2 * 0.02
            moved = first / (second.sqrt() + EPSILON)
            if kind == "galore":
                update = 4 * moved @ projection
            else:
                dims = (0, 1) if kind == "tensor" else 1
                factor = (moved**2).sum(dims, keepdim=True).sqrt() / ((low**2).sum(dims, keepdim=True).sqrt() + 1e-8)
                update = whole * factor
                norm = (update**2).sum().sqrt().item()
                limit = max(norm / (last + 1e-8), 1.01) / 1.01 if step else 1.0
                update, last = 2 * update / limit, norm / limit
            rate = RATE * (1 - step / 8)
            weight = weight - rate * (1 - 0.98 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1)) * update
            weight = weight * (1 - rate * DECAY)
        torch.testing.assert_close(long(found[number]), weight, atol=2e-5, rtol=0)


@pytest.mark.parametrize("rank", [3, 10])
@pytest.mark.parametrize("kind", ["galore", "channel", "tensor"])
def test_steps_are_those_of_the_packages(kind: str, rank: int) -> None:
    package = pytest.importorskip("galore_torch" if kind == "galore" else "apollo_torch")
    parameters, options = start(), {"lr": RATE, "betas": BETAS, "eps": EPSILON, "weight_decay": DECAY}
    group = {"params": parameters, "rank": rank, "scale": 4.0, "proj_type": "std"}
    if kind == "galore":
        theirs, arguments = package.GaLoreAdamW([group | {"update_proj_gap": 2}], **options), {"update_proj_gap": 2}
    else:
        group |= {"proj": "random", "scale_type": kind, "update_proj_gap": 200}
        theirs, arguments = package.APOLLOAdamW([group], **options), {"scale_type": kind}
    own = start()
    found = trained(ours(kind != "galore", own, rank=rank, scale=4.0, **arguments), own)
    for one, other in zip(found, trained(theirs, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def test_apollo_chooses_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other numbers each time and for each matrix, of variance 1 / rank, whatever torch's own generator is at."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        parameter = torch.nn.Parameter(torch.zeros(400, 300))
        other = torch.nn.Parameter(torch.zeros(400, 300))
        optimizer = ours(True, [parameter, other], rank=16, update_proj_gap=2)
        for _ in range(3):
            parameter.grad = other.grad = torch.ones(400, 300)
            optimizer.step()
            found.append([optimizer.state[p]["projection"].clone() for p in (parameter, other)])
    (a, b), (c, _), (d, _), *_ = found
    assert torch.equal(a, c) and not torch.equal(a, d) and not torch.equal(a, b)
    assert a.var().item() == pytest.approx(1 / 16, rel=0.05)
    assert all(
        torch.equal(x, y) for one, two in zip(found[:3], found[3:], strict=True) for x, y in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("targets", ["all-linear", ["mlp", "q_proj"]])
@pytest.mark.parametrize(("optim", "rank"), [("galore_adamw", 8), ("galore_adamw", 100), ("apollo_adamw", 100)])
@pytest.mark.parametrize("model", ["model", "tied"])
def test_bytes_are_as_planned(tiny: Tiny, tmp_path: Path, model: str, optim: str, rank: int, targets: Any) -> None:
    from distft.train.model import build_model

    asked = {"training__optim": optim, "training__optim_args": {"rank": rank}, "lora": None}
    asked |= {"model__name_or_path": str(tiny.path / model), "training__optim_target_modules": targets}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(**asked)))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    built = build_model(recipe, "ddp")
    optimizer = low_rank.make(built, recipe, (), lr=RATE, weight_decay=0.0, betas=BETAS, eps=EPSILON)
    built(input_ids=torch.arange(64)[None], labels=torch.arange(64)[None]).loss.backward()
    optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()]
    sizes = sizes_of(recipe, read_model_shape(recipe))
    assert sizes.low_rank.elements == sum(p.numel() for p in low_rank.matrices(built, targets)) > 0
    assert ddp_states(recipe, sizes, [])["optimizer"] == sum(v.untyped_storage().nbytes() for v in states)
