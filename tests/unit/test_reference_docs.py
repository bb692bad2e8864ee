"""The generated pages of docs/ are what their generator makes, and the recipe's example is a recipe."""

from __future__ import annotations

import re
from pathlib import Path

from generated_docs import EXAMPLE, files, main

from distft.config.cluster import Cluster
from distft.config.loading import load_recipe
from distft.config.recipe import Recipe
from distft.config.schema_text import schema_of

DOCS = Path(__file__).parents[2] / "docs"
RECIPE = files()["recipe.md"]


def test_docs_are_the_generators():
    for name, text in files().items():
        assert (DOCS / name).read_text() == text, "make reference"


def test_check_names_what_differs(tmp_path, capsys):
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), "--check"]) == 0
    (tmp_path / "profile.md").write_text("by hand\n")
    (tmp_path / "rules.md").unlink()
    assert main([str(tmp_path), "--check"]) == 1
    shown = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == [f"{tmp_path}/profile.md", f"{tmp_path}/rules.md"]
    assert (tmp_path / "profile.md").read_text() == "by hand\n"


def test_the_example_loads(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "heldout"):
        (tmp_path / f"data/{name}.jsonl").touch()
    (tmp_path / "recipe.yaml").write_text(re.search(r"```yaml\n(.*?)```", RECIPE, re.DOTALL)[1])
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.data.train[0] == f"{tmp_path}/data/train.jsonl"
    assert recipe.training.num_train_epochs == 3


def test_example_and_tables_have_every_field():
    text = RECIPE
    groups = 0
    for name, schema in schema_of(Recipe)["properties"].items():
        members = [member for member in [schema, *schema.get("anyOf", ())] if "properties" in member]
        for field in [field for member in members for field in member["properties"]] or [name]:
            assert f"\n| `{field}` | " in text
            assert re.search(rf"^( *|.*# or ){field}:", EXAMPLE, re.MULTILINE), field
        groups += bool(members)
        assert not members or f"\n## {name}\n" in text
    assert groups == 9
    for group in [schema_of(Cluster), *(schema_of(Cluster)["properties"][name] for name in ("node", "slurm"))]:
        assert all(
            f"| `{field}` | " in files()["profile.md"] or "properties" in schema
            for field, schema in group["properties"].items()
            if field not in ("network", "container")
        )


def test_tables_are_whole():
    for line in [line for text in files().values() for line in text.partition("## Example")[0].splitlines()]:
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, line
