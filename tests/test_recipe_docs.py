"""docs/recipe.md is the generator's, and its example is a recipe."""

from __future__ import annotations

import re
from pathlib import Path

from distft.loading import load_recipe
from distft.recipe import Recipe
from distft.recipe_docs import EXAMPLE, recipe_markdown
from distft.wording import schema_of

DOCS = Path(__file__).parent.parent / "docs" / "recipe.md"


def test_docs_are_the_generators():
    assert DOCS.read_text() == recipe_markdown(), "python -m distft.recipe_docs > docs/recipe.md"


def test_the_example_loads(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "heldout"):
        (tmp_path / f"data/{name}.jsonl").touch()
    (tmp_path / "recipe.yaml").write_text(re.search(r"```yaml\n(.*?)```", recipe_markdown(), re.DOTALL)[1])
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.data.train == f"{tmp_path}/data/train.jsonl"
    assert recipe.training.num_train_epochs == 3


def test_example_and_tables_have_every_field():
    text = recipe_markdown()
    groups = 0
    for name, schema in schema_of(Recipe)["properties"].items():
        members = [member for member in [schema, *schema.get("anyOf", ())] if "properties" in member]
        for field in [field for member in members for field in member["properties"]] or [name]:
            assert f"\n| `{field}` | " in text
            assert re.search(rf"^( *|.*# or ){field}:", EXAMPLE, re.MULTILINE), field
        groups += bool(members)
        assert not members or f"\n## {name}\n" in text
    assert groups == 9


def test_tables_are_whole():
    for line in recipe_markdown().partition("## Example")[0].splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, line
