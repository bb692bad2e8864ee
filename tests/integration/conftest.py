"""Warm ranks, and runs that are trained once for all tests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import Result, create
from warm import ONLY_TORCHRUN, VARIABLE, WarmRanks

from distft.runs.directory import RunDir

WARM = WarmRanks()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """What a test here and its fixtures launch has warm ranks, unless it asks for those of torchrun."""
    before = dict(os.environ)
    if item.path.is_relative_to(Path(__file__).parent):  # this hook sees all tests
        real = item.get_closest_marker("real_ranks")
        only = ONLY_TORCHRUN if real and real.kwargs.get("warm_torchrun") else {}
        os.environ.update(WARM.path if real and not only else {**WARM.environment(), **only})
    yield
    for name in (VARIABLE, *ONLY_TORCHRUN, *WARM.path):
        os.environ.pop(name, None)
        os.environ.update({name: before[name]} if name in before else {})


def pytest_sessionfinish() -> None:
    WARM.close()


@pytest.fixture(scope="session")
def warm() -> WarmRanks:
    return WARM


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
