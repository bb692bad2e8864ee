"""Data that is not on this machine: a note where nothing reads it here, an error where the launch would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
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
    if "max_steps" in recipe["training"]:
        recipe["training"]["max_steps"] = 20  # fewer get a warning
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))


def profile(**changes: str) -> None:
    Path("site.yaml").write_text(yaml.safe_dump({"runs_dir": "/cluster/runs", "node": {"gpus_per_node": 0}} | changes))


def run(*arguments: str, expect: int = 0) -> Result:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == expect, done.output
    return done


def test_plan(folder: Path) -> None:
    for options in ([], ["--cluster", "site.yaml"], ["--gpu", "rtx4090"]):
        assert f"warning: {GONE}" in run("plan", "recipe.yaml", *options).stdout
        assert GONE in json.loads(run("plan", "recipe.yaml", *options, "--json").stdout)["warnings"]


def test_validate(folder: Path) -> None:
    done = run("validate", "recipe.yaml", "--cluster", "site.yaml")
    assert done.stderr == f"warning: {GONE}\n"
    assert done.stdout.endswith("; the data that is not here was not checked\n")
    done = run("validate", "recipe.yaml", "--cluster", "site.yaml", "--json")
    found = json.loads(done.stdout)
    assert (found["warnings"], found["data_is_here"]) == ([GONE], False)


@pytest.mark.parametrize(
    "command",
    [["plan", "--gpu", "local"], ["validate"], ["render", "-o", "job"], ["launch"], ["data"], ["verify"]],
    ids=lambda words: " ".join(words),
)
def test_data_that_must_be_here(folder: Path, tiny: Tiny, command: list[str]) -> None:
    """Where nothing says that another machine reads it, with the name that may have been meant."""
    Path("data").mkdir()
    Path("data/train.jsonl").write_text('{"text": "5"}\n')
    for path, error in {
        "/cluster/rows.jsonl": "no such file: /cluster/rows.jsonl",
        "data/trian.jsonl": f"no such file: {folder}/data/trian.jsonl; did you mean train.jsonl?",
        "data/trian": f"no such file: {folder}/data/trian; did you mean train.jsonl?; the hub's data set is "
        "hf://datasets/data/trian",
        "dat": f"no such file: {folder}/dat; did you mean data?",
        "~nobody-of-that-name/x.json": f"no such file: {folder}/~nobody-of-that-name/x.json",
    }.items():
        write(tiny.recipe(data__train=path))
        done = run(command[0], "recipe.yaml", *command[1:], expect=2)
        assert done.stderr.startswith(f"error: data.train: {error} (recipe.yaml:"), done.stderr
    assert not Path("job").exists() and not Path("runs").exists()


def test_a_model_that_is_neither_here_nor_on_the_hub(folder: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name may be a hub id; a name beside it may have been meant."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("models/small").mkdir(parents=True)
    Path("rows.jsonl").write_text('{"text": "5"}\n')
    for name, meant in {"models/smal": "small", "modles": "models"}.items():
        write(tiny.recipe(data__train="rows.jsonl", model__name_or_path=name))
        for command in ("plan", "validate", "launch", "data"):
            done = run(command, "recipe.yaml", expect=2)
            assert name in done.stderr and f"; did you mean {meant}?" in done.stderr, done.stderr


def test_validate_checks_the_rows_that_are_here(folder: Path, tiny: Tiny) -> None:
    Path("rows.jsonl").write_text('{"text": 5}\n')
    write(tiny.recipe(data__train=["/cluster/rows.jsonl", "rows.jsonl"], data__eval="/cluster/held.jsonl"))
    elsewhere = ["validate", "recipe.yaml", "--cluster", "site.yaml"]
    assert f"{folder}/rows.jsonl:1: text: got 5, need a string" in run(*elsewhere, expect=2).stderr
    Path("rows.jsonl").write_text('{"text": "5"}\n')
    assert run(*elsewhere).stderr.splitlines() == [
        "warning: data.train[0]: /cluster/rows.jsonl is not here; its rows are not checked",
        "warning: data.eval: /cluster/held.jsonl is not here; its rows are not checked",
    ]


def test_render(folder: Path) -> None:
    assert run("render", "recipe.yaml", "--cluster", "site.yaml", "-o", "job").stderr == f"warning: {GONE}\n"
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
        in run("validate", "recipe.yaml", "--cluster", "site.yaml").stderr
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
    assert run("validate", "recipe.yaml", "--cluster", "site.yaml").stderr == f"warning: {expected}\n"


NO_RIGHTS = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"] if os.geteuid() == 0 else []


@pytest.mark.skipif(bool(NO_RIGHTS) and shutil.which("setpriv") is None, reason="root may read everything")
def test_what_nobody_may_read_or_write(folder: Path, tiny: Tiny) -> None:
    """Folders that cannot be entered, or whose names may be listed and nothing more; a run directory that cannot be
    made, which is said before anything is prepared."""
    for name, mode in {"closed": 0, "listed": 0o444, "fixed": 0o555}.items():
        Path(name).mkdir()
        Path(name, "rows.jsonl").write_text('{"text": "5"}\n')
        Path(name).chmod(mode)
    site = ["--cluster", "site.yaml"]
    for train, words, status, text in (
        ("closed/rows.jsonl", ["validate"], 2, f"no permission to look at: {folder}/closed/rows.jsonl ("),
        ("closed/rows.jsonl", ["validate", *site], 0, f"{folder}/closed/rows.jsonl is not here; "),
        ("closed", ["validate"], 2, f"{folder}/closed"),
        ("listed", ["validate"], 2, ": cannot be read (permission denied)\n"),
        (
            "fixed",
            ["launch", "--set", "output_dir=fixed/runs"],
            2,
            f"output_dir: {folder}/fixed/runs cannot be written",
        ),
    ):
        write(tiny.recipe(data__train=train))
        command = [*NO_RIGHTS, sys.executable, "-m", "distft", words[0], "recipe.yaml", *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DISTFT_CACHE": "cache"})
        assert (done.returncode, text in done.stderr, "Traceback" in done.stderr) == (status, True, False), done.stderr
    assert not Path("cache").exists()
    for name in ("closed", "listed", "fixed"):
        Path(name).chmod(0o755)


def test_misspelt_files_beside_the_recipe(folder: Path) -> None:
    for name in ("train.py", "job.jinja", "trl.yaml"):
        Path(name).write_text("x: 1\n")
    for words, meant in {
        ("validate", "recipy.yaml"): "recipe.yaml",
        ("launch", "--", "trian.py"): "train.py",
        ("validate", "recipe.yaml", "--cluster", "sit.yaml"): "site.yaml",
        ("validate", "recipe.yaml", "--cluster", "site.yaml", "--template", "jop.jinja"): "job.jinja",
        ("import", "trll.yaml"): "trl.yaml",
        ("import", "--", "trl", "sft", "--config", "tlr.yaml"): "trl.yaml",
    }.items():
        done = run(*words, expect=2)
        assert f"; did you mean {meant}?" in done.stderr, done.stderr


def test_what_an_override_replaced_is_printed(folder: Path, tiny: Tiny) -> None:
    recipe = tiny.recipe()
    recipe["training"]["num_train_epochs"] = recipe["training"].pop("max_steps")
    write(recipe)
    line = next(n for n, text in enumerate(Path("recipe.yaml").read_text().splitlines(), 1) if "num_train" in text)
    sets = ["--set", "training.max_steps=80"]
    expected = f"training.num_train_epochs: 4 (recipe.yaml:{line}) is replaced by --set training.max_steps=80"
    assert run("validate", "recipe.yaml", *sets).stderr == f"warning: {expected}\n"
    for command in ("plan", "validate"):
        assert expected in json.loads(run(command, "recipe.yaml", *sets, "--json").stdout)["warnings"]
    dry = run("launch", "recipe.yaml", "--dry-run", *sets).stdout
    assert f"warning: {expected}\n" in dry
    assert "max_steps: 80\n" in dry and "num_train_epochs: null\n" in dry
