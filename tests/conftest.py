"""What the tests of all folders share: the tiny model, an environment, and what is made once for all workers."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import light_install
import pytest
from tiny import Tiny, make_tiny


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session, the same one in all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def once(shared: Path) -> Callable[..., Path]:
    """once(name, make): the folder `name`, filled by make(folder) for the first test that asks; to be read only."""

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        path = shared / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            if not lock.read():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
                make(path)
                lock.write("made")
        return path

    return folder


@pytest.fixture(scope="session", autouse=True)
def _environment(shared: Path) -> None:
    """Prepared data stays out of the user's cache; threads that wait for others sleep: other tests run beside them."""
    os.environ["DISTFT_CACHE"] = str(shared / "cache")
    os.environ["OMP_WAIT_POLICY"] = "passive"


@pytest.fixture(scope="session")
def tiny(once: Callable[..., Path]) -> Tiny:
    return Tiny(once("tiny", make_tiny))


@pytest.fixture(scope="session")
def light_site(once: Callable[..., Path]) -> Path:
    """A folder with distft and all that it needs, and nothing else."""
    return once("light", light_install.fill)
