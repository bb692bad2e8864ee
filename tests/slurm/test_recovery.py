"""Faults on a real four-node SLURM cluster: the run goes on by itself, and ends as the undisturbed one does."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import faults
import pytest
from faults import Fault
from running import Result, inject, launch
from slurm_cluster import Cluster
from test_slurm import Site
from tiny import Tiny

from distft.runs import checkpoints
from distft.runs.directory import RunDir
from distft.runs.metrics import last_metrics
from distft.runs.status import Attempt, Cause, State, job_ids, read_status

pytestmark = pytest.mark.slurm
SAVE_STEPS, STEPS = 10, 800
RECIPE = {
    "training__max_steps": STEPS,
    "training__lr_scheduler_type": "constant",  # so that a shorter run makes the same steps
    "training__warmup_ratio": 0,
    "training__learning_rate": 0.001,
    "checkpoint__save_steps": SAVE_STEPS,
}


@pytest.fixture
def site(namespaces: Cluster, small: Path, tiny: Tiny, tmp_path: Path) -> Iterator[Site]:
    yield faults.site_for(namespaces, tmp_path, small / tmp_path.name, tiny, **RECIPE)
    namespaces.run("scancel", "-u", str(os.getuid()), check=False)
    namespaces.wait_idle(90)


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return launch(tiny.recipe(**RECIPE), tmp_path_factory.mktemp("undisturbed"), ranks=2)


def assert_same_losses(run: RunDir, reference: Result, steps: int = STEPS, tolerance: float = 1e-5) -> None:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, steps + 1)]
    assert [line["loss"] for line in lines] == pytest.approx(reference.column("loss")[:steps], abs=tolerance)


def assert_same_adapter(run: RunDir, reference: Result) -> None:
    import torch
    from safetensors.torch import load_file

    found, wanted = (load_file(p / "adapter_model.safetensors") for p in (run.final, reference.run_dir / "final"))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)


def attempts(run: RunDir) -> list[Attempt]:
    return list(read_status(run).attempts)


@pytest.mark.parametrize("happening", [faults.OF_A_RANK, faults.OF_A_NODE], ids=["ranks", "nodes"])
def test_one_run_survives_them_all(
    site: Site, undisturbed: Result, happening: Sequence[Fault], record_property: Callable[[str, float], None]
) -> None:
    """benchmarks/recovery.py prints the seconds without a training step that are recorded here."""
    run = faults.start(site)
    jobs = job_ids(run)
    for fault in happening:
        before, nodes, at = attempts(run), faults.nodes_of(site, run), time.time()
        undo = fault.happen(site, run)
        happened = time.time()
        try:
            if fault.reason is None:
                faults.trains_on(site, run, time.time())
                record_property(fault.name, faults.longest_pause(run, at))
                assert attempts(run) == before, fault.name
                continue
            faults.begins_again(site, run, len(before))
            again = faults.trains_on(site, run, attempts(run)[-1].time)
        finally:
            if undo:
                undo()
        record_property(fault.name, again["time"] - happened)
        [attempt] = attempts(run)[len(before) :]
        assert re.match(fault.reason, attempt.reason), (fault.name, attempt)
        assert attempt.node == (nodes[1] if fault.blamed else None), (fault.name, attempt)
        assert (attempt.cause is Cause.FAULT) == fault.blamed
        assert attempt.time > at
        # What stops the run by asking has it save first; of the others at most the steps since the last save.
        assert 0 <= attempt.step + 1 - again["step"] <= fault.lost_saves * SAVE_STEPS, fault.name
    faults.hasten(site)
    status = faults.ended(site, run)
    assert status["state"] == "completed"
    assert set(job_ids(run)) == set(jobs)  # requeued under its id
    assert_same_losses(run, undisturbed)
    assert_same_adapter(run, undisturbed)
    shown = site.run("status", str(run.path)).stdout
    explained = site.run("logs", str(run.path), "--failed").stdout
    for attempt in attempts(run):
        said = f"after step {attempt.step}" + (f" on {attempt.node}" if attempt.node else "")
        assert f"{said}: {attempt.reason}" in shown
        assert f"{said}: {attempt.reason}" in explained


def test_the_same_step_again_and_again(site: Site) -> None:
    """A bug is no fault: after the third time at the same step it stops and says so."""
    dies = "if os.environ['RANK'] == '1' and args[0].state.global_step == 7: os.kill(os.getpid(), 9)"
    site.profile(max_requeues=10, env=inject(site.folder, "transformers.trainer:Trainer.training_step", dies))
    run = RunDir(site.launch("--detach", nodes=2).run_dir)
    status = faults.ended(site, run)
    assert status["state"] == "failed"
    assert status["reason"].startswith("failed 3 times at the same step: likely a bug, not hardware (rank 1 was")
    assert [attempt.step for attempt in attempts(run)] == [7, 7, 7]
    assert [attempt.node for attempt in attempts(run)] == ["node2", "node2", "node4"]  # left out after the second
    assert "3 times at the same step" in site.run("logs", str(run.path), "--failed").stdout


def test_scancel(site: Site) -> None:
    """It saves, ends, and does not come back by itself."""
    run = faults.start(site)
    site.cluster.run("scancel", job_ids(run)[-1])
    status = faults.ended(site, run)
    assert status["state"] == "cancelled", status
    saved = checkpoints.complete(run)[0].step
    assert saved == last_metrics(run)["step"]
    faults.hasten(site)
    site.run("resume", str(run.path), "--set", f"training.max_steps={saved + 10}", "--force", "--json")
    assert last_metrics(run)["step"] == saved + 10


def test_without_a_budget_it_is_preempted_and_resumed_by_hand(site: Site, undisturbed: Result) -> None:
    faults.profile(site, max_requeues=0)
    run = faults.start(site, "--set", "training.max_steps=150")
    site.cluster.run("scancel", "-b", "-s", "USR1", job_ids(run)[-1])
    status = faults.ended(site, run)
    assert status["state"] == "preempted" and "is saved" in status["reason"]
    done = site.run("resume", str(run.path), "--nodes", "3", "--gpus-per-node", "1", expect=2)
    assert "training.global_batch_size" in done.stderr  # 8 sequences do not divide among 3 ranks
    site.run("resume", str(run.path), "--nodes", "4", "--set", "parallelism.strategy=fsdp", "--json")
    assert read_status(run).state is State.COMPLETED
    assert read_status(run).ran["mesh"] == [4]
    assert_same_losses(run, undisturbed, 150, tolerance=1e-3)  # sums in another order


def test_a_site_that_does_not_requeue(site: Site) -> None:
    run = faults.start(site)
    site.cluster.run("scontrol", "update", f"jobid={job_ids(run)[-1]}", "Requeue=0")
    site.cluster.run("scancel", "-b", "-s", "USR1", job_ids(run)[-1])
    status = faults.ended(site, run)
    assert status["state"] == "preempted"
    assert re.match("stopped: the time limit is near, .* is saved; SLURM does not requeue it$", status["reason"])


APPTAINER = """#!/bin/bash
# `apptainer exec [--bind A:B]... IMAGE COMMAND...` without the image: processes of its own, as in a container.
shift
while [ "$1" = --bind ]; do shift 2; done
shift
export PATH={bin}:$PATH
exec unshare --pid --fork --kill-child --mount-proc "$@"
"""


def test_an_element_of_an_array_in_a_container(site: Site, undisturbed: Result) -> None:
    """The warning reaches the batch shell, which is outside of the container: the ranks inside save all the same."""
    commands = site.folder / "bin"
    commands.mkdir()
    (commands / "apptainer").write_text(APPTAINER.format(bin=Path(sys.executable).parent))
    (commands / "apptainer").chmod(0o755)
    container = {"runtime": "apptainer", "image": "image.sif"}
    faults.profile(site, max_requeues=1, container=container, setup=[f"export PATH={commands}:$PATH"])
    sweep = ["--sweep", "training.learning_rate=0.001,0.002", "--set", "training.max_steps=150"]
    options = ["--cluster", "site.yaml", "--nodes", "2", "--detach", "--json"]
    answer = json.loads(site.run("launch", "recipe.yaml", *sweep, *options).stdout)
    first, second = (RunDir(Path(run["run_dir"])) for run in answer["runs"])
    faults.trains_on(site, first)
    site.cluster.run("scancel", "-b", "-s", "USR1", job_ids(first)[-1])
    assert [faults.ended(site, run)["state"] for run in (first, second)] == ["completed", "completed"]
    [attempt] = attempts(first)
    assert re.match("stopped: the time limit is near, .* is saved", attempt.reason)
    assert attempts(second) == []
    assert len(set(job_ids(first))) == 1
    assert_same_losses(first, undisturbed, 150)
    assert "continues after step" in first.rank_log(0).read_text()
