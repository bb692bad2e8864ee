"""doctor on a login node and on the nodes of a real cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from light_install import light
from slurm_cluster import Cluster
from slurm_site import CLUSTER, Site

pytestmark = pytest.mark.slurm


def test_the_login_node(cluster: Cluster, light_site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.env()[name])
    monkeypatch.setenv("DISTFT_CLUSTER", str(tmp_path / "site.yaml"))  # no reason to start a job
    (tmp_path / "site.yaml").write_text(f"runs_dir: {tmp_path}/runs\nnode: {{gpus_per_node: 0}}\n")
    checks = json.loads(light(light_site, "doctor", "--json", cwd=tmp_path).stdout)["checks"]
    found = next(check for check in checks if check["name"] == "slurm")
    assert found["state"] == "ok", found
    assert found["text"].startswith("slurm") and "partitions debug, " in found["text"]
    assert not (tmp_path / "runs").exists()


def test_the_nodes_of_a_cluster(site: Site) -> None:
    done = site.run("doctor", *CLUSTER, "--nodes", "3")
    assert "ok: 3 nodes passed (python 3" in done.stdout
    assert "ok: all-reduce between neighbours: " in done.stdout
    assert done.stdout.endswith("everything works\n")
    status = site.status(site.runs / "doctor")
    assert status["state"] == "completed"
    script = (site.runs / "doctor" / "job.sbatch").read_text()
    assert "distft.diagnostics.preflight" in script
    assert "torch.distributed.run" not in script


def test_a_bad_node_is_named(namespaces: Cluster, site: Site) -> None:
    site.runs.mkdir()
    site.profile(max_requeues=1)
    namespaces.mount_over("node2", site.runs)
    try:
        done = site.run("doctor", *CLUSTER, "--nodes", "3", "--json", expect=1)
    finally:
        namespaces.unmount("node2", site.runs)
    answer = json.loads(done.stdout)
    assert answer["ok"] is False
    bad = [check for check in answer["checks"] if check["state"] == "failed"]
    assert [check["name"] for check in bad] == ["node2"]
    assert "is its file system mounted?" in bad[0]["text"]
    assert any(check["text"].startswith("2 nodes passed ") for check in answer["checks"])
    assert len({*(site.runs / "doctor" / "logs" / "jobs").read_text().split()}) == 1  # not submitted again


def test_a_job_that_ends_without_a_word(site: Site) -> None:
    site.profile(setup=["echo the module is not there; exit 7"], python=sys.executable)
    done = site.run("doctor", *CLUSTER, "--json", expect=1)
    assert [check["name"] for check in json.loads(done.stdout)["checks"]] == ["job"]
    done = site.run("doctor", *CLUSTER, "--partition", "nowhere", expect=2)
    assert "set slurm.partition, or --partition" in done.stderr
    assert not (site.runs / "doctor-2").exists()


def test_inside_an_allocation(site: Site) -> None:
    command = [sys.executable, "-m", "distft", "doctor", "--nodes", "2"]
    done = site.cluster.run("salloc", "-N2", "--cpus-per-task=2", *command, cwd=site.folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok: 2 nodes passed " in done.stdout
