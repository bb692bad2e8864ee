"""What the tests of all folders share: the tiny model, and a cache of their own."""

from __future__ import annotations

import os
from pathlib import Path

import light_install
import pytest
from tiny import Tiny, make_tiny


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared data of the tests stays out of the user's cache."""
    os.environ["DISTFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def light_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with distft and all that it needs, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    light_install.fill(folder)
    return folder
