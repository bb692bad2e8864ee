"""What follows an attempt that ended, branch by branch, and how the job script asks for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from distft.config.cluster import load_cluster
from distft.hardware.topology import Topology
from distft.jobs.job import SlurmJob
from distft.runs.directory import RECIPE, RunDir
from distft.runs.status import Attempt, Cause, State, Status, read_status, update_status
from distft.schedulers import slurm
from distft.schedulers.attempts import Decision, Next, Step, decide

NODES = ("node1", "node2")


def attempt(cause: Cause, step: int = 7, node: str | None = None, bad_nodes: tuple[str, ...] = ()) -> Attempt:
    return Attempt(1.0, step, f"it was {cause}", cause, node, bad_nodes, "attempt-1")


def decided(
    ended: Attempt | None,
    earlier: Sequence[Attempt] = (),
    step: Step = Step.TRAIN,
    budget: int = 5,
    saved: int | None = 4,
    **status: Any,
) -> Decision:
    return decide(Status(attempts=tuple(earlier), **status), ended, step, budget, NODES, saved)


def test_nothing_went_wrong() -> None:
    assert decided(None) == Decision(Next.DONE, State.COMPLETED)
    assert decided(None, step=Step.BEGIN, state=State.QUEUED) == Decision(Next.AGAIN, State.RUNNING)
    assert decided(None, step=Step.BEGIN, state=State.COMPLETED) == Decision(Next.DONE, State.COMPLETED)


def test_a_fault_is_tried_again_on_the_same_nodes() -> None:
    reason = "it was fault; continues after step 4"
    assert decided(attempt(Cause.FAULT, node="node2")) == Decision(Next.AGAIN, State.RUNNING, reason)
    assert decided(attempt(Cause.FAULT), saved=None).reason == "it was fault; restarts from the beginning"


def test_a_node_that_failed_twice_is_left_out() -> None:
    earlier = [attempt(Cause.FAULT, 3, "node2")]
    found = decided(attempt(Cause.FAULT, node="node2"), earlier)
    assert found == Decision(
        Next.REQUEUE, State.QUEUED, "it was fault; continues after step 4, without node2", ("node2",)
    )
    # Not where the job has it no longer.
    gone = [attempt(Cause.FAULT, 1, "node9"), attempt(Cause.FAULT, 2, "node9")]
    assert decided(attempt(Cause.FAULT, node="node2"), gone).next is Next.AGAIN


def test_what_slurm_takes_comes_back_from_the_queue() -> None:
    reason = "it was stopped; continues after step 4"
    assert decided(attempt(Cause.STOPPED)) == Decision(Next.REQUEUE, State.QUEUED, reason)
    # SLURM has put it into the queue and started it again already.
    assert decided(attempt(Cause.STOPPED), step=Step.BEGIN) == Decision(Next.AGAIN, State.RUNNING, reason)


def test_bad_nodes_are_left_out_at_once_and_count() -> None:
    bad = attempt(Cause.BAD_NODES, 0, bad_nodes=("node3", "node2"))
    found = decided(bad, step=Step.PREFLIGHT, saved=None)
    reason = "it was bad_nodes; restarts from the beginning, without node2, node3"
    assert found == Decision(Next.REQUEUE, State.QUEUED, reason, ("node2", "node3"))
    # SLURM hands one of them out again.
    assert decided(bad, step=Step.BEGIN).next is Next.REQUEUE
    # Three times in a row is no bug of the training.
    assert decided(bad, [bad, bad], step=Step.PREFLIGHT).next is Next.REQUEUE
    found = decided(bad, [bad, bad], step=Step.PREFLIGHT, budget=2)
    assert found == Decision(Next.FAIL, State.FAILED, "it was bad_nodes; max_requeues is used up (2)")


def test_out_of_memory_is_tried_again_with_less() -> None:
    found = decided(attempt(Cause.OUT_OF_MEMORY))
    assert found == Decision(
        Next.AGAIN, State.RUNNING, "it was out_of_memory; continues after step 4", less_memory=True
    )


def test_the_same_step_again_and_again_is_a_bug() -> None:
    faults = [attempt(Cause.FAULT), attempt(Cause.FAULT)]
    found = decided(attempt(Cause.FAULT), faults)
    why = "failed 3 times at the same step: likely a bug, not hardware (it was fault)"
    assert found == Decision(Next.FAIL, State.FAILED, why)
    assert decided(attempt(Cause.FAULT, step=8), faults).next is Next.AGAIN
    assert decided(attempt(Cause.STOPPED), faults).next is Next.REQUEUE
    assert decided(attempt(Cause.FAULT), faults, step=Step.BEGIN).next is Next.AGAIN  # nodes that were lost


def test_an_error_of_the_user_ends_it() -> None:
    assert decided(attempt(Cause.ERROR)) == Decision(Next.FAIL, State.FAILED, "it was error")


@pytest.mark.parametrize(
    ("cause", "job_id", "state"),
    [
        (Cause.FAULT, "7", State.FAILED),
        (Cause.OUT_OF_MEMORY, "7", State.FAILED),
        (Cause.STOPPED, "7", State.PREEMPTED),
        (Cause.STOPPED, "local:1:2", State.STOPPED),
    ],
)
def test_the_last_attempt(cause: Cause, job_id: str, state: State) -> None:
    assert decided(attempt(cause), budget=0, job_id=job_id) == Decision(Next.FAIL, state, f"it was {cause}")
    used_up = f"it was {cause}; max_requeues is used up (1)"
    earlier = [attempt(Cause.STOPPED)]  # whatever ended the others
    assert decided(attempt(cause), earlier, budget=1, job_id=job_id) == Decision(Next.FAIL, state, used_up)


# ---- the job script


STAND_INS = {
    # Runs the command here. Options come first, and all of them have their value in the same word.
    "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n',
    "scontrol": """#!/bin/bash
echo "$*" >> "$RECORD"
[ "$2" != hostnames ] || printf "%s\\n" $NODES
[ "$*" != "$REFUSED" ]
""",
    "sinfo": '#!/bin/bash\necho "$DOWN"\n',
    "getent": "#!/bin/bash\n",
    "sleep": "#!/bin/bash\n",
    "python": """#!/bin/bash
case $2 in
  distft.diagnostics.preflight) cp "$REPORT" "$3/logs/preflight.json"; grep -q '"bad": {}' "$REPORT" ;;
  distft.train.data) ;;
  torch.distributed.run) cd "$RUN" && eval "$TRAINS" ;;
  *) exec %s "$@" ;;
esac
""",
}


COMPLETES = "sed -i 's/running/completed/; s/queued/completed/' status.json"
IS_TOLD_TO_STOP = "echo 'the time limit is near' > logs/stop; exit 1"


def fails(**changes: Any) -> str:
    """A training of which rank 1 fails, on node2."""
    error = {"rank": 1, "host": "node2", "time": 1.0, "type": "ValueError", "message": "no", "user_error": False}
    return f"echo '{json.dumps({**error, 'traceback': '', **changes})}' > logs/rank-1.error.json; exit 1"


class Script:
    """A rendered job script, run with stand-ins for SLURM, the preflight and the training."""

    def __init__(self, folder: Path, max_requeues: int):
        profile = {"runs_dir": str(folder), "node": {"gpus_per_node": 0}, "python": "python"}
        (folder / "site.yaml").write_text(yaml.safe_dump({**profile, "max_requeues": max_requeues}))
        self.folder, self.record = folder, folder / "record"
        self.run_dir = RunDir.create(str(folder), "run")
        self.run_dir.recipe.touch()
        argv = ("python", "-m", "torch.distributed.run")
        cluster = load_cluster(str(folder / "site.yaml"))
        job = SlurmJob("run", self.run_dir, Topology(2, 1), argv, {}, {RECIPE: ""}, cluster)
        self.path = folder / "job.sbatch"
        self.path.write_text(slurm.render(job))
        (folder / "bin").mkdir()
        for name, text in {**STAND_INS, "python": STAND_INS["python"] % sys.executable}.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        update_status(self.run_dir, state=State.QUEUED)

    def start(
        self,
        restarts: int,
        nodes: Sequence[str] = NODES,
        bad: Sequence[str] = (),
        down: str = "",
        trains: str = COMPLETES,
        refused: str = "",
    ) -> int:
        """Once, as SLURM does after so many restarts. Returns the script's exit status.

        Args:
            bad: what the preflight finds among `nodes`.
            down: nodes that SLURM counts as failed.
            trains: bash that stands for the training, in the run directory.
            refused: the request of scontrol that fails.
        """
        self.record.write_text("")
        report = {"nodes": [*nodes], "bad": dict.fromkeys(bad, "it is broken")}
        (self.folder / "report").write_text(json.dumps(report))
        paths = {"RECORD": str(self.record), "REPORT": str(self.folder / "report"), "RUN": str(self.run_dir.path)}
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_RESTART_COUNT": str(restarts)}
        cluster = {"NODES": " ".join(nodes), "DOWN": down, "TRAINS": trains, "REFUSED": refused}
        env = {**os.environ, **paths, **job, **cluster, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", str(self.path)], env=env, cwd=self.folder, capture_output=True, text=True)
        self.output = done.stdout + done.stderr
        return done.returncode

    def asked(self) -> list[str]:
        """What scontrol was asked, hostnames left out."""
        return [line for line in self.record.read_text().splitlines() if "hostnames" not in line]

    @property
    def status(self) -> Status:
        return read_status(self.run_dir)


def test_preflights_and_faults_share_one_budget(tmp_path: Path) -> None:
    """It was two: a preflight asked SLURM_RESTART_COUNT, and did not count where faults and time limits do."""
    script = Script(tmp_path, max_requeues=2)
    assert script.start(0, bad=["node2"]) == 1
    assert script.asked() == ["requeue 7", "show job 7", "update jobid=7 ExcNodeList=node2"]
    [first] = script.status.attempts
    assert (first.cause, first.bad_nodes, first.step) == (Cause.BAD_NODES, ("node2",), 0)
    assert first.reason == "preflight: bad node node2: it is broken"
    assert script.status.state is State.QUEUED
    assert script.status.reason == f"{first.reason}; restarts from the beginning, without node2"
    # Started on other nodes in between, which were taken away: attempt 2.
    update_status(script.run_dir, state=State.RUNNING)
    assert script.start(1, nodes=("node1", "node3"), bad=["node1"]) == 1
    causes = [attempt.cause for attempt in script.status.attempts]
    assert causes == [Cause.BAD_NODES, Cause.STOPPED, Cause.BAD_NODES]
    assert script.asked() == []
    assert script.status.state is State.FAILED
    assert script.status.reason == "preflight: bad node node1: it is broken; max_requeues is used up (2)"


def test_a_node_that_slurm_hands_out_again_counts(tmp_path: Path) -> None:
    script = Script(tmp_path, max_requeues=2)
    script.start(0, bad=["node2"])
    script.start(1)
    assert [attempt.reason for attempt in script.status.attempts][1:] == ["SLURM assigned node2 again"]
    assert script.asked()[0] == "requeue 7"
    script.start(2)
    assert script.status.state is State.FAILED


def test_without_a_budget_a_bad_node_ends_the_run(tmp_path: Path) -> None:
    script = Script(tmp_path, max_requeues=0)
    assert script.start(0, bad=["node2"]) != 0
    assert script.asked() == []
    assert (script.status.state, script.status.reason) == (State.FAILED, "preflight: bad node node2: it is broken")


def test_a_job_that_began_again_counts_as_running(tmp_path: Path) -> None:
    """From its first line on: what ends it while its nodes are checked is an attempt too, on its new nodes."""
    script = Script(tmp_path, max_requeues=5)
    script.start(0, bad=["node9"])
    assert (script.status.state, script.status.nodes) == (State.QUEUED, None)
    assert script.start(1, trains=f"cp status.json seen.json; {COMPLETES}") == 0
    seen = json.loads((script.run_dir.path / "seen.json").read_text())
    assert (seen["state"], seen["nodes"]) == ("running", "node[1-2]")
    assert script.status.state is State.COMPLETED


def test_a_node_that_failed_is_named(tmp_path: Path) -> None:
    script = Script(tmp_path, max_requeues=5)
    update_status(script.run_dir, state=State.RUNNING, nodes="node[1-2]")
    assert script.start(1, down="node2") == 0
    [attempt] = script.status.attempts
    assert (attempt.cause, attempt.node, attempt.reason) == (Cause.FAULT, "node2", "node node2 failed")
    assert script.asked() == []


def test_a_training_that_is_told_to_stop_is_requeued(tmp_path: Path) -> None:
    script = Script(tmp_path, max_requeues=1)
    assert script.start(0, trains=IS_TOLD_TO_STOP) == 1
    assert script.asked() == ["requeue 7"]
    [attempt] = script.status.attempts
    assert (attempt.cause, attempt.reason) == (Cause.STOPPED, "stopped: the time limit is near")
    assert script.status.state is State.QUEUED
    assert script.status.reason == "stopped: the time limit is near; restarts from the beginning"
    # What it left does not explain the next one's end.
    assert not (script.run_dir.logs / "stop").exists()
    assert (script.run_dir.logs / attempt.logs / "stop").exists()
    assert script.start(1, trains=IS_TOLD_TO_STOP) != 0
    assert script.status.state is State.PREEMPTED
    assert script.status.reason == "stopped: the time limit is near; max_requeues is used up (1)"


def test_a_node_that_fails_twice_is_left_out(tmp_path: Path) -> None:
    script = Script(tmp_path, max_requeues=5)
    assert script.start(0, trains=fails()) == 1
    assert [(a.cause, a.node, a.reason) for a in script.status.attempts] == 2 * [
        (Cause.FAULT, "node2", "rank 1: ValueError: no")
    ]
    assert script.asked() == ["requeue 7", "show job 7", "update jobid=7 ExcNodeList=node2"]


def test_an_error_of_the_user_is_not_tried_again(tmp_path: Path) -> None:
    script = Script(tmp_path, max_requeues=5)
    assert script.start(0, trains=fails(user_error=True)) != 0
    assert (script.status.state, script.status.reason) == (State.FAILED, "rank 1: ValueError: no")
    assert script.status.exit_status == 1


def test_a_site_that_does_not_requeue(tmp_path: Path) -> None:
    script = Script(tmp_path, max_requeues=5)
    assert script.start(0, trains=IS_TOLD_TO_STOP, refused="requeue 7") == 1
    assert script.status.state is State.PREEMPTED
    assert script.status.reason == "stopped: the time limit is near; SLURM does not requeue it"


def test_a_job_script_from_before_the_rename(tmp_path: Path) -> None:
    """Jobs that are queued call the step by its old name, with its old arguments."""
    run = RunDir.create(str(tmp_path), "run")
    command = [sys.executable, "-m", "distft.schedulers.conclude", str(run.path)]
    done = subprocess.run([*command, "begin", "2", "node1 node2"], capture_output=True, text=True)
    assert (done.stdout, read_status(run).state) == ("again\n", State.RUNNING), done.stderr
    done = subprocess.run([*command, "0", "2", "node1 node2"], capture_output=True, text=True)
    assert (done.stdout, read_status(run).state) == ("done\n", State.COMPLETED), done.stderr
