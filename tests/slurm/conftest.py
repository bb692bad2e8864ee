"""The cluster that the tests in this folder share, and work that goes on beside them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from slurm_cluster import Cluster
from slurm_site import Site
from tiny import Tiny

HERE = Path(__file__).parent
LANES = 3  # pieces of work that go on at once, beside the tests: each has ranks, of half a gigabyte
PATIENCE = 1200


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """In CI a test of SLURM that is skipped has failed: the cluster must be there."""
    report = (yield).get_result()
    if report.skipped and item.get_closest_marker("slurm") and os.environ.get("DISTFT_REQUIRE_SLURM"):
        report.outcome = "failed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among the tests of this folder, those of work that goes on beside the others come last: by then it is done."""
    places = [place for place, item in enumerate(items) if item.path.is_relative_to(HERE)]
    own = sorted((items[place] for place in places), key=lambda item: item.get_closest_marker("beside") is not None)
    for place, item in zip(places, own, strict=True):
        items[place] = item


class Work(threading.Thread):
    """A function of a folder and the tiny model, in a thread: it mostly waits, for jobs on a cluster of its own."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], lanes: threading.Semaphore):
        super().__init__(daemon=True, name=function.__name__)  # daemon: who interrupts the tests need not wait for it
        self.function, self.arguments, self.lanes = function, arguments, lanes
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        with self.lanes:
            try:
                self.result = self.function(*self.arguments)
            except BaseException as error:  # pytest.skip's too: it is the test's
                self.error = error


@pytest.fixture(scope="session", autouse=True)
def _beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> list[Work]:
    """Start what `@pytest.mark.beside(FUNCTION, ARGUMENTS...)` names, once for all tests with the same mark."""
    lanes, found = threading.Semaphore(LANES), {}
    for item in request.session.items:
        mark = item.get_closest_marker("beside")
        if mark and mark.args not in found and not slurm_cluster.missing():
            folder = tmp_path_factory.mktemp("beside")
            found[mark.args] = Work(mark.args[0], (folder, tiny, *mark.args[1:]), lanes)
            found[mark.args].start()
            time.sleep(0.01)
    return found


@pytest.fixture
def outcome(request: pytest.FixtureRequest, _beside: dict[Any, Work]) -> Any:
    """What the function of the test's mark returned; or raised."""
    if why := slurm_cluster.missing():
        pytest.skip(why)
    work = _beside[request.node.get_closest_marker("beside").args]
    work.join(PATIENCE)
    assert not work.is_alive(), f"{work.name}: not done in {PATIENCE} s"
    if work.error:
        raise work.error
    return work.result


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := slurm_cluster.missing():
        pytest.skip(why)
    with Cluster(tmp_path_factory.mktemp("slurm"), mode=os.environ.get("DISTFT_SLURM_MODE")) as started:
        yield started


@pytest.fixture
def namespaces(cluster: Cluster) -> Cluster:
    if cluster.mode != "namespaces":
        pytest.skip("nodes have no mounts and names of their own here: root and namespaces are needed")
    return cluster


@pytest.fixture
def site(cluster: Cluster, tiny: Tiny, tmp_path: Path) -> Iterator[Site]:
    """Its jobs run the stub of the training loop."""
    yield Site(cluster, tmp_path, tiny, stub=True)
    if cluster.run("squeue", "-h", "-o", "%i").stdout:
        cluster.run("scancel", "-u", str(os.getuid()), check=False)
        cluster.wait_idle(90)
