"""The cluster that the tests in this folder share, and work that goes on beside them."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
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
    """A function of a folder and the tiny model, in a thread: it mostly waits, for jobs on a cluster (folder/slurm)."""

    def __init__(self, mark: pytest.Mark, folder: Path, tiny: Tiny, lanes: threading.Semaphore):
        function, *arguments = mark.args
        super().__init__(daemon=True, name=function.__name__)
        self.folder, self.lanes, self.wanted = folder, lanes, True
        self.call = functools.partial(function, folder, tiny, *arguments)
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        with self.lanes:
            try:
                self.result = self.call() if self.wanted else None
            except BaseException as error:  # pytest.skip's too: it is for the test
                self.error = error

    def give_up(self) -> None:
        """End it, by taking its cluster away: it fails, and tidies up."""
        self.wanted = False
        if self.is_alive():
            Cluster(self.folder / "slurm", mode="loopback").stop()
            self.join(60)


@pytest.fixture(scope="session", autouse=True)
def _beside(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Tiny
) -> Iterator[dict[Any, Work]]:
    """Start what `@pytest.mark.beside.with_args(function, ...)` names, once for all tests with the same mark."""
    lanes, found = threading.Semaphore(LANES), {}
    for item in request.session.items:
        mark = item.get_closest_marker("beside")
        if mark and mark.args not in found and not slurm_cluster.missing():
            found[mark.args] = Work(mark, tmp_path_factory.mktemp("beside"), tiny, lanes)
            found[mark.args].start()
    yield found
    for work in found.values():
        work.give_up()


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
