"""training.train_only: what is named, what is counted, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import Tiny

from distft.config.loading import load_recipe
from distft.errors import PlanError, RecipeError
from distft.models.freezing import frozen, named
from distft.models.shapes import read_model_shape
from distft.planner.memory import Estimator
from distft.planner.setting import Setting

PARTS = (".self_attn.q_proj.weight", ".mlp.up_proj.weight", ".mlp.norm.bias")
NAMES = ["model.embed_tokens.weight", *(f"model.layers.{n}{part}" for n in range(12) for part in PARTS)]
NAMES += ["model.norm.weight", "lm_head.weight"]
TOWER = ["model.vision_tower.layers.0.fc.weight", "model.language_model.layers.0.fc.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["lm_head"], {"lm_head.weight"}),
        ([r"lm_head\.weight"], {"lm_head.weight"}),
        ([r"model\.layers\.1"], {f"model.layers.1{part}" for part in PARTS}),  # not 10 and 11
        ([r"model\.layers\.-[12]"], {f"model.layers.{n}{part}" for n in (10, 11) for part in PARTS}),
        ([r".*\.-1\.mlp", "lm_head"], {*(f"model.layers.11{part}" for part in PARTS[1:]), "lm_head.weight"}),
        ([r".*\.bias|model\.norm"], {*(f"model.layers.{n}{PARTS[2]}" for n in range(12)), "model.norm.weight"}),
    ],
)
def test_what_is_named(patterns: list[str], expected: set[str]) -> None:
    assert named(NAMES, patterns) == expected
    assert frozen(NAMES, named(NAMES, patterns)) == {*NAMES} - expected


def test_all_is_named_without_it() -> None:
    assert named(NAMES, []) is None
    assert frozen(NAMES, None) == set()
    assert frozen(TOWER, None) == {TOWER[0]}


def test_a_shared_weight_has_two_names() -> None:
    shared = {"lm_head.weight": NAMES[0]}
    assert named(NAMES[:-1], ["lm_head"], shared) == named(NAMES[:-1], [r"model\.embed_tokens"], shared) == {NAMES[0]}


def test_what_only_chooses_experts_stays_frozen() -> None:
    names = ["model.layers.1.mlp.expert_bias", "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"]
    assert frozen([*NAMES, *names], named([*NAMES, *names], [r"model\.layers\.1"])) >= {*names}
    assert frozen([*NAMES, *names], None) == {*names}
    with pytest.raises(PlanError, match=r"which no gradient reaches: it only chooses experts"):
        named(names, [r".*\.expert_bias"])


def test_towers_stay_frozen() -> None:
    assert frozen(TOWER, named(TOWER, [r"model\..*"])) == {TOWER[0], TOWER[2]}
    with pytest.raises(PlanError, match=r"got \"model.vision_tower\", which text does not go through; rows are text"):
        named(TOWER, ["model.vision_tower"])


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("q_proj", "it must match the whole name of a parameter or of a module that has it, such as "
                   "model.layers.0.self_attn.q_proj"),
        ("lm_haed", "did you mean lm_head?"),
        (r"transformer\.h\.3", "; the model has model.layers.0 to model.layers.11, model.embed_tokens, model.norm, lm"),
        (r"model\.layers\.12", "; the model has model.layers.0 to model.layers.11, "),
        (r"model\.layers\.-13", "; the model has model.layers.0 to "),
    ],
)  # fmt: skip
def test_what_names_nothing(pattern: str, says: str) -> None:
    with pytest.raises(PlanError, match=r"training.train_only: got .*, which names no parameter") as error:
        named(NAMES, ["lm_head", pattern])
    assert says in str(error.value)


def test_no_regular_expression(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(lora=None, training__train_only=["lm_head", "("])))
    with pytest.raises(RecipeError, match=r'training.train_only\[1\]: got "\(", which is no regular expression'):
        load_recipe(tmp_path / "recipe.yaml")


PART = [r"model\.layers\.-1", r"model\.layers\.0\.mlp\.down_proj", "lm_head"]


@pytest.fixture
def loaded(tiny: Tiny, tmp_path: Path) -> Callable[..., Any]:
    def load(model: str = "model", **changes: Any) -> Any:
        asked = {"lora": None, "model__name_or_path": str(tiny.path / model), "training__train_only": PART}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(**asked | changes)))
        return load_recipe(tmp_path / "recipe.yaml")

    return load


@pytest.mark.parametrize("model", ["model", "tied"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_states_are_those_of_a_step(loaded: Callable[..., Any], model: str, precision: str) -> None:
    """The plan's bytes against those of a real model after a real step of AdamW."""
    from distft.simulation.simulate import simulate
    from distft.train.model import build_model

    recipe = loaded(model, training__mixed_precision=precision)
    shape = read_model_shape(recipe)
    planned = Estimator(recipe, shape).memory(Setting("ddp"))
    built = build_model(recipe, "ddp")
    trained = {name: p for name, p in built.named_parameters() if p.requires_grad}
    names = {"lm_head.weight" if model == "model" else "model.embed_tokens.weight"}
    names |= {"model.layers.0.mlp.down_proj.weight"}
    assert trained.keys() == names | {name for name, _ in built.named_parameters() if ".layers.1." in name}
    optimizer = torch.optim.AdamW(trained.values())
    rows = torch.arange(32)[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        built(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    parameters = list(built.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    found = [
        sum(t.numel() * t.element_size() for t in tensors)
        for tensors in (parameters, [p.grad for p in parameters if p.grad is not None], states)
    ]
    assert [planned.parameters, planned.gradients, planned.optimizer] == found
    simulated = simulate(recipe, Setting("ddp"))
    assert [simulated.parameters, simulated.gradients, simulated.optimizer] == found
    count = sum(p.numel() for p in trained.values())
    assert shape.trainable_parameters == planned.trainable_parameters == simulated.trainable_parameters == count


def test_a_checkpoint_of_another_part_is_refused(loaded: Callable[..., Any]) -> None:
    from distft.runs import checkpoints

    part, whole = (checkpoints.identity(loaded(training__train_only=patterns), False) for patterns in (PART, []))
    (name,) = checkpoints.differences(whole, part)
    assert name == "training.train_only"
    assert checkpoints.is_fixed(name)
    before = {name: value for name, value in whole.items() if name != "training.train_only"}  # of earlier versions
    assert not checkpoints.differences(before, whole)


def test_new_tokens_need_their_rows(loaded: Callable[..., Any]) -> None:
    from distft.hardware.devices import named_device
    from distft.hardware.topology import Topology
    from distft.planner.plan import make_plan
    from distft.planner.search import Where

    where = Where(Topology(1, 1), named_device("A100-80GB", 1))
    changes = {"model__add_tokens": ["<|im_end|>"], "model__trust_remote_code": False}
    with pytest.raises(PlanError, match=r"it leaves out model.embed_tokens, which have rows for model.add_tokens"):
        make_plan(loaded(**changes), where)
    make_plan(loaded("tied", **changes), where)  # lm_head is the embeddings, too
