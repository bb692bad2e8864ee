"""SLURM: a job as an sbatch script, submitted, looked after and cancelled with SLURM's own commands.

Everything that differs from job to job and node to node is expanded by bash there; `render` is pure.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.errors import ClusterError, RunError, SubmitError
from distft.jobs.job import Job
from distft.jobs.target import cluster_python
from distft.runs.directory import FINISHED, RECIPE, SBATCH, RunDir
from distft.shell import quote, sbatch_quote

if TYPE_CHECKING:
    from distft.config.cluster import Cluster

CLIENT_SECONDS = 30
TEMPLATE = "job.sbatch"

# SLURM's word → ours (https://slurm.schedmd.com/job_state_codes.html). Others are shown as they are.
STATES = {
    "PENDING": "queued",
    "CONFIGURING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_HOLD": "queued",
    "REQUEUE_FED": "queued",
    "RESV_DEL_HOLD": "queued",
    "SPECIAL_EXIT": "queued",
    "RUNNING": "running",
    "COMPLETING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "COMPLETED": "completed",
    "CANCELLED": "cancelled",
    "FAILED": "failed",
    "TIMEOUT": "failed",
    "NODE_FAIL": "failed",
    "BOOT_FAIL": "failed",
    "OUT_OF_MEMORY": "failed",
    "DEADLINE": "failed",
    "PREEMPTED": "preempted",
}
WORDS = {
    "TIMEOUT": "the time limit was reached",
    "NODE_FAIL": "a node failed",
    "BOOT_FAIL": "a node did not boot",
    "OUT_OF_MEMORY": "the host ran out of memory",
    "DEADLINE": "the deadline was reached",
}
# What sbatch says → what mends it.
MENDS = (
    ("invalid partition", "see `sinfo` for the partitions; set slurm.partition, or --partition"),
    ("time limit", "ask for less with --time, or take another partition (`sinfo -o '%P %l'`)"),
    ("requested node configuration", "no such nodes: ask for fewer --nodes or --gpus-per-node, or mend the profile"),
    ("more processors", "ask for fewer --nodes, or another partition"),
    ("node count", "ask for fewer --nodes, or another partition"),
    ("account", "set slurm.account to one of `sacctmgr show associations user=$USER`"),
    ("qos", "set slurm.qos to one that your account may use"),
    ("reservation", "see `scontrol show reservation`; set slurm.reservation"),
    ("feature", "see `sinfo -o '%N %f'` for the features; set slurm.constraint"),
    ("generic resource", "set node.gpu_type or slurm.gpus_as as `sinfo -o '%N %G'` shows"),
    ("insane message length", "what answers is no SLURM controller: is SLURM_CONF right?"),
    ("unable to contact", "the controller does not answer: try again, or ask the site's admins"),
)


def directives(job: Job) -> list[str]:
    """The #SBATCH lines, each one flag."""
    cluster, log = job.cluster, str(job.run.logs).replace("%", "%%")
    s, gpus = cluster.slurm, job.topology.nproc_per_node if cluster.node.gpus_per_node else 0
    gpu_type = f"{cluster.node.gpu_type}:" if cluster.node.gpu_type else ""
    flags = {
        "job-name": job.name,
        "nodes": job.topology.nnodes,
        "ntasks-per-node": 1,
        "partition": s.partition,
        "account": s.account,
        "qos": s.qos,
        "reservation": s.reservation,
        "constraint": s.constraint,
        "time": s.time,
        "mem": s.mem,
        "cpus-per-task": s.cpus_per_task,
        "gpus-per-node": f"{gpu_type}{gpus}" if gpus and s.gpus_as == "gpus_per_node" else None,
        "gres": f"gpu:{gpu_type}{gpus}" if gpus and s.gpus_as == "gres" else None,
        "dependency": f"afterok:{job.after}" if job.after else None,
        "output": f"{log}/slurm-%j.log",
    }
    lines = [f"--{flag}={sbatch_quote(str(value))}" for flag, value in flags.items() if value is not None]
    fixed = ["--open-mode=append", "--requeue" if cluster.max_requeues else "--no-requeue"]
    if RECIPE in job.files and cluster.signal_seconds:  # a script of one's own would not hear of it
        fixed.append(f"--signal=B:USR1@{cluster.signal_seconds}")
    if s.exclusive:
        fixed.append("--exclusive")
    if job.after:  # without it the job would wait for ever once the other has failed
        fixed.append("--kill-on-invalid-dep=yes")
    return [*lines, *fixed, *s.sbatch]


def render(job: Job) -> str:
    """The job script. Pure: the same job gives the same text.

    Raises:
        ClusterError: the profile's own template is wrong.
    """
    from jinja2 import TemplateError
    from markupsafe import Markup

    own = job.cluster.template
    try:
        text = Path(own).read_text() if own else packaged_template()
        return _compiled(text).render(**_context(job, Markup))
    except (TemplateError, OSError, UnicodeDecodeError, TypeError) as error:
        line = f":{error.lineno}" if getattr(error, "lineno", None) else ""
        raise ClusterError(f"template: {own or TEMPLATE}{line}: {error}") from None


@functools.cache
def _compiled(text: str) -> Any:
    """A Jinja template whose printed values are quoted for bash, and which knows no undefined name."""
    from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound
    from markupsafe import Markup

    def shell(value: Any) -> Markup:
        """What a template prints is a word of bash, a list several; text of the template itself stays."""
        if isinstance(value, Markup):
            return value
        if isinstance(value, (list, tuple)):
            return Markup(" ".join(quote(str(word)) for word in value))
        if isinstance(value, StrictUndefined):
            return Markup(str(value))  # raises
        return Markup(quote(str(value)))

    class Packaged(BaseLoader):
        def get_source(self, environment: Environment, template: str) -> tuple[str, None, Any]:
            if template != TEMPLATE:
                raise TemplateNotFound(template, f'{template}: a template can extend "{TEMPLATE}" only')
            return packaged_template(), None, lambda: True

    environment = Environment(
        loader=Packaged(), undefined=StrictUndefined, autoescape=True, finalize=shell, keep_trailing_newline=True
    )
    return environment.from_string(text)


def array_script(job: Job, folder: Path, count: int) -> str:
    """The script of an array of `count` jobs such as `job`, whose run directories are folder/0, 1, ... Pure.

    Each element runs the script of its own run directory.
    """
    output = f"--output={sbatch_quote(str(folder).replace('%', '%%') + '/%a/logs/slurm-%A_%a.log')}"
    lines = [output if line.startswith("--output=") else line for line in directives(job)]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in (*lines, f"--array=0-{count - 1}")),
            f"# distft: {count} runs of {job.name}; each element runs the job script of its own run directory.",
            f'exec bash {quote(str(folder))}/"$SLURM_ARRAY_TASK_ID"/{SBATCH}',
            "",
        ]
    )


def packaged_template() -> str:
    """The built-in job script."""
    return resources.files(__package__).joinpath("templates", f"{TEMPLATE}.jinja").read_text()


def _context(job: Job, raw: type) -> dict[str, Any]:
    cluster, run = job.cluster, job.run
    inside, step_flags = _container(cluster, run)
    interface = cluster.network.interface
    env = {
        **job.env,
        **({"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface} if interface else {}),
        **cluster.env,
    }
    python = job.argv[0] if job.argv else cluster_python(cluster)
    gpus = job.topology.nproc_per_node if cluster.node.gpus_per_node else 0
    recipe = str(run.recipe) if run.recipe.name in job.files else None
    return {
        "name": job.name,
        "nnodes": job.topology.nnodes,
        "nproc_per_node": job.topology.nproc_per_node,
        "run_dir": str(run.path),
        "directives": [raw(line) for line in directives(job)],
        "env": sorted(env.items()),
        "variables": sorted(env),
        "setup": cluster.setup,
        "step_flags": step_flags,
        "max_requeues": cluster.max_requeues,
        "preflight": [*inside, python, "-m", "distft.diagnostics.preflight", str(run.path), str(gpus)]
        if cluster.preflight
        else None,
        "prepare": [*inside, python, "-m", "distft.train.data", recipe] if recipe else None,
        "train": [*inside, *job.argv] if job.argv else None,
        "conclude": [*inside, python, "-m", "distft.schedulers.attempts", str(run.path)],
        "torchrun_log": str(run.logs).replace("%", "%%") + "/torchrun-%n.log",
    }


def _container(cluster: Cluster, run: RunDir) -> tuple[list[str], list[str]]:
    """What stands before a command, and srun's flags, to run it in the site's container."""
    container = cluster.container
    if container is None:
        return [], []
    mounts = [*container.mounts, f"{run.path.parent}:{run.path.parent}"]
    if container.runtime == "apptainer":
        binds = [word for mount in mounts for word in ("--bind", mount)]
        gpus = ["--nv"] if cluster.node.gpus_per_node else []
        return ["apptainer", "exec", *gpus, *binds, container.image], []
    return [], [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]


# ---- SLURM's commands


def client(
    *argv: str, stdin: str | None = None, check: type[SubmitError] | type[RunError] | None = SubmitError
) -> subprocess.CompletedProcess:
    """Run one of SLURM's commands.

    Raises:
        SubmitError: it is not here, or does not answer in time; or it failed (`check`), in its own words.
    """
    if not shutil.which(argv[0]):
        raise SubmitError(f"{argv[0]}: no such command here; run distft on a host with SLURM's client commands")
    pipe = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=CLIENT_SECONDS, errors="replace", **pipe)
    except subprocess.TimeoutExpired:
        raise SubmitError(f"{argv[0]}: SLURM did not answer in {CLIENT_SECONDS} s") from None
    if check and done.returncode:
        raise check(refusal(done.stderr or done.stdout, argv[0]))
    return done


def refusal(said: str, command: str) -> str:
    """What SLURM said without its prefixes, and the mend."""
    prefixes = (f"{command}: error: ", f"{command}: ", "allocation failure: ", "Batch job submission failed: ")
    lines = []
    for line in said.strip().splitlines():
        for prefix in prefixes:
            line = line.removeprefix(prefix)
        lines.append(line)
    text = "; ".join(dict.fromkeys(lines)) or "no reason was given"
    mend = next((mend for words, mend in MENDS if words in text.lower()), None)
    who = "SLURM refuses the job" if command == "sbatch" else command
    return f"{who}: {text}" + (f"\n  mend: {mend}" if mend else "")


def test_only(script: str) -> str:
    """Ask SLURM whether it would take the job, queueing nothing. Returns what it says of the start.

    Raises:
        SubmitError: it would not; in its own words, with the mend.
    """
    said = client("sbatch", "--test-only", stdin=script).stderr.strip().removeprefix("sbatch: ")
    # Its job number is never used again: the job gets another.
    start = re.fullmatch(r"Job \d+ to start at (\S+) using \d+ processors on nodes (\S+) in partition (\S+)", said)
    return f"would start it at {start[1]} on {start[2]}, partition {start[3]}" if start else f"says: {said}"


def submit(job: Job, resumed: bool = False) -> str:
    """Write the files of a run and queue it. The run directory exists, empty unless it `resumed`. Returns the job's id.

    Raises:
        SubmitError: SLURM refused it; the run directory is removed, unless it has a past.
    """
    job.run.fill({**job.files, SBATCH: render(job)}, job.name, resumed)
    try:
        job_id = client("sbatch", "--parsable", str(job.run.path / SBATCH)).stdout.strip().split(";")[0]
    except SubmitError as error:
        if resumed:
            job.run.update_status(state="failed", reason=str(error).splitlines()[0])
        else:
            shutil.rmtree(job.run.path, ignore_errors=True)
        raise
    job.run.add_job(job_id)
    job.run.update_status(job_id=job_id)
    return job_id


def down(nodes: str) -> list[str]:
    """Those of the nodes, given as SLURM writes them (`node[1-4]`), that it counts as failed; [] where it is silent."""
    try:
        said = client("sinfo", "-h", "-N", "-n", nodes, "-t", "down,fail,drain,no_respond", "-o", "%N").stdout
    except SubmitError:
        return []
    return sorted(set(said.split()))


@dataclass(frozen=True)
class Seen:
    """A job as SLURM sees it."""

    state: str  # SLURM's word
    reason: str
    start: str  # expected or actual, as SLURM prints it; "" where unknown
    nodes: str


def look(job_ids: Iterable[str]) -> dict[str, Seen]:
    """The jobs that SLURM still knows: from squeue, and what has left it from sacct where there is accounting.

    Raises:
        SubmitError: SLURM does not answer.
    """
    wanted = set(job_ids)
    if not wanted:
        return {}
    # All of the user's jobs: squeue fails for a single id that it has forgotten, and a long list of ids is no quicker.
    # -r: each element of an array for itself; it is known by two ids, ARRAY_ELEMENT and one of its own.
    done = client("squeue", "-h", "-a", "-r", "-t", "all", "-u", getpass.getuser(), "-o", "%i|%A|%T|%r|%S|%N")
    found = _parse(done.stdout, wanted)
    left = sorted(wanted - found.keys())
    if left and shutil.which("sacct"):
        done = client(
            "sacct",
            "-n",
            "-P",
            "-X",
            "-j",
            ",".join(left),
            "-o",
            "JobID,JobIDRaw,State,Reason,Start,NodeList",
            check=None,
        )
        if done.returncode == 0:  # fails where accounting is off
            found |= _parse(done.stdout, wanted)
    return found


def _parse(text: str, wanted: set[str]) -> dict[str, Seen]:
    found = {}
    for line in text.splitlines():
        name, number, state, reason, start, nodes, *_ = [*line.split("|"), "", "", "", "", ""]
        for job_id in {name, number} & wanted:
            word = state.split()[0] if state else ""  # sacct: "CANCELLED by 1000"
            empty = ("None", "N/A", "Unknown", "(null)", "None assigned")
            found[job_id] = Seen(word, *("" if value in empty else value for value in (reason, start, nodes)))
    return found


def states_now(runs: Sequence[RunDir]) -> list[dict[str, Any]]:
    """status.json of each run with what SLURM knows better: a run that is queued, or ended without a last word."""
    statuses = [run.read_status() for run in runs]
    jobs = {run: ids[-1] for run, status in zip(runs, statuses, strict=True) if _open(status) and (ids := run.jobs())}
    seen, problem = {}, None
    try:
        seen = look(jobs.values())
    except SubmitError as error:
        problem = str(error).splitlines()[0]
    return [
        _merge(run, jobs[run], seen.get(jobs[run]), problem) if run in jobs else status
        for run, status in zip(runs, statuses, strict=True)
    ]


def state_now(run: RunDir) -> dict[str, Any]:
    """The same for one run."""
    return states_now([run])[0]


def _open(status: dict[str, Any]) -> bool:
    return status.get("state") not in FINISHED


def _merge(run: RunDir, job_id: str, seen: Seen | None, problem: str | None) -> dict[str, Any]:
    status, latest = run.read_status(), run.jobs()[-1]  # again: it may have ended while SLURM was asked
    if not _open(status):
        return status
    status |= {"job_id": latest}
    if latest != job_id:  # it has submitted itself again
        return status | {"state": "queued", "reason": None}
    if problem:
        return status | {"reason": problem}
    own = status.get("reason")  # why it goes on, or will
    status |= _facts(job_id, seen)
    if own and status["state"] in ("queued", "running"):
        status["reason"] = "; ".join(filter(None, (own, status["reason"])))
    if not _open(status):
        with contextlib.suppress(OSError):  # another user's run; else kept for when SLURM has forgotten the job
            run.update_status(state=status["state"], reason=status["reason"], job_id=latest, ended=time.time())
    return status


def _facts(job_id: str, seen: Seen | None) -> dict[str, Any]:
    """What SLURM's view of a job says about its run, which has not said itself that it ended."""
    if seen is None:
        return {"state": "failed", "reason": f"SLURM no longer knows job {job_id}; it ended without a word"}
    state = STATES.get(seen.state, seen.state.lower())
    facts: dict[str, Any] = {"slurm_state": seen.state, "nodes": seen.nodes or None}
    if state == "queued":
        return facts | {"state": state, "reason": seen.reason or None, "expected_start": seen.start or None}
    if state == "running":
        return facts | {"state": state, "reason": None}
    if state == "completed":  # the batch script ended well, and yet nobody said how the run ended
        return facts | {"state": "failed", "reason": f"job {job_id} ended before the run was done"}
    at = f" ({seen.nodes})" if seen.nodes and seen.state in ("NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY") else ""
    reason = WORDS.get(seen.state, f"SLURM: {seen.state}" if state == "failed" else None)
    return facts | {"state": state, "reason": f"{reason}{at}" if reason else None}


def cancel(run: RunDir) -> dict[str, Any]:
    """Cancel the job of a run and write it down. Does nothing to one that has ended.

    Raises:
        SubmitError: SLURM does not answer.
        RunError: it did not let the job be cancelled.
    """
    status = state_now(run)
    if not _open(status):
        return status
    client("scancel", run.jobs()[-1], check=RunError)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = state_now(run)
        if not _open(status):
            return run.update_status(state="cancelled", ended=time.time(), reason="cancelled by distft cancel")
        time.sleep(0.5)
    raise RunError(f"{run.path.name}: job {run.jobs()[-1]} is still {status['state']} after a minute")


def allocation() -> str | None:
    """The id of the allocation that this process is in, where srun can start a step in it."""
    job_id = os.environ.get("SLURM_JOB_ID")
    return job_id if job_id and os.environ.get("SLURM_JOB_NODELIST") and shutil.which("srun") else None
