"""SLURM: a job as an sbatch script, submitted, watched and cancelled with SLURM's commands.

Everything that differs between jobs and nodes is expanded by bash on the nodes; `render` is pure.
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
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.errors import ClusterError, RunError, SubmitError
from distft.jobs.job import SlurmJob
from distft.jobs.target import cluster_python
from distft.runs import attempts
from distft.runs.directory import SBATCH, RunDir
from distft.runs.status import State, Status, add_job_id, job_ids, read_status, update_status
from distft.shell import quote, sbatch_quote

if TYPE_CHECKING:
    from jinja2 import Template

    from distft.config.cluster import Cluster

CLIENT_SECONDS = 30
CANCEL_SECONDS, POLL_SECONDS = 60, 0.5  # for a cancelled job to end, and between two looks at it
TEMPLATE = "job.sbatch"

# SLURM's state → ours (https://slurm.schedmd.com/job_state_codes.html). In another one, a run stays as it was.
STATES = {
    "PENDING": State.QUEUED,
    "CONFIGURING": State.QUEUED,
    "REQUEUED": State.QUEUED,
    "REQUEUE_HOLD": State.QUEUED,
    "REQUEUE_FED": State.QUEUED,
    "RESV_DEL_HOLD": State.QUEUED,
    "SPECIAL_EXIT": State.QUEUED,
    "RUNNING": State.RUNNING,
    "COMPLETING": State.RUNNING,
    "SIGNALING": State.RUNNING,
    "STAGE_OUT": State.RUNNING,
    "COMPLETED": State.COMPLETED,
    "CANCELLED": State.CANCELLED,
    "FAILED": State.FAILED,
    "NODE_FAIL": State.FAILED,
    "BOOT_FAIL": State.FAILED,
    "OUT_OF_MEMORY": State.FAILED,
    "PREEMPTED": State.PREEMPTED,
    "TIMEOUT": State.PREEMPTED,
    "DEADLINE": State.PREEMPTED,
}
WORDS = {
    "TIMEOUT": "the time limit was reached",
    "NODE_FAIL": "a node failed",
    "BOOT_FAIL": "a node did not boot",
    "OUT_OF_MEMORY": "the host ran out of memory",
    "DEADLINE": "the deadline was reached",
}
# What sbatch prints → the fix.
FIXES = (
    ("invalid partition", "see `sinfo` for the partitions; set slurm.partition, or --partition"),
    ("time limit", "ask for less with --time, or take another partition (`sinfo -o '%P %l'`)"),
    ("requested node configuration", "no such nodes: ask for fewer --nodes or --gpus-per-node, or correct the profile"),
    ("more processors", "ask for fewer --nodes, or another partition"),
    ("node count", "ask for fewer --nodes, or another partition"),
    ("account", "set slurm.account to one of `sacctmgr show associations user=$USER`"),
    ("qos", "set slurm.qos to one that your account may use"),
    ("reservation", "see `scontrol show reservation`; set slurm.reservation"),
    ("feature", "see `sinfo -o '%N %f'` for the features; set slurm.constraint"),
    ("generic resource", "set node.gpu_type or slurm.gpus_as as `sinfo -o '%N %G'` shows"),
    ("insane message length", "the answer is not from a SLURM controller: is SLURM_CONF right?"),
    ("unable to contact", "the controller does not answer: try again, or ask the administrators"),
)


def directives(job: SlurmJob) -> list[str]:
    """The #SBATCH lines, one flag each."""
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
    if job.trains_recipe and cluster.signal_seconds:  # a user's script would not handle it
        fixed.append(f"--signal=B:USR1@{cluster.signal_seconds}")
    if s.exclusive:
        fixed.append("--exclusive")
    if job.after:  # without it the job would wait forever once the other has failed
        fixed.append("--kill-on-invalid-dep=yes")
    return [*lines, *fixed, *s.sbatch]


def render(job: SlurmJob) -> str:
    """The job script. Pure: the same job gives the same text.

    Raises:
        ClusterError: the profile's template is wrong.
    """
    from jinja2 import TemplateError, TemplateSyntaxError
    from markupsafe import Markup

    own = job.cluster.template
    try:
        text = Path(own).read_text() if own else packaged_template()
        return _compiled(text).render(**_context(job, Markup))
    except (TemplateError, OSError, UnicodeDecodeError, TypeError) as error:
        line = f":{error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise ClusterError(f"template: {own or TEMPLATE}{line}: {error}") from None


@functools.cache
def _compiled(text: str) -> Template:
    """A Jinja template that quotes the values it prints for bash, and in which an undefined name is an error."""
    from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound
    from markupsafe import Markup

    def shell(value: Any) -> Markup:
        """A printed value is one word of bash, a list several; the template's own text stays as it is."""
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


def array_script(job: SlurmJob, folder: Path, count: int) -> str:
    """The script of an array of `count` jobs like `job`, with run directories folder/0, folder/1, ... Pure.

    Each element runs the script in its run directory.
    """
    output = f"--output={sbatch_quote(str(folder).replace('%', '%%') + '/%a/logs/slurm-%A_%a.log')}"
    lines = [output if line.startswith("--output=") else line for line in directives(job)]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in (*lines, f"--array=0-{count - 1}")),
            f"# distft: {count} runs of {job.name}; each element runs the job script in its run directory.",
            f'exec bash {quote(str(folder))}/"$SLURM_ARRAY_TASK_ID"/{SBATCH}',
            "",
        ]
    )


def packaged_template() -> str:
    """The built-in job script."""
    return (resources.files(__package__) / "templates" / f"{TEMPLATE}.jinja").read_text()


def _context(job: SlurmJob, raw: type) -> dict[str, Any]:
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
    recipe = str(run.recipe) if job.trains_recipe else None
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
        "conclude": [*inside, python, "-m", "distft.schedulers.attempts", str(run.path), str(cluster.max_requeues)],
        "torchrun_log": str(run.logs).replace("%", "%%") + "/torchrun-%n.log",
    }


def _container(cluster: Cluster, run: RunDir) -> tuple[list[str], list[str]]:
    """What to put before a command, and srun's flags, to run it in the site's container."""
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
) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands.

    Raises:
        SubmitError: it is not installed here, or does not answer in time; or, as `check`, it failed, in its own words.
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


def refusal(answer: str, command: str) -> str:
    """What SLURM printed without its prefixes, and the fix."""
    prefixes = (f"{command}: error: ", f"{command}: ", "allocation failure: ", "Batch job submission failed: ")
    lines = []
    for line in answer.strip().splitlines():
        for prefix in prefixes:
            line = line.removeprefix(prefix)
        lines.append(line)
    text = "; ".join(dict.fromkeys(lines)) or "no reason was given"
    fix = next((fix for words, fix in FIXES if words in text.lower()), None)
    who = "SLURM refuses the job" if command == "sbatch" else command
    return f"{who}: {text}" + (f"\n  fix: {fix}" if fix else "")


def test_only(script: str) -> str:
    """Ask SLURM whether it would take the job, queueing nothing. Returns when and where it would start.

    Raises:
        SubmitError: it would not; in SLURM's words, with the fix.
    """
    answer = client("sbatch", "--test-only", stdin=script).stderr.strip().removeprefix("sbatch: ")
    # The job number in it is never used: the job gets another.
    start = re.fullmatch(r"Job \d+ to start at (\S+) using \d+ processors on nodes (\S+) in partition (\S+)", answer)
    return f"would start it at {start[1]} on {start[2]}, partition {start[3]}" if start else f"answers: {answer}"


def sbatch(script: Path) -> str:
    """Queue a job script. Returns the job's id.

    Raises:
        SubmitError: SLURM refused it.
    """
    return client("sbatch", "--parsable", str(script)).stdout.strip().split(";")[0]  # "ID;CLUSTER" where there are many


def submit(job: SlurmJob, resumed: bool = False) -> str:
    """Write the files of a run and queue it. Returns the job's id. The run directory exists, empty unless `resumed`.

    Raises:
        SubmitError: SLURM refused it; the run directory is removed, unless the run is being resumed.
    """
    attempts.fill(job.run, {**job.files, SBATCH: render(job)}, job.name, resumed)
    try:
        job_id = sbatch(job.run.path / SBATCH)
    except SubmitError as error:
        if resumed:
            update_status(job.run, state=State.FAILED, reason=str(error).splitlines()[0])
        else:
            shutil.rmtree(job.run.path, ignore_errors=True)
        raise
    add_job_id(job.run, job_id)
    update_status(job.run, job_id=job_id)
    return job_id


def down(nodes: str) -> list[str]:
    """Those of the nodes, written as SLURM does (`node[1-4]`), that it counts as failed; [] if it does not answer."""
    try:
        listed = client("sinfo", "-h", "-N", "-n", nodes, "-t", "down,fail,drain,no_respond", "-o", "%N").stdout
    except SubmitError:
        return []
    return sorted(set(listed.split()))


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
    # -r: each element of an array for itself; it has two ids, ARRAY_ELEMENT and a plain number.
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


def statuses_now(runs: Sequence[RunDir]) -> list[Status]:
    """status.json of each run with what SLURM knows better: why it is queued, or that it ended without writing so."""
    statuses = [read_status(run) for run in runs]
    jobs = {run: ids[-1] for run, s in zip(runs, statuses, strict=True) if not s.finished and (ids := job_ids(run))}
    seen, problem = {}, None
    try:
        seen = look(jobs.values())
    except SubmitError as error:
        problem = str(error).splitlines()[0]
    return [
        _merge(run, jobs[run], seen.get(jobs[run]), problem) if run in jobs else status
        for run, status in zip(runs, statuses, strict=True)
    ]


def status_now(run: RunDir) -> Status:
    """The same for one run."""
    return statuses_now([run])[0]


def _merge(run: RunDir, job_id: str, seen: Seen | None, problem: str | None) -> Status:
    status, latest = read_status(run), job_ids(run)[-1]  # again: it may have ended while SLURM was asked
    if status.finished:
        return status
    status = replace(status, job_id=latest)
    if latest != job_id:  # it has submitted itself again
        return replace(status, state=State.QUEUED, reason=None)
    if problem:
        return replace(status, reason=problem)
    merged = _as_seen(status, job_id, seen)
    if not merged.finished:
        both = filter(None, (status.reason, merged.reason))  # why it continues, or will, and why it waits
        return replace(merged, reason="; ".join(both) or None)
    with contextlib.suppress(OSError):  # another user's run; else kept for when SLURM has forgotten the job
        update_status(run, state=merged.state, reason=merged.reason, job_id=latest, ended=time.time())
    return merged


def _as_seen(status: Status, job_id: str, seen: Seen | None) -> Status:
    """The status of a run that has not written that it ended, as SLURM sees its job. `reason` is only SLURM's."""
    if seen is None:
        why = f"SLURM no longer knows job {job_id}; the run ended without writing why"
        return replace(status, state=State.FAILED, reason=why)
    state = STATES.get(seen.state)
    status = replace(status, slurm_state=seen.state, nodes=seen.nodes or None)
    if state is None:
        return replace(status, reason=f"SLURM: {seen.state}")
    if state is State.QUEUED:
        return replace(status, state=state, reason=seen.reason or None, expected_start=seen.start or None)
    if state is State.RUNNING:
        return replace(status, state=state, reason=None)
    if state is State.COMPLETED:  # the batch script ended well, and yet nothing says how the run ended
        return replace(status, state=State.FAILED, reason=f"job {job_id} ended before the run was done")
    at = f" ({seen.nodes})" if seen.nodes and seen.state in ("NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY") else ""
    reason = WORDS.get(seen.state, f"SLURM: {seen.state}" if state is State.FAILED else None)
    return replace(status, state=state, reason=f"{reason}{at}" if reason else None)


def cancel(run: RunDir) -> Status:
    """Cancel the job of a run and write it down; a run that has ended stays as it is.

    Raises:
        SubmitError: SLURM does not answer.
        RunError: it did not let the job be cancelled.
    """
    status = status_now(run)
    if status.finished:
        return status
    client("scancel", job_ids(run)[-1], check=RunError)
    deadline = time.monotonic() + CANCEL_SECONDS
    while time.monotonic() < deadline:
        status = status_now(run)
        if status.state is State.COMPLETED:  # it was quicker
            return status
        if status.finished:
            return update_status(run, state=State.CANCELLED, ended=time.time(), reason="cancelled by distft cancel")
        time.sleep(POLL_SECONDS)
    raise RunError(f"{run.path.name}: job {job_ids(run)[-1]} is still {status.state} after {CANCEL_SECONDS} s")


def allocation() -> str | None:
    """The id of the allocation that this process is in, where srun can start a step in it."""
    job_id = os.environ.get("SLURM_JOB_ID")
    return job_id if job_id and os.environ.get("SLURM_JOB_NODELIST") and shutil.which("srun") else None
