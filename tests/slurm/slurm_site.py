"""A folder on the login node of a cluster: profile, recipe, distft's command line, and what becomes of its runs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from running import Result, distft
from slurm_cluster import Cluster
from tiny import Tiny

from distft.runs.directory import RunDir
from distft.runs.status import State, job_ids, read_status

CLUSTER = ("--cluster", "site.yaml")
STUB = Path(__file__).with_name("stub")
LONG = {"training__max_steps": 100_000}
# For what takes seconds: a machine that does much else takes minutes for it, and no proof hangs on this.
PATIENCE = 300


class Site:
    """distft as on the login node; `stub`: its jobs run the stub of the training loop."""

    def __init__(self, cluster: Cluster, folder: Path, tiny: Tiny, stub: bool = False, **profile: Any):
        self.cluster, self.folder, self.tiny, self.stub = cluster, folder, tiny, stub
        self.runs = folder / "runs"
        folder.mkdir(exist_ok=True)
        self.profile(**profile)
        self.recipe()

    def profile(self, env: dict[str, str] | None = None, **changes: Any) -> None:
        base = {"runs_dir": str(self.runs), "node": {"gpus_per_node": 0}, "slurm": {"cpus_per_task": 1}}
        # Where all nodes share one network, gloo must not take the name of the machine.
        interface = {"network": {"interface": "lo"}} if self.cluster.mode == "loopback" else {}
        env = {**(on_path(STUB) if self.stub else {}), **(env or {})}
        profile = {**base, **interface, "preflight": False, "env": env, **changes}
        (self.folder / "site.yaml").write_text(yaml.safe_dump(profile))

    def recipe(self, **changes: Any) -> None:
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.tiny.recipe(**changes)))

    def run(self, *arguments: str, expect: int | None = 0, **env: str) -> subprocess.CompletedProcess:
        done = distft(*arguments, cwd=self.folder, env=self.cluster.env() | env, timeout=2 * PATIENCE)
        assert expect is None or done.returncode == expect, done.stdout + done.stderr
        assert "Traceback" not in done.stderr or expect == 1, done.stderr
        return done

    def launch(self, *arguments: str, nodes: int = 2, expect: int = 0) -> Result:
        """`distft launch`, to its end unless `--detach`."""
        self.share_data()
        options = [*CLUSTER, "--nodes", str(nodes), "--json", *arguments]
        done = self.run("launch", "recipe.yaml", *options, expect=None)
        run_dir = Path(json.loads(done.stdout)["run_dir"]) if done.stdout.startswith("{") else None
        result = Result(done.returncode, done.stdout, done.stderr, run_dir)
        assert done.returncode == expect, result.log()
        return result

    def share_data(self) -> None:
        """Have runs_dir find the data that another test prepared: a launch would prepare it, which takes 3 s of CPU."""
        cache = Path(os.environ["DISTFT_CACHE"])
        for folder in (cache, self.runs):
            folder.mkdir(parents=True, exist_ok=True)
        if not (self.runs / ".cache").is_symlink():
            (self.runs / ".cache").symlink_to(cache)

    def status(self, run_dir: Path) -> dict[str, Any]:
        return json.loads(self.run("status", str(run_dir), "--json").stdout)["runs"][0]

    def wait(self, run_dir: Path, what: Callable[[dict[str, Any]], bool], hurry: bool = False) -> dict[str, Any]:
        """Until `distft status` says something of a run. Asked only when there is news: each time is a Python start."""
        run, news, deadline = RunDir(run_dir), None, time.monotonic() + PATIENCE
        while True:
            now = (dataclasses.replace(read_status(run), step=None), self.hurry(run) if hurry else self.queue(run))
            if now != news:
                news, status = now, self.status(run_dir)
                if what(status):
                    return status
            assert time.monotonic() < deadline, (status, logs_of(run))
            time.sleep(0.5)

    def ended(self, run_dir: Path) -> dict[str, Any]:
        """Its status at the end, which a requeued job need not wait for."""
        return self.wait(run_dir, lambda status: State(status["state"]).finished, hurry=True)

    def hurry(self, run: RunDir) -> str:
        """SLURM holds a requeued job back for two minutes: let it go at once. Returns what queue() does."""
        if "BeginTime" in (queued := self.queue(run)):
            self.cluster.run("scontrol", "update", f"jobid={job_ids(run)[-1]}", "StartTime=now", check=False)
        return queued

    def trains(self, run_dir: Path) -> None:
        """Until it has made a step that status.json tells of."""
        until(lambda: (read_status(RunDir(run_dir)).step or 0) > 0, RunDir(run_dir))

    def queue(self, run: RunDir) -> str:
        """State and reason of its newest job, as squeue prints them: a hundredth of what `distft status` costs."""
        jobs = job_ids(run)
        return self.cluster.run("squeue", "-h", "-j", jobs[-1], "-o", "%T %r", check=False).stdout if jobs else ""


def until(what: Callable[[], Any], run: RunDir, seconds: float = PATIENCE) -> None:
    """Wait for something about a run."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"{read_status(run)}\n{logs_of(run)}"
        time.sleep(0.5)


def logs_of(run: RunDir) -> str:
    """The ends of its logs, for a failed assertion."""
    return "\n".join(f"{path}:\n{path.read_text()[-1500:]}" for path in sorted(run.logs.rglob("*.log")))


def on_path(folder: Path) -> dict[str, str]:
    """The variable that puts a folder before all else that Python imports."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
