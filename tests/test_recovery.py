"""Faults on a real four-node SLURM cluster: the run goes on by itself, and ends as the undisturbed one does."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, Tiny, launch
from slurm_cluster import Cluster
from test_slurm import Site, cluster, namespaces  # noqa: F401 (fixtures)

from distft.run_dir import RunDir

pytestmark = pytest.mark.slurm
SAVE_STEPS, STEPS = 20, 120
RECIPE = {"training__max_steps": STEPS, "checkpoint__save_steps": SAVE_STEPS, "training__learning_rate": 0.001}


@pytest.fixture
def site(cluster: Cluster, tiny: Tiny, tmp_path: Path) -> Iterator[Site]:  # noqa: F811
    found = Site(cluster, tmp_path, tiny, requeue=3)
    found.recipe(**RECIPE)
    yield found
    cluster.run("scancel", "-u", str(os.getuid()), check=False)
    cluster.wait_idle(90)


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return launch(tiny.recipe(**RECIPE), tmp_path_factory.mktemp("undisturbed"), ranks=2)


def started(site: Site, *arguments: str, nodes: int = 2, after: int = 30) -> RunDir:
    """A run that has made some steps."""
    run = RunDir(site.launch("--detach", *arguments, nodes=nodes).run_dir)
    until(lambda: run.last_metrics().get("step", 0) > after, 120, run)
    return run


def until(what: Callable[[], bool], seconds: float, run: RunDir) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-1500:] for path in sorted(run.logs.glob("*.log")))
            raise AssertionError(f"{run.read_status()}\n{logs}")
        time.sleep(0.3)


def ended(site: Site, run: RunDir, seconds: float = 400) -> dict[str, Any]:
    """The status at the end. SLURM keeps a job that goes on for two minutes in the queue: not here."""
    job, deadline = run.jobs()[-1], time.monotonic() + seconds
    while True:
        waiting = site.cluster.run("squeue", "-h", "-j", job, "-o", "%T %r", check=False).stdout
        if "BeginTime" in waiting:
            site.cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)
        status = site.status(run.path)
        if status["state"] not in ("queued", "running"):
            return status
        assert time.monotonic() < deadline, (status, [p.read_text()[-800:] for p in run.logs.glob("*.log")])
        time.sleep(2)


def assert_as_if_nothing_had_happened(run: RunDir, reference: Result, tolerance: float = 1e-5) -> None:
    import torch
    from safetensors.torch import load_file

    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    assert [line["loss"] for line in lines] == pytest.approx(reference.column("loss"), abs=tolerance)
    found, wanted = (load_file(p / "adapter_model.safetensors") for p in (run.final, reference.run_dir / "final"))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0)


def ranks_of(run: RunDir) -> list[int]:
    """Processes of the ranks, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            argv = (entry / "cmdline").read_bytes().split(b"\0")
            environment = dict(e.split(b"=", 1) for e in (entry / "environ").read_bytes().split(b"\0") if b"=" in e)
        except OSError:
            continue
        if b"distft.train" in argv and str(run.path).encode() in argv and b"RANK" in environment:
            found[int(environment[b"RANK"])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def attempts(run: RunDir) -> list[dict[str, Any]]:
    return run.read_status()["attempts"]


def repeated(run: RunDir) -> int:
    """The most steps that an attempt made again."""
    return max(a["step"] % SAVE_STEPS for a in attempts(run) if a["fault"])


def test_a_rank_is_killed(site: Site, undisturbed: Result) -> None:
    run = started(site)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    status = ended(site, run)
    assert status["state"] == "completed"
    [attempt] = attempts(run)
    assert (attempt["reason"], attempt["node"], attempt["fault"]) == ("rank 1 was killed by SIGKILL", "node2", True)
    assert len(set(run.jobs())) == 1  # on the same nodes, in the same job
    assert (run.logs / "attempt-1" / "torchrun-1.log").exists()
    assert_as_if_nothing_had_happened(run, undisturbed)


def test_the_time_limit_twice(site: Site, undisturbed: Result) -> None:
    """SLURM's warning, as --signal=B:USR1 sends it."""
    run = started(site)
    for n in (1, 2):
        step = run.last_metrics()["step"]
        site.cluster.run("scancel", "-b", "-s", "USR1", run.jobs()[-1])
        until(lambda n=n: len(run.read_status().get("attempts") or []) == n, 60, run)
        stopped = attempts(run)[-1]
        assert stopped["reason"].startswith("stopped: the time limit is near, or the job is preempted; step-")
        assert f"step-{stopped['step']} is saved" in stopped["reason"] and not stopped["fault"]  # nothing is repeated
        status = site.wait(run.path, lambda status: status["state"] == "queued")
        assert "goes on from step-" in status["reason"]
        site.wait(run.path, lambda status: "BeginTime" in (status["reason"] or ""))
        site.cluster.run("scontrol", "update", f"jobid={run.jobs()[-1]}", "StartTime=now")
        until(lambda step=step: run.last_metrics()["step"] > step + 10, 90, run)
    assert ended(site, run)["state"] == "completed"
    assert len(set(run.jobs())) == 1
    assert_as_if_nothing_had_happened(run, undisturbed)


def test_a_node_is_gone(namespaces: Cluster, site: Site, undisturbed: Result) -> None:  # noqa: F811
    run = started(site)
    namespaces.crash("node2")
    try:
        status = ended(site, run)
    finally:
        namespaces.boot("node2")
    assert status["state"] == "completed"
    assert attempts(run)[0]["fault"]
    assert attempts(run)[0]["node"] == "node2", attempts(run)
    assert_as_if_nothing_had_happened(run, undisturbed)


def test_preempted(site: Site, undisturbed: Result) -> None:
    """A job of a higher partition takes the nodes."""
    site.profile(requeue=3, slurm={"cpus_per_task": 2, "partition": "low", "sbatch": ["--exclusive"]})
    run = started(site)
    high = site.cluster.run(
        "sbatch",
        "--parsable",
        "--partition=high",
        "--nodes=4",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 5",
    )
    until(lambda: site.status(run.path)["state"] == "queued", 90, run)
    assert high.stdout.strip().isdigit()
    status = ended(site, run)
    assert status["state"] == "completed"
    assert attempts(run)[0]["reason"].startswith("stopped: ")
    assert_as_if_nothing_had_happened(run, undisturbed)


def test_the_same_step_again_and_again(site: Site) -> None:
    """A bug is no fault: after the third time at the same step it stops and says so."""
    site.profile(requeue=10, env={"PYTHONPATH": str(site.folder)})
    (site.folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def dies(frame, event, argument):\n"
        "    if frame.f_code.co_name == 'get_batch_samples' and frame.f_locals['self'].state.global_step == 7:\n"
        "        os.kill(os.getpid(), 9)\n"
        "if os.environ.get('RANK') == '1':\n"
        "    sys.setprofile(dies)\n"
    )
    run = RunDir(site.launch("--detach", nodes=2).run_dir)
    status = ended(site, run)
    assert status["state"] == "failed"
    assert status["reason"].startswith("failed 3 times at the same step, which is no fault of a machine's: rank 1 was")
    assert [attempt["step"] for attempt in attempts(run)] == [7, 7, 7]
    assert [attempt["node"] for attempt in attempts(run)] == ["node2", "node2", "node4"]  # left out after the second
    assert "3 times at the same step" in site.run("logs", str(run.path), "--failed").stdout


def test_without_a_budget_it_is_preempted_and_resumed_by_hand(site: Site, undisturbed: Result) -> None:
    site.profile(requeue=0)
    run = started(site)
    site.cluster.run("scancel", "-b", "-s", "USR1", run.jobs()[-1])
    status = ended(site, run)
    assert status["state"] == "preempted" and "is saved" in status["reason"]
    done = site.run("resume", str(run.path), "--nodes", "3", "--gpus-per-node", "1", expect=2)
    assert "training.global_batch_size" in done.stderr  # 8 sequences do not divide among 3 ranks
    site.run("resume", str(run.path), "--nodes", "4", "--set", "parallelism.strategy=fsdp", "--json")
    assert run.read_status()["state"] == "completed"
    assert run.read_status()["ran"]["mesh"] == [4]
    assert_as_if_nothing_had_happened(run, undisturbed, 1e-3)  # sums in another order
