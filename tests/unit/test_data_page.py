"""`distft data`: rows as they are trained, marked; what is left out; and what would be trained as something else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from chats import assistant, system, user
from click.testing import CliRunner, Result
from tiny import Tiny, write_jsonl

from distft.cli import main
from distft.config.loading import load_recipe
from distft.config.recipe import Data, Recipe
from distft.data.reading import check_files
from distft.errors import DataError
from distft.train.show_rows import show
from distft.views import data_page
from distft.views.summary import data_lines

CHAT = [user("read file"), assistant("open path"), user("node"), assistant("rank step")]


def run(tiny: Tiny, folder: Path, rows: list[Any], *arguments: str, **changes: Any) -> Result:
    write_jsonl(folder / "rows.jsonl", [{"messages": row} for row in rows])
    recipe = tiny.recipe(data__train=str(folder / "rows.jsonl"), **changes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    wide = {"COLUMNS": "300"}  # paths are not wrapped
    return CliRunner().invoke(main, ["data", str(folder / "recipe.yaml"), *arguments], env=wide)


def test_a_row(tiny: Tiny, tmp_path: Path) -> None:
    done = run(tiny, tmp_path, [[user("x"), assistant("y")], CHAT], "--row", "2")
    assert done.exit_code == 0, done.output
    header, roles, text = done.stdout.splitlines()
    assert header.startswith(f"{tmp_path}/rows.jsonl:2: ") and header.endswith(" trained")
    assert roles == "  user → ⟦assistant⟧ → user → ⟦assistant⟧"
    assert text == "<|user|>read file<|go|>⟦open path<eos>⟧<|user|>node<|go|>⟦rank step<eos>⟧"


def test_a_summary_of_a_sample(tiny: Tiny, tmp_path: Path) -> None:
    """What is printed, and the same as JSON; the fourth row is not read."""
    long = [system("list " * 80), user("read"), assistant("file")]
    changes = {"data__long_rows": "drop", "data__eval": str(tiny.path / "heldout.jsonl")}
    done = run(tiny, tmp_path, [CHAT, CHAT, long, "no messages"], "--sample", "3", **changes)
    assert done.exit_code == 0, done.output
    assert "data.train: the first 3 rows, more follow; messages (messages)" in done.stdout
    assert "warning: 1 row of train was longer than max_length" in done.stdout
    assert "data.eval: the first 3 rows, more follow" in done.stdout
    done = run(tiny, tmp_path, [CHAT, long], "--json", **changes)
    report = json.loads(done.stdout)["train"]
    assert (report["read"], report["all_read"], report["format"]) == (2, True, "messages (messages)")
    assert len(report["lengths"]) == 2 and report["counts"]["documents"] == 1
    assert report["shown"][0]["roles"][1] == ["assistant", True]


def test_rows_that_are_too_long_are_an_error_alone(tiny: Tiny, tmp_path: Path) -> None:
    done = run(tiny, tmp_path, [CHAT, [user("read " * 600), assistant("file " * 600)]])
    assert done.exit_code == 2 and "warning" not in done.output and "longer than max_length" not in done.output
    assert re.search(
        r"rows.jsonl:2: 1,\d{3} tokens\ndata.train: 1 row is longer .*, the longest has 1,\d{3};", done.stderr
    )


def test_problems_by_kind(tiny: Tiny, tmp_path: Path) -> None:
    untrained = [user("a"), assistant("b", weight=0)]
    done = run(tiny, tmp_path, [CHAT, untrained, [user("a")], [user("b")], 5])
    assert done.exit_code == 2
    assert "data.train: all 5 rows" in done.stdout
    assert "data.train: 1 row left out (no-turn-to-train); the first: " in done.stdout
    assert "data.train: 3 of 5 rows do not fit (no-assistant-turn 2, no-messages 1)" in done.stderr
    assert f"{tmp_path}/rows.jsonl:3: messages: no assistant turn" in done.stderr
    done = run(tiny, tmp_path, [CHAT, untrained], "--row", "2")
    assert done.exit_code == 2 and ":2: messages: all assistant turns are marked not to be trained" in done.stderr
    done = run(tiny, tmp_path, [CHAT], "--row", "7")
    assert done.exit_code == 2 and "--row: got 7, and data.train has 1 row\n" in done.stderr


def shown(
    tiny: Tiny, folder: Path, rows: list[Any], *splits: Any, row: int | None = None, sample: int = 1000, **changes: Any
) -> dict[str, Any]:
    """What the command's process answers."""
    write_jsonl(folder / "rows.jsonl", [{"messages": row} for row in rows])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(data__train="rows.jsonl", **changes)))
    return show(load_recipe(folder / "recipe.yaml"), splits or ("train", "eval"), row, sample)


def test_the_rows_of_the_evaluation_data(tiny: Tiny, tmp_path: Path) -> None:
    """Those of data.eval, or those that are held out, counted among themselves."""
    heldout = str(tiny.path / "heldout.jsonl")
    done = run(tiny, tmp_path, [CHAT], "--eval", "--row", "2", "--json", data__eval=heldout)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found) == ["recipe", "eval"] and found["eval"]["shown"][0]["place"] == f"{heldout}:2"
    assert list(shown(tiny, tmp_path, [CHAT], "eval", data__eval=heldout)) == ["eval"]
    rows = [[user(str(n)), assistant("y", weight=int(n % 9 > 0))] for n in range(40)]
    whole = shown(tiny, tmp_path, rows, data__eval=0.2)
    train, held = whole["train"], whole["eval"]
    assert train["elsewhere"] == held["counts"]["documents"] and held["elsewhere"] == train["counts"]["documents"]
    assert train["counts"]["untrained"] and not held["counts"]["untrained"]  # told once
    second = shown(tiny, tmp_path, rows, "eval", row=2, data__eval=0.2)["eval"]
    assert second["shown"][0]["place"] == f"{held['shown'][1]['place']} (held out)"
    number = held["counts"]["documents"]
    with pytest.raises(DataError, match=f"--row: got 41, and data.eval has {number} rows"):
        shown(tiny, tmp_path, rows, "eval", row=41, data__eval=0.2)
    with pytest.raises(DataError, match=r"--eval: the recipe has no data\.eval; "):
        shown(tiny, tmp_path, rows, "eval")
    # A row that cannot be read is in neither split.
    whole = shown(tiny, tmp_path, [*rows, [user("x")]], data__eval=0.2)
    assert whole["train"]["problems"] and not whole["eval"]["problems"]


def test_few_rows_say_nothing_of_those_that_follow(tiny: Tiny, tmp_path: Path) -> None:
    """The first rows may all be held out, or not trained; that is no fault of all of them."""
    rows = [[user(str(n)), assistant("y", weight=int(n > 3))] for n in range(40)]
    for changes in ({"data__eval": 0.01}, {}):
        assert not any(report["problems"] for report in shown(tiny, tmp_path, rows, sample=3, **changes).values())
    problems = shown(tiny, tmp_path, rows[:3])["train"]["problems"]
    assert problems == ["data.train: no row is left: all are marked not to be trained"]


@pytest.mark.parametrize(
    ("long_rows", "note"),
    [
        ("error", "refused by launch (data.long_rows: error)"),
        ("drop", "left out"),
        ("truncate", "left out, with all that is trained cut off"),
    ],
)
def test_a_row_that_is_too_long(tiny: Tiny, tmp_path: Path, long_rows: str, note: str) -> None:
    found = shown(tiny, tmp_path, [[user("x " * 80), assistant("y")]], "train", row=1, data__long_rows=long_rows)
    page = list(data_page.lines(found, 300, coloured=False, whole=True))
    assert click.unstyle(page[0]).endswith(f", more than data.max_length (64): {note}")


def test_validate_says_things_once(tiny: Tiny, tmp_path: Path) -> None:
    """What it finds in all rows is not said again of those that it tokenizes."""
    rows = [{"messages": CHAT}, {"messages": [user("a"), assistant("b", weight=0)]}]
    write_jsonl(tmp_path / "rows.jsonl", rows * 2)
    (tmp_path / "empty.jsonl").write_text("")
    recipe = tiny.recipe(data__train=["rows.jsonl", "empty.jsonl"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(main, ["validate", str(tmp_path / "recipe.yaml"), "--sample", "3"])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("left out") == 1 and "data.train: 2 rows left out (no-turn-to-train)" in done.stdout
    assert done.stdout.count("no rows in") == 1
    done = CliRunner().invoke(main, ["validate", str(tmp_path / "recipe.yaml"), "--set", "data.train=rwos.jsonl"])
    assert done.exit_code == 2 and "did you mean rows.jsonl?" in done.stderr


def report(**changes: Any) -> dict[str, Any]:
    row = {
        "place": "/data/rows.jsonl:1",
        "ids": [1, 2],
        "labels": [-100, 2],
        "pieces": [("a\x1b[2J\n", False), ("b" * 5000, True)],
        "roles": [("user", False), ("assistant", True)],
    }
    counts = {
        "documents": 3,
        "rows": 3,
        "tokens": 9,
        "trained_tokens": 4,
        "long_rows": 0,
        "cut_answers": 0,
        "thoughtless": 0,
    }
    found = {
        "format": "messages (messages)",
        "not_used": "",
        "read": 3,
        "which": "all 3 rows",
        "elsewhere": 0,
        "mixed": False,
        "all_read": True,
        "lengths": [3, 250, 999],
        "max_length": 1024,
    }
    counts |= {"notes": [], "mix": [], "untrained": {}, "odd": {}, "empty": []}
    return {"train": found | {"counts": counts, "problems": [], "shown": [row]} | changes}


@pytest.mark.parametrize("width", [60, 80, 160])
def test_it_fits_the_terminal(width: int) -> None:
    lines = list(data_page.lines(report(), width, coloured=False, whole=False))
    assert all(len(click.unstyle(line)) <= width for line in lines[:-1])
    assert [line.split()[0] for line in lines if "█" in line] == ["0-199", "200-399", "800-999"]
    page = data_page.lines(report(lengths=[810, 850, 999]), width, coloured=False, whole=False)
    assert [line.split()[0] for line in page if "█" in line] == ["800-999"]  # not the empty ones before it


def test_a_row_does_not_steer_the_terminal_and_is_shortened_unless_asked_for() -> None:
    short = "\n".join(data_page.lines(report(), 80, coloured=False, whole=False))
    assert "\x1b[2J" not in short and "a\\x1b[2J\n" in short
    assert " … 3,006 characters … " in short
    whole = "\n".join(data_page.lines(report(), 80, coloured=True, whole=True))
    assert "\x1b[32m" + "b" * 5000 in whole


def test_a_mix_is_counted_before_it_is_mixed_and_says_so(tiny: Tiny, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 4)
    recipe = tiny.recipe(data__train=[{"path": "rows.jsonl", "rows": 10}])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for command, line in (
        ("data", "data.train: all 4 rows, before they are mixed; messages"),
        ("validate", "as they are trained, all rows, before they are mixed:"),
    ):
        done = CliRunner().invoke(main, [command, str(tmp_path / "recipe.yaml")], env={"COLUMNS": "300"})
        assert done.exit_code == 0 and line in done.stdout, done.output
    counts = {"train": report()["train"]["counts"] | {"rows": 3, "mix": [["a", 4, 10], ["b", 4, 2]]}}
    assert data_lines(counts)[1:] == ["  4 rows of a: 10 taken, some more than once", "  4 rows of b: 2 taken"]


def test_the_sample_is_shared_among_sources_and_files(tiny: Tiny, tmp_path: Path) -> None:
    """A second source that cannot be trained is found, however many rows the first one has."""
    (tmp_path / "folder").mkdir()
    for name in ("a.jsonl", "folder/b.jsonl", "folder/c.jsonl"):
        write_jsonl(tmp_path / name, [*[{"messages": CHAT}] * 49, {"messages": [user(name), assistant("read")]}])
    sources = [{"path": "a.jsonl", "weight": 1}, {"path": "folder", "weight": 2}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(data__train=sources)))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    report = show(recipe, ["train"], None, 40)["train"]
    assert (report["which"], report["all_read"]) == ("40 rows, the first of each file", False)
    assert len(report["lengths"]) == 40 and report["counts"]["mix"] == []
    # What one source does not have is taken of the others, whichever comes first.
    for first, second in (("a.jsonl", "small.jsonl"), ("small.jsonl", "a.jsonl")):
        write_jsonl(tmp_path / "small.jsonl", [{"messages": CHAT}] * 2)
        several = load_recipe(tmp_path / "recipe.yaml", [f"data.train=[{first}, {second}, folder]"])
        assert show(several, ["train"], None, 40)["train"]["read"] == 40
        assert check_files(several, 40)[-1] == "data.train: 40 rows of messages (messages), the first of each file"
        assert check_files(several, 152)[-1] == "data.train: 152 rows of messages (messages)"
    everything = show(recipe, ["train"], None, 150)["train"]
    assert (everything["which"], everything["all_read"]) == ("all 150 rows", True)
    paths = [str(tmp_path / name) for name in ("a.jsonl", "folder")]
    assert everything["counts"]["mix"] == [(paths[0], 50, 50), (paths[1], 100, 100)]
    for name in ("a.jsonl", "folder/c.jsonl"):
        whole = (tmp_path / name).read_text()
        write_jsonl(tmp_path / name, [{"messages": CHAT}, {"messages": [user("read"), assistant("file " * 90)]}])
        problems = show(recipe, ["train"], None, 8)["train"]["problems"]
        assert problems[0].startswith(f"{tmp_path}/{name}:2: ")
        (tmp_path / name).write_text(whole)


def test_one_row_says_why_it_is_not_trained(tiny: Tiny, tmp_path: Path) -> None:
    long = [user("read"), assistant("file " * 200)]
    for changes, expected in (
        ({"data__long_rows": "drop"}, "left out"),
        ({}, "refused by launch (data.long_rows: error)"),
        ({"data__long_rows": "truncate"}, ""),
    ):
        report = shown(tiny, tmp_path, [CHAT, long], "train", row=2, **changes)["train"]
        trained = int(not expected)
        assert (report["left_out"], report["counts"]["rows"], len(report["shown"])) == (expected, trained, 1)
    done = run(tiny, tmp_path, [CHAT], "--row", "7", "--json")
    assert (done.exit_code, done.stdout) == (2, "") and "--row: got 7, and data.train has 1 row\n" in done.stderr


def test_the_format_is_told_where_no_row_fits(tiny: Tiny, tmp_path: Path) -> None:
    done = run(tiny, tmp_path, [[user("x")]] * 3)
    assert "data.train: all 3 rows; messages (messages)" in done.stdout
    assert "no-assistant-turn 3" in done.stderr


def test_rows_are_checked_in_every_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "read"}] * 30)
    write_jsonl(tmp_path / "b.jsonl", [{"text": "read"}, {"text": 5}])
    data = Data(train=[str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")])
    with pytest.raises(DataError, match=r"b.jsonl:2: text: got 5, need a string"):
        check_files(Recipe(name="x", model={"name_or_path": "x"}, data=data), 10)
    write_jsonl(tmp_path / "b.jsonl", [{"text": "read"}])
    lines = check_files(Recipe(name="x", model={"name_or_path": "x"}, data=data), 10)
    assert lines[-1] == "data.train: 10 rows of text (text), the first of each file"
