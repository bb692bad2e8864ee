"""`distft data`: rows as they are trained, marked; what is left out; and what would be trained as something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from chats import assistant, system, user
from click.testing import CliRunner, Result
from tiny import Tiny, write_jsonl

from distft.cli import main
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
    assert "warning: 1 rows of train were longer than max_length" in done.stdout
    assert "data.eval: the first 3 rows, more follow" in done.stdout
    done = run(tiny, tmp_path, [CHAT, long], "--json", **changes)
    report = json.loads(done.stdout)["train"]
    assert (report["read"], report["all_read"], report["format"]) == (2, True, "messages (messages)")
    assert len(report["lengths"]) == 2 and report["counts"]["documents"] == 1
    assert report["shown"][0]["roles"][1] == ["assistant", True]


def test_problems_by_kind(tiny: Tiny, tmp_path: Path) -> None:
    untrained = [user("a"), assistant("b", weight=0)]
    done = run(tiny, tmp_path, [CHAT, untrained, [user("a")], [user("b")], 5])
    assert done.exit_code == 2
    assert "data.train: all 5 rows" in done.stdout
    assert "1 row of train left out (no-turn-to-train); the first: " in done.stdout
    assert "data.train: 3 of 5 rows do not fit (no-assistant-turn 2, no-messages 1)" in done.stderr
    assert f"{tmp_path}/rows.jsonl:3: messages: no assistant turn" in done.stderr
    done = run(tiny, tmp_path, [CHAT, untrained], "--row", "2")
    assert done.exit_code == 2 and ":2: messages: all assistant turns are marked not to be trained" in done.stderr
    done = run(tiny, tmp_path, [CHAT], "--row", "7")
    assert done.exit_code == 2 and "--row: got 7, and data.train has 1 rows" in done.stderr


def report(**changes: Any) -> dict[str, Any]:
    row = {
        "place": "/data/rows.jsonl:1",
        "ids": [1, 2],
        "labels": [-100, 2],
        "pieces": [("a\x1b[2J\n", False), ("b" * 5000, True)],
        "roles": [("user", False), ("assistant", True)],
    }
    counts = {"documents": 3, "tokens": 9, "trained_tokens": 4, "long_rows": 0, "cut_answers": 0, "thoughtless": 0}
    found = {
        "format": "messages (messages)",
        "read": 3,
        "elsewhere": 0,
        "mixed": False,
        "all_read": True,
        "lengths": [3, 250, 999],
        "max_length": 1024,
    }
    return {
        "train": found
        | {"counts": counts | {"notes": [], "mix": [], "untrained": {}}, "problems": [], "shown": [row]}
        | changes
    }


@pytest.mark.parametrize("width", [60, 80, 160])
def test_it_fits_the_terminal(width: int) -> None:
    lines = list(data_page.lines(report(), width, coloured=False, whole=False))
    assert all(len(click.unstyle(line)) <= width for line in lines[:-1])
    assert [line.split()[0] for line in lines if "█" in line] == ["0-199", "200-399", "800-999"]


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
