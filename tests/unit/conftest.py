"""Fixtures of the tests of `distft import`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from importing import Import

from distft.errors import RecipeError
from distft.importers.draft import Draft
from distft.importers.kinds import read_file


@pytest.fixture
def imported(tmp_path: Path) -> Import:
    """Import options as a file `config.yaml` for 8 GPUs; the recipe is checked."""

    def run(options: dict[str, Any], gpus: int | None = 8) -> Draft:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(options, sort_keys=False))
        draft = read_file(file, tmp_path, gpus)
        if draft.problems:
            raise RecipeError(draft.problems)
        if not draft.refused:
            draft.check()
        return draft

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # xdist sets it
    return tmp_path
