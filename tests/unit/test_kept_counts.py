"""What is counted for a plan is kept in distft's cache, for all commands that plan the same recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Glm4Config, Glm4ForCausalLM

from distft.commands import verify
from distft.config.loading import load_recipe
from distft.hardware.devices import named_device
from distft.hardware.topology import Topology
from distft.jobs import planned, replan
from distft.jobs.job import local_job, recipe_workload
from distft.jobs.target import Target, plan_recipe
from distft.planner import kept_counts
from distft.planner.plan import plan_json
from distft.planner.search import Where
from distft.runs.directory import RunDir

WHERE = Where(Topology(1, 2), named_device("H100", 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a model of a family that is counted, with weights."""
    folder = tmp_path_factory.mktemp("kept")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Glm4Config(vocab_size=480, num_hidden_layers=1, head_dim=16, pad_token_id=0, **sizes)
    Glm4ForCausalLM(config).save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text('{"text": "a"}\n' * 9)
    recipe = {
        "name": "kept",
        "model": {"name_or_path": "model"},
        "data": {"train": "data.jsonl", "max_length": 64},
        "training": {"global_batch_size": 8, "micro_batch_size": 4, "mixed_precision": "no"},
        "parallelism": {"strategy": "ddp"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


@pytest.fixture
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An empty cache; what is counted from now on."""
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    made: list[str] = []
    count: Callable[..., Any] = planned._count

    def counting(recipe: Any) -> Any:
        made.append("a model")
        counts = count(recipe)
        step = counts.peaks
        monkeypatch.setattr(counts, "peaks", lambda *how: (made.extend(f"{h.rows} rows" for h in how), step(*how))[1])
        return counts

    monkeypatch.setattr(planned, "_count", counting)
    return made


def plan(folder: Path, *sets: str) -> dict[str, Any]:
    found = planned.plan_any(load_recipe(folder / "recipe.yaml", sets), WHERE)
    assert found.simulated
    assert found.model.name == str(folder / "model")
    return plan_json(found, "")


def test_the_same_plan_without_counting(folder: Path, counts: list[str]) -> None:
    first = plan(folder)
    assert "a model" in counts
    counts.clear()
    assert plan(folder) == first
    plan(folder, "name=other", "training.learning_rate=1e-5", "data.eval=0.5")  # nothing of these changes a step
    plan(folder, "training.micro_batch_size=2", "training.global_batch_size=4")  # the line was drawn through it
    assert counts == []
    plan(folder, "training.micro_batch_size=8", "training.global_batch_size=16")
    assert counts == ["a model", "8 rows"]


def model(folder: Path, *sets: str) -> kept_counts.Kept:
    recipe = load_recipe(folder / "recipe.yaml", sets)
    return kept_counts.Kept(recipe, lambda: planned._count(recipe))


def test_what_counts_again(folder: Path, counts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model(folder)
    config = json.loads((folder / "model" / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    counts.clear()
    named = model(folder, f"model.name_or_path={other}")  # a model is what its config.json says
    assert (named.sizes, named.model.name, counts) == (first.sizes, str(other), [])
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    assert model(folder, f"model.name_or_path={other}").sizes.parameters > first.sizes.parameters
    model(folder, "lora.r=4")
    model(folder, "model.add_tokens=[<new>]")
    installed = kept_counts.extras.installed()
    for versions in ({"torch": "9.0"}, {"mamba-ssm": "1.0"}):
        monkeypatch.setattr(kept_counts.extras, "installed", lambda versions=versions: installed | versions)
        model(folder)
    monkeypatch.setattr(kept_counts, "_code", lambda: b"changed")
    model(folder)
    assert counts == 6 * ["a model"]
    model(folder, "model.trust_remote_code=true")  # its code may change, so nothing is kept
    model(folder, "model.trust_remote_code=true")
    assert counts == 8 * ["a model"]


def test_all_sizes_are_kept(folder: Path, counts: list[str]) -> None:
    counted, kept = (model(folder, "lora=null", "training.optim=muon").sizes for _ in range(2))
    assert (
        counted
        == kept
        == planned._count(load_recipe(folder / "recipe.yaml", ["lora=null", "training.optim=muon"])).sizes
    )
    assert kept.muon.elements > 0
    counted, kept = (model(folder, "lora=null", "training.optim=galore_adamw").sizes for _ in range(2))
    assert counted == kept and kept.low_rank.state_elements > 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sizes": {}}'], ids=["empty", "half", "list", "lacking"])
def test_a_damaged_file_is_counted_again(folder: Path, counts: list[str], tmp_path: Path, text: str) -> None:
    first = model(folder)
    (file,) = (tmp_path / "cache" / "counts").glob("*.json")
    file.write_text(text)
    assert model(folder).sizes == first.sizes
    assert counts == ["a model", "a model"]
    assert json.loads(file.read_text()).keys() == kept_counts.KEYS


def test_a_cache_that_cannot_be_written(folder: Path, counts: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")  # as on a full or read-only disk: each write fails
    step = kept_counts.Step("zero", False, False, 1)
    first, second = model(folder).peaks(step), model(folder).peaks(step)
    assert (first, counts) == (second, 2 * ["a model", "1 rows"])


def test_two_processes_keep_the_steps_of_both(folder: Path, counts: list[str]) -> None:
    one, two = model(folder), model(folder)
    step = kept_counts.Step("zero", False, False, 1)
    peaks = one.peaks(step), two.peaks(step._replace(rows=2))
    counts.clear()
    three = model(folder)
    assert (three.peaks(step), three.peaks(step._replace(rows=2))) == peaks
    assert counts == []


def test_it_does_not_grow_for_ever(
    folder: Path, counts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_counts, "MOST", 3)
    for rank in (1, 2, 3, 1, 4):
        model(folder, f"lora.r={rank}")
    assert len(list((tmp_path / "cache" / "counts").iterdir())) == 3
    counts.clear()
    model(folder, "lora.r=1")  # used since
    assert counts == []
    model(folder, "lora.r=2")
    assert "a model" in counts


def test_verify_counts(folder: Path, counts: list[str]) -> None:
    trials = verify.plan(str(folder / "recipe.yaml"), [], [1, 2], ["ddp"], steps=2).trials
    assert [trial.plan.simulated for trial in trials] == [True, True]
    assert counts.count("a model") == 1


def test_a_run_that_needs_less_memory_is_counted(folder: Path, counts: list[str], tmp_path: Path) -> None:
    recipe, made = plan_recipe(str(folder / "recipe.yaml"), ["training.micro_batch_size=8"], Target(1, 1))
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    for name, text in local_job(recipe_workload(recipe, made, run), run).files.items():
        (run.path / name).write_text(text)
    change = replan.less_memory(run)
    assert change is not None
    assert change.text == "training.micro_batch_size: 8 -> 4"
    planned = json.loads(run.plan.read_text())
    run.plan.write_text(json.dumps(planned | {"strategy": "fsdp", "reshard_after_forward": False}))
    kept = replan.less_memory(run)
    assert kept is not None
    assert kept.text == "fsdp.overrides.fsdp_reshard_after_forward: False -> true"
    memory = json.loads(change.files["plan.json"])["memory"]
    assert memory["simulated"] is True
    assert memory["peak"] < made.memory.peak
