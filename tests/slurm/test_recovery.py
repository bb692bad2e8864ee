"""Faults on a real four-node SLURM cluster: the run continues by itself, and ends as the undisturbed one does."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import faults
import pytest
from faults import SAVE_STEPS, Fault
from running import launch
from slurm_site import CLUSTER, LONG, Site
from tiny import Tiny

from distft.runs import checkpoints
from distft.runs.directory import RunDir
from distft.runs.metrics import last_metrics
from distft.runs.status import Attempt, Cause, State, Status, job_ids, read_status

pytestmark = pytest.mark.slurm
STEPS = 160
RECIPE = {
    "training__max_steps": STEPS,
    "training__lr_scheduler_type": "constant",  # so that a shorter run makes the same steps
    "training__warmup_ratio": 0,
    "training__learning_rate": 0.001,
    "checkpoint__save_steps": SAVE_STEPS,
    "checkpoint__save_total_limit": 5,
}


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return RunDir(launch(tiny.recipe(**RECIPE), tmp_path_factory.mktemp("undisturbed"), ranks=2).run_dir)


def losses(run: RunDir) -> list[float]:
    """By step, of which none is missing or there twice."""
    lines = faults.steps_of(run)
    assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)]
    return [line["loss"] for line in lines]


def attempts(run: RunDir) -> list[Attempt]:
    return list(read_status(run).attempts)


# ---- real training, and faults of every kind


@dataclass
class Survivor:
    """A run that came through faults, and then ended: completed, or cancelled and resumed by hand.

    `seconds`: without a training step, by fault. `trained`: steps until the end. `status`, `shown`, `explained`: what
    status.json, `distft status` and `distft logs --failed` said then.
    """

    run: RunDir
    seconds: dict[str, float]
    trained: int
    status: Status
    shown: str
    explained: str


def survive(folder: Path, tiny: Tiny, happening: Sequence[Fault]) -> Survivor:
    """Let faults happen to a run, one after the other, and end it."""
    with faults.cluster_for(folder, tiny, **RECIPE) as site:
        run = faults.start(site)
        jobs = job_ids(run)
        seconds = {fault.name: seconds_until_it_trains(site, run, fault) for fault in happening}
        assert set(job_ids(run)) == set(jobs)  # requeued under its id
        if happening is faults.OF_A_RANK:
            site.cluster.run("scancel", job_ids(run)[-1])
        else:
            faults.pace(site, 0)
        site.ended(run.path)
        trained, status = last_metrics(run)["step"], read_status(run)
        shown = site.run("status", str(run.path)).stdout
        explained = site.run("logs", str(run.path), "--failed").stdout
        if status.state is State.CANCELLED:
            assert checkpoints.complete(run)[0].step == trained  # it saved when it was told to end
            faults.pace(site, 0)
            more = ["--set", f"training.max_steps={trained + 10}", "--force"]
            site.run("resume", str(run.path), "--nodes", "4", "--set", "parallelism.strategy=fsdp", *more, "--json")
        shutil.copytree(run.path, folder / "ended")
        return Survivor(RunDir(folder / "ended"), seconds, trained, status, shown, explained)


def seconds_until_it_trains(site: Site, run: RunDir, fault: Fault) -> float:
    """Let a fault happen; returns how long no step was made."""
    before, nodes, at = attempts(run), faults.nodes_of(site, run), time.time()
    undo = fault.happen(site, run)
    happened = time.time()
    try:
        if fault.reason is None:
            faults.trains_on(site, run, time.time())
            assert attempts(run) == before, fault.name
            return faults.longest_pause(run, at)
        faults.continues(site, run, len(before))
        again = faults.trains_on(site, run, attempts(run)[-1].time)
    finally:
        if undo:
            undo()
    [attempt] = attempts(run)[len(before) :]
    assert re.match(fault.reason, attempt.reason), (fault.name, attempt)
    assert attempt.node == (nodes[1] if fault.blamed else None), (fault.name, attempt)
    assert (attempt.cause is Cause.FAULT) == fault.blamed
    assert attempt.time > at
    # What stops the run by asking has it save first; of the others at most the steps since the last save.
    assert 0 <= attempt.step + 1 - again["step"] <= fault.lost_saves * SAVE_STEPS, fault.name
    return again["time"] - happened


of_ranks = pytest.mark.beside.with_args(survive, faults.OF_A_RANK)
of_nodes = pytest.mark.beside.with_args(survive, faults.OF_A_NODE)


@pytest.mark.parametrize(
    "happening",
    [
        pytest.param(faults.OF_A_RANK, marks=of_ranks, id="ranks"),
        pytest.param(faults.OF_A_NODE, marks=of_nodes, id="nodes"),
    ],
)
def test_one_run_survives_them_all(
    outcome: Survivor,
    happening: Sequence[Fault],
    undisturbed: RunDir,
    record_property: Callable[[str, float], None],
) -> None:
    """benchmarks/recovery.py prints the seconds that are recorded here."""
    for name, seconds in outcome.seconds.items():
        record_property(name, seconds)
    assert [*outcome.seconds] == [fault.name for fault in happening]
    assert losses(outcome.run)[: outcome.trained] == pytest.approx(losses(undisturbed)[: outcome.trained], abs=1e-5)
    ended = [fault for fault in happening if fault.reason]
    assert len(outcome.status.attempts) == len(ended)
    for attempt in outcome.status.attempts:
        said = f"after step {attempt.step}" + (f" on {attempt.node}" if attempt.node else "")
        assert f"{said}: {attempt.reason}" in outcome.shown
        assert f"{said}: {attempt.reason}" in outcome.explained


@of_nodes
def test_it_ends_with_the_adapter_of_an_undisturbed_run(outcome: Survivor, undisturbed: RunDir) -> None:
    import torch
    from safetensors.torch import load_file

    assert (outcome.status.state, outcome.trained) == (State.COMPLETED, STEPS)
    folders = (outcome.run.final, undisturbed.final)
    found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)


@of_ranks
def test_cancelled_it_stays_away_and_is_resumed_by_hand(outcome: Survivor, undisturbed: RunDir) -> None:
    """On more nodes, with another strategy."""
    assert outcome.status.state is State.CANCELLED
    assert read_status(outcome.run).state is State.COMPLETED
    assert read_status(outcome.run).ran["mesh"] == [4]
    steps = outcome.trained + 10
    assert losses(outcome.run) == pytest.approx(losses(undisturbed)[:steps], abs=1e-3)  # sums in another order


# ---- the job, with a stub of the training


def test_the_same_step_again_and_again(site: Site) -> None:
    """A bug is no fault: after the third time at the same step it stops and says so."""
    site.profile(max_requeues=10, env={"STUB_DIES": "1 8"})
    run = RunDir(site.launch("--detach", "--set", "training.max_steps=10").run_dir)
    status = site.ended(run.path)
    assert status["state"] == "failed"
    assert status["reason"].startswith("failed 3 times at the same step: likely a bug, not hardware (rank 1 was")
    assert [attempt.step for attempt in attempts(run)] == [7, 7, 7]
    assert [attempt.node for attempt in attempts(run)] == ["node2", "node2", "node4"]  # left out after the second
    assert "3 times at the same step" in site.run("logs", str(run.path), "--failed").stdout


def test_without_a_budget_it_is_preempted_and_resumed_by_hand(site: Site) -> None:
    faults.profile(site, max_requeues=0)
    site.recipe(**LONG)
    run = RunDir(site.launch("--detach").run_dir)
    site.trains(run.path)
    site.cluster.run("scancel", "-b", "-s", "USR1", job_ids(run)[-1])
    status = site.ended(run.path)
    assert status["state"] == "preempted" and "is saved" in status["reason"]
    done = site.run("resume", str(run.path), "--nodes", "3", "--gpus-per-node", "1", expect=2)
    assert "training.global_batch_size" in done.stderr  # 8 sequences do not divide among 3 ranks
    steps = last_metrics(run)["step"]
    site.run("resume", str(run.path), "--nodes", "1", "--set", f"training.max_steps={steps + 10}", "--force", "--json")
    assert read_status(run).state is State.COMPLETED
    assert [line["step"] for line in faults.steps_of(run)] == [*range(1, steps + 11)]


def test_a_site_that_does_not_requeue(site: Site) -> None:
    faults.profile(site)
    site.recipe(**LONG)
    run = RunDir(site.launch("--detach").run_dir)
    site.trains(run.path)
    site.cluster.run("scontrol", "update", f"jobid={job_ids(run)[-1]}", "Requeue=0")
    site.cluster.run("scancel", "-b", "-s", "USR1", job_ids(run)[-1])
    status = site.ended(run.path)
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


def test_an_element_of_an_array_in_a_container(site: Site) -> None:
    """The warning reaches the batch shell, which is outside of the container: the ranks inside save all the same."""
    commands = site.folder / "bin"
    commands.mkdir()
    (commands / "apptainer").write_text(APPTAINER.format(bin=Path(sys.executable).parent))
    (commands / "apptainer").chmod(0o755)
    container = {"runtime": "apptainer", "image": "image.sif"}
    setup = [f"export PATH={commands}:$PATH"]
    faults.profile(site, max_requeues=1, env={"STUB_STEP_SECONDS": "0.1"}, container=container, setup=setup)
    sweep = ["--sweep", "training.learning_rate=0.001,0.002", "--set", "training.max_steps=100"]
    options = [*CLUSTER, "--nodes", "2", "--detach", "--json"]
    site.share_data()
    answer = json.loads(site.run("launch", "recipe.yaml", *sweep, *options).stdout)
    first, second = (RunDir(Path(run["run_dir"])) for run in answer["runs"])
    site.trains(first.path)
    site.cluster.run("scancel", "-b", "-s", "USR1", job_ids(first)[-1])
    assert [site.ended(run.path)["state"] for run in (first, second)] == ["completed", "completed"]
    [attempt] = attempts(first)
    assert re.match("stopped: the time limit is near, .* is saved", attempt.reason)
    assert attempts(second) == []
    assert len(set(job_ids(first))) == 1
    for run in (first, second):
        assert [line["step"] for line in faults.steps_of(run)] == [*range(1, 101)]
    assert f"continues after step {attempt.step}" in first.rank_log(0).read_text()
