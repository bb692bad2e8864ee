"""What can happen to a run on a cluster, for tests/slurm/test_recovery.py.

Each fault lets it happen to a run that trains on two nodes, and says how the attempt ends, if it does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from running import inject
from slurm_cluster import Cluster
from slurm_site import Site, on_path, until
from tiny import Tiny

from distft.runs import checkpoints
from distft.runs.directory import RunDir
from distft.runs.files import write_atomically
from distft.runs.status import job_ids, read_status
from distft.runs.stop_file import stop_asked

SAVE_STEPS = 5
HANG_SECONDS = 35  # longer than SlurmdTimeout


def start(site: Site, *arguments: str) -> RunDir:
    """A run on two nodes that has saved, and made some steps since."""
    run = RunDir(site.launch("--detach", *arguments, nodes=2).run_dir)
    trains_on(site, run)
    return run


def continues(site: Site, run: RunDir, attempts: int) -> None:
    """Wait until more than `attempts` have ended."""

    def does() -> bool:
        site.hurry(run)
        return len(read_status(run).attempts) > attempts

    until(does, run)


def steps_of(run: RunDir) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in run.metrics.read_text().splitlines()] if run.metrics.exists() else []


def trains_on(site: Site, run: RunDir, after: float = 0) -> dict[str, Any]:
    """Wait until it has made steps after `after` (a time), and saved; returns the line of the first of them."""
    first: dict[str, Any] = {}

    def does() -> bool:
        site.hurry(run)
        new = [line for line in steps_of(run) if line["time"] > after]
        if new and not first:
            first.update(new[0])
        saved = checkpoints.complete(run)
        return len(new) > 5 and saved and new[-1]["step"] > saved[0].step + 1

    until(does, run)
    return first


def longest_pause(run: RunDir, since: float) -> float:
    """Seconds between two steps, at most."""
    times = [line["time"] for line in steps_of(run)]
    return max(after - before for before, after in itertools.pairwise(times) if after > since)


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


def nodes_of(site: Site, run: RunDir) -> list[str]:
    """Where it runs, the head node first."""
    names = site.cluster.run("squeue", "-h", "-j", job_ids(run)[-1], "-o", "%N").stdout.strip()
    return site.cluster.run("scontrol", "show", "hostnames", names).stdout.split()


# ---- faults: each returns what undoes it, or None


def killed(site: Site, run: RunDir) -> None:
    os.kill(ranks_of(run)[1], signal.SIGKILL)


def killed_and_damaged(site: Site, run: RunDir) -> None:
    """The newest checkpoint is cut short too: the one before is taken."""
    until(lambda: len(checkpoints.complete(run)) > 1, run)
    newest = checkpoints.complete(run)[0]
    shard = max(newest.path.glob("shard-*"), key=lambda path: path.stat().st_size)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    os.truncate(shard, shard.stat().st_size // 2)


def out_of_memory(site: Site, run: RunDir) -> None:
    """No memory of the host's is left for a rank."""
    resource.prlimit(ranks_of(run)[1], resource.RLIMIT_AS, (2**20, 2**20))


def stopped(site: Site, run: RunDir) -> None:
    os.kill(ranks_of(run)[1], signal.SIGSTOP)


def network_away(site: Site, run: RunDir) -> None:
    node = nodes_of(site, run)[1]
    site.cluster.cut(node)
    time.sleep(10)
    site.cluster.reconnect(node)


def network_gone(site: Site, run: RunDir) -> Callable[[], None]:
    node = nodes_of(site, run)[1]
    site.cluster.cut(node)
    return lambda: site.cluster.reconnect(node)


def slurmd_killed(site: Site, run: RunDir) -> Callable[[], None]:
    node = nodes_of(site, run)[1]
    site.cluster.kill_slurmd(node)
    return lambda: site.cluster.boot(node)


def node_gone(site: Site, run: RunDir) -> Callable[[], None]:
    node = nodes_of(site, run)[1]
    site.cluster.crash(node)
    return lambda: site.cluster.boot(node)


def controller_restarted(site: Site, run: RunDir) -> None:
    site.cluster.restart_controller()


def preempted(site: Site, run: RunDir) -> None:
    """A job of a higher partition takes the nodes."""
    wants = ["--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3"]
    site.cluster.run("sbatch", *wants)


def time_limit(site: Site, run: RunDir) -> None:
    """Its end comes near. SLURM looks twice a minute, and warns the job by itself."""
    job, attempts = job_ids(run)[-1], len(read_status(run).attempts)
    *_, minutes, _ = site.cluster.run("squeue", "-h", "-j", job, "-o", "%M").stdout.split(":")
    pace(site, 2)
    site.cluster.run("scontrol", "update", f"jobid={job}", f"TimeLimit={int(minutes) + 2}")
    until(lambda: stop_asked(run) or len(read_status(run).attempts) > attempts, run)
    pace(site)
    site.cluster.run("scontrol", "update", f"jobid={job}", "TimeLimit=60")


def disk_full(site: Site, run: RunDir) -> None:
    """runs_dir has no space left for a while, in which saves are due."""
    times = [line["time"] for line in steps_of(run)[-SAVE_STEPS:]]
    filler = site.runs / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"\0" * 2**12):
            pass
    time.sleep(3 * (times[-1] - times[0]))
    filler.unlink()
    until(lambda: any("No space left" in save.get("problem", "") for save in read_status(run).saves), run)


@dataclass(frozen=True)
class Fault:
    """`reason`: a pattern of how status.json explains it; None where the attempt goes on. `blamed`: on that node.

    `lost_saves`: after so many times save_steps it goes on, at most.
    """

    name: str
    happen: Callable[[Site, RunDir], Callable[[], None] | None]
    reason: str | None
    blamed: bool = True
    lost_saves: int = 1


KILLED = "rank 1 was killed by SIGKILL"
# In an order in which no two nodes of the four are excluded.
OF_A_RANK = (
    Fault("a rank killed (SIGKILL), the newest checkpoint damaged", killed_and_damaged, KILLED, lost_saves=2),
    Fault("slurmctld restarted", controller_restarted, None),
    Fault("network cut for 10 s", network_away, None),
    Fault("runs_dir full for a while", disk_full, None),
    Fault("preempted by a higher partition", preempted, "stopped: .* is saved", False, 0),
    Fault("time limit", time_limit, "stopped: the time limit is near, .* is saved", False, 0),
    # It has no memory to save either.
    Fault("a rank out of the host's memory", out_of_memory, "rank 1", lost_saves=5),
)
OF_A_NODE = (
    Fault("a rank stopped (SIGSTOP)", stopped, "rank 1: Hang: no step for .*rank 1 does not answer"),
    Fault("a node without power", node_gone, "node .* failed"),
    Fault("slurmd killed", slurmd_killed, "node .* failed"),
    Fault("network cut for good", network_gone, "node .* failed"),
)


def pace(site: Site, seconds: float = 0.4) -> None:
    """How long a step takes. Those of a tiny model last milliseconds: faults are to fall among them."""
    write_atomically(site.folder / "pace", str(seconds))


@contextlib.contextmanager
def cluster_for(folder: Path, tiny: Tiny, **recipe: Any) -> Iterator[Site]:
    """A cluster of its own, on which a run of real training continues by itself; its runs_dir is easily filled."""
    if not slurm_cluster.namespaces_work():
        pytest.skip("nodes have no mounts and names of their own here: root and namespaces are needed")
    runs = folder / "small"
    runs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", runs], check=True)
    try:
        with Cluster(folder / "slurm", mode="namespaces") as cluster:  # its nodes see what was mounted before
            site = Site(cluster, folder / "site", tiny)
            site.runs = runs / "runs"
            pace(site)
            # More slowly towards the end: the last fault must not find a run that has ended.
            pace_now = f"float(open({str(site.folder / 'pace')!r}).read())"
            # A step needs memory of its own, so that one without fails: malloc would hand the same blocks out again.
            slower = "(5 if args[0].state.global_step > 0.75 * args[0].state.max_steps else 1)"
            step = f"bytearray(2**26); time.sleep({pace_now} * {slower})"
            inject(site.folder, "transformers.trainer:Trainer.training_step", step)
            profile(site, env=on_path(site.folder))
            site.recipe(**recipe)
            yield site
    finally:
        subprocess.run(["umount", "--lazy", runs], check=True)


def profile(site: Site, max_requeues: int = 20, env: dict[str, str] | None = None, **changes: Any) -> None:
    """A profile with which a run continues by itself."""
    env = {"DISTFT_HANG_SECONDS": str(HANG_SECONDS), **(env or {})}
    slurm = {"cpus_per_task": 1, "partition": "low", "sbatch": ["--exclusive"]}
    site.profile(max_requeues=max_requeues, env=env, slurm=slurm, **changes)
