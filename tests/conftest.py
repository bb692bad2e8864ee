"""What the tests of all folders share: the tiny model, an environment, and what is made once for all workers."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_gpus
import light_install
import pytest
from tiny import Tiny, make_tiny

# Tests run beside each other: threads of one computation would wait for each other. Before anything imports torch.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `pytest -n`: the tests of tests/slurm in one worker, since they share clusters; others where one is free.

    Not by the mark xdist_group: xdist 3.8 puts it into the tests' node ids, which pytest 9.2 does not let it change.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if "tests/slurm/" in nodeid else nodeid

    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Seconds by module, as they add up over all workers, and what the emulated GPUs walked."""
    records = config._tmp_path_factory.getbasetemp() / fake_gpus.RECORDS  # type: ignore[attr-defined]
    if records.is_dir():
        terminalreporter.section("walked with emulated GPUs")
        for line in fake_gpus.summary(records):
            terminalreporter.write_line(line)
    seconds: Counter[str] = Counter()
    for report in itertools.chain(*terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.partition("::")[0]] += report.duration
    if len(seconds) > 1:
        terminalreporter.section("seconds by module")
        for folder in sorted({name.rpartition("/")[0] for name in seconds}):
            parts = {name: time for name, time in seconds.most_common() if name.rpartition("/")[0] == folder}
            shown = (f"{Path(name).stem.removeprefix('test_')} {time:.0f}" for name, time in parts.items() if time >= 1)
            terminalreporter.write_line(f"{sum(parts.values()):6.0f}  {folder}: {', '.join(shown)}")


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
    """Prepared data stays out of the user's cache."""
    os.environ["DISTFT_CACHE"] = str(shared / "cache")


@pytest.fixture(scope="session")
def tiny(once: Callable[..., Path]) -> Tiny:
    return Tiny(once("tiny", make_tiny))


@pytest.fixture(scope="session")
def light_site(once: Callable[..., Path]) -> Path:
    """A folder with distft and all that it needs, and nothing else."""
    return once("light", light_install.fill)
