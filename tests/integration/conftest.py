"""Warm ranks, and runs that are trained once for all tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import Result, create
from warm import WarmRanks

from distft.runs.directory import RunDir


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmRanks]:
    ranks = WarmRanks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def trained(warm: WarmRanks, once: Callable[..., Path]) -> Callable[..., Result]:
    """trained(recipe, ranks=1): a run of that recipe, made for the first test that asks. Change nothing in it."""

    def run(recipe: dict[str, Any], ranks: int = 1) -> Result:
        def train(folder: Path) -> None:
            warm.train(create(recipe, folder, ranks))

        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
        folder = once(f"trained/{recipe['parallelism'].get('strategy', 'ddp')}-x{ranks}-{digest}", train)
        return Result(0, "", "", RunDir(folder / "runs" / recipe["name"]).path)

    return run
