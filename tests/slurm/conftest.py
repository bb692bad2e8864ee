"""The cluster that the tests in this folder share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import Cluster


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """In CI a test of SLURM that is skipped has failed: the cluster must be there."""
    report = (yield).get_result()
    if report.skipped and item.get_closest_marker("slurm") and os.environ.get("DISTFT_REQUIRE_SLURM"):
        report.outcome = "failed"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that is easily filled, on all nodes; a plain folder where nothing can be mounted."""
    folder = tmp_path_factory.mktemp("small")
    mounted = slurm_cluster.namespaces_work()
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Iterator[Cluster]:  # mounted before nodes start
    if why := slurm_cluster.missing():
        pytest.skip(why)
    with Cluster(tmp_path_factory.mktemp("slurm"), mode=os.environ.get("DISTFT_SLURM_MODE")) as started:
        yield started


@pytest.fixture
def namespaces(cluster: Cluster) -> Cluster:
    if cluster.mode != "namespaces":
        pytest.skip("nodes have no mounts and names of their own here: root and namespaces are needed")
    return cluster
