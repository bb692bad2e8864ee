"""Data that is not on this machine: a note where nothing reads it here, an error where the launch would."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from tiny import Tiny

from distft.cli import main
from distft.config.loading import load_recipe
from distft.runs import checkpoints
from distft.runs.checkpoints import Checkpoint

GONE = "data.train: /cluster/rows.jsonl is not here; its rows are not checked"


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a recipe for data on a cluster, and the profile of one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTFT_CLUSTER", raising=False)
    write(tiny.recipe(data__train="/cluster/rows.jsonl"))
    profile(python="/opt/site/bin/python")
    return tmp_path


def write(recipe: dict[str, Any]) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))


def profile(**changes: str) -> None:
    Path("site.yaml").write_text(yaml.safe_dump({"runs_dir": "/cluster/runs", "node": {"gpus_per_node": 0}} | changes))


def run(*arguments: str, expect: int = 0) -> Result:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == expect, done.output
    return done


def test_plan(folder: Path) -> None:
    assert f"warning: {GONE}" in run("plan", "recipe.yaml").stdout
    assert GONE in json.loads(run("plan", "recipe.yaml", "--json").stdout)["warnings"]


def test_validate(folder: Path) -> None:
    done = run("validate", "recipe.yaml")
    assert done.stderr == f"warning: {GONE}\n"
    assert json.loads(run("validate", "recipe.yaml", "--json").stdout)["warnings"] == [GONE]


def test_validate_checks_the_rows_that_are_here(folder: Path, tiny: Tiny) -> None:
    Path("rows.jsonl").write_text('{"text": 5}\n')
    write(tiny.recipe(data__train=["/cluster/rows.jsonl", "rows.jsonl"], data__eval="/cluster/held.jsonl"))
    assert f"{folder}/rows.jsonl:1: text: got 5, need a string" in run("validate", "recipe.yaml", expect=2).stderr
    Path("rows.jsonl").write_text('{"text": "5"}\n')
    assert run("validate", "recipe.yaml").stderr.splitlines() == [
        "warning: data.train[0]: /cluster/rows.jsonl is not here; its rows are not checked",
        "warning: data.eval: /cluster/held.jsonl is not here; its rows are not checked",
    ]


def test_render(folder: Path) -> None:
    assert run("render", "recipe.yaml", "-o", "job").stderr == f"warning: {GONE}\n"
    assert yaml.safe_load(Path("job/recipe.yaml").read_text())["data"]["train"] == "/cluster/rows.jsonl"
    assert GONE in json.loads(Path("job/plan.json").read_text())["warnings"]


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["launch", "dry run"])
def test_a_launch_that_reads_the_data_here(folder: Path, options: list[str]) -> None:
    """On this machine, or prepared by this Python for a cluster that runs the same."""
    error = "error: data.train: no such file: /cluster/rows.jsonl (recipe.yaml:"
    assert run("launch", "recipe.yaml", *options, expect=2).stderr.startswith(error)
    profile(python=sys.executable)
    assert run("launch", "recipe.yaml", "--cluster", "site.yaml", *options, expect=2).stderr.startswith(error)


def test_a_launch_whose_nodes_read_the_data(folder: Path, tiny: Tiny) -> None:
    shown = run("launch", "recipe.yaml", "--cluster", "site.yaml", "--dry-run").stdout
    assert f"warning: {GONE}" in shown
    write(tiny.recipe(data__train="/cluster/rows.jsonl", data__chat_template="chat.jinja"))
    assert (
        f"warning: data.chat_template: {folder}/chat.jinja is not here; launch needs it"
        in run("validate", "recipe.yaml").stderr
    )
    done = run("launch", "recipe.yaml", "--cluster", "site.yaml", "--dry-run", expect=2)
    assert done.stderr.startswith(f"error: data.chat_template: no such file: {folder}/chat.jinja (recipe.yaml:")


def test_resume_leaves_the_comparison_to_the_nodes(folder: Path, tiny: Tiny) -> None:
    there = load_recipe("recipe.yaml", ["data.train=" + str(tiny.path / "chat.jsonl")])
    newest = Checkpoint(folder, {"identity": checkpoints.identity(there)})
    assert checkpoints.changes(newest, load_recipe("recipe.yaml", ["training.seed=7"])).keys() == {"training.seed"}
    here = load_recipe("recipe.yaml", ["data.train=" + str(tiny.path / "heldout.jsonl")])
    assert checkpoints.changes(newest, here).keys() == {"data"}


def test_a_misspelt_name_is_still_helped(folder: Path, tiny: Tiny) -> None:
    Path("rows.jsonl").write_text('{"text": "5"}\n')
    write(tiny.recipe(data__train="row.jsonl"))
    expected = f"data.train: {folder}/row.jsonl is not here; its rows are not checked; did you mean rows.jsonl?"
    assert run("validate", "recipe.yaml").stderr == f"warning: {expected}\n"


def test_what_an_override_replaced_is_printed(folder: Path, tiny: Tiny) -> None:
    recipe = tiny.recipe()
    recipe["training"]["num_train_epochs"] = recipe["training"].pop("max_steps")
    write(recipe)
    line = next(n for n, text in enumerate(Path("recipe.yaml").read_text().splitlines(), 1) if "num_train" in text)
    sets = ["--set", "training.max_steps=8"]
    expected = f"training.num_train_epochs: 4 (recipe.yaml:{line}) is replaced by --set training.max_steps=8"
    assert run("validate", "recipe.yaml", *sets).stderr == f"warning: {expected}\n"
    for command in ("plan", "validate"):
        assert expected in json.loads(run(command, "recipe.yaml", *sets, "--json").stdout)["warnings"]
    dry = run("launch", "recipe.yaml", "--dry-run", *sets).stdout
    assert f"warning: {expected}\n" in dry
    assert "max_steps: 8\n" in dry and "num_train_epochs: null\n" in dry
