"""What a cluster reports about itself: a first profile for it, and a profile compared with it."""

from __future__ import annotations

import getpass
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from distft.config.cluster import Cluster
from distft.errors import DistftError, SubmitError
from distft.hardware.devices import GPUS
from distft.hardware.topology import Topology
from distft.jobs.job import SlurmJob
from distft.runs.directory import RunDir
from distft.schedulers import slurm

SINFO = "%P|%a|%l|%D|%c|%m|%G|%f"
Check = tuple[bool | None, str]  # whether it is right (None: cannot be checked here), and what was compared


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind in a partition, as sinfo lists them."""

    partition: str
    default: bool
    up: bool
    time: str  # "infinite", "5:00", "2-00:00:00"
    count: int
    cpus: int
    memory_mb: int
    gpus: int
    gpu_type: str | None
    features: str | None


def partitions() -> list[Nodes]:
    """Every kind of node in every partition.

    Raises:
        SubmitError: SLURM does not answer.
    """
    found = []
    for line in slurm.client("sinfo", "-h", "-a", "-e", "-o", SINFO).stdout.splitlines():
        name, available, time, count, cpus, memory, gres, features = line.split("|")
        gpus, gpu_type = parse_gres(gres)
        found.append(
            Nodes(
                partition=name.rstrip("*"),
                default=name.endswith("*"),
                up=available == "up",
                time=time,
                count=_at_least(count),
                cpus=_at_least(cpus),
                memory_mb=_at_least(memory),
                gpus=gpus,
                gpu_type=gpu_type,
                features=None if features == "(null)" else features,
            )
        )
    return found


def _at_least(text: str) -> int:
    """A number of sinfo's, which prints `128+` where the nodes differ."""
    return int(re.sub(r"\D.*", "", text) or 0)


def parse_gres(text: str) -> tuple[int, str | None]:
    """GPUs and their type: `gpu:h100:8(S:0-1),nvme:1` is (8, "h100"), `gpu:4` is (4, None)."""
    total, kind = 0, None
    for entry in re.sub(r"\([^)]*\)", "", text).split(","):
        parts = entry.split(":")
        if parts[0] == "gpu":
            total += int(parts[-1]) if parts[-1].isdigit() else 1
            kind = parts[1] if len(parts) == 3 else kind
    return total, kind


def minutes(text: str) -> float:
    """A time limit in minutes: `30`, `12:00:00`, `2-00:00:00`, `5:00` (minutes:seconds), `infinite`."""
    if text.lower() in ("infinite", "unlimited", "n/a"):
        return float("inf")
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:  # days-hours[:minutes[:seconds]]
        hours, mins, seconds = [*parts, 0, 0][:3]
    elif len(parts) < 3:  # minutes[:seconds]
        hours, mins, seconds = [0, *parts, 0][:3]
    else:
        hours, mins, seconds = parts
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def accounts() -> list[tuple[str, str]] | None:
    """The user's (account, comma-separated qos) pairs; None on a cluster without accounting."""
    if not shutil.which("sacctmgr"):
        return None
    user = f"user={getpass.getuser()}"
    done = slurm.client("sacctmgr", "-n", "-P", "show", "associations", user, "format=account,qos", check=None)
    if done.returncode:
        return None
    pairs = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    return [(account, qos) for account, qos, *_ in pairs]


def config() -> dict[str, str]:
    """`scontrol show config` by key."""
    lines = slurm.client("scontrol", "show", "config").stdout.splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}


def draft() -> tuple[str, str]:
    """The cluster's name and a first profile for it, as YAML with comments.

    Raises:
        SubmitError: SLURM does not answer.
    """
    nodes = partitions()
    if not nodes:
        raise SubmitError("sinfo lists no partition that you may use")
    # The default partition if it has GPUs, else the one with the most, else the default.
    chosen = max(nodes, key=lambda n: (n.up, n.gpus > 0, n.default, n.gpus * n.count))
    settings = config()
    known = accounts()
    gpu = next((name for name in GPUS if name.lower() == (chosen.gpu_type or "").lower()), None)
    limit = "1-00:00:00" if minutes(chosen.time) >= 1440 else chosen.time
    runs = next((f"${name}/distft" for name in ("SCRATCH", "WORK", "PROJECT") if os.environ.get(name)), "~/distft-runs")
    others = ", ".join(sorted({n.partition for n in nodes} - {chosen.partition}))
    gpu_type = f"\n  gpu_type: {chosen.gpu_type}" if chosen.gpu_type else ""
    model = f"gpu: {gpu}" if gpu else f"# gpu: {'A100-80GB' if chosen.gpus else 'H100'}"
    account = f"account: {known[0][0]}" if known else "# account: mine"
    lines = [
        f"# Profile of the cluster {settings.get('ClusterName', '')}, from sinfo and scontrol (SLURM "
        f"{settings.get('SLURM_VERSION', '?')}). Review it: what is behind a # is not known or not needed.",
        "",
        "# A folder on the file system that all nodes share, for run directories and prepared data.",
        f"runs_dir: {runs}",
        "",
        "node:",
        f"  gpus_per_node: {chosen.gpus}",
        f"  # Known: {', '.join(GPUS)}. For another one set gpu_memory, in GiB.",
        f"  {model}{gpu_type}",
        f"  memory: {chosen.memory_mb // 1024}  # GiB of the host",
        "",
        "slurm:",
        f"  partition: {chosen.partition}" + (f"  # others: {others}" if others else ""),
        f"  {account}" + (f"  # yours: {', '.join(a for a, _ in known)}" if known and len(known) > 1 else ""),
        f"  time: {limit}  # the partition's limit is {chosen.time}",
        f"  cpus_per_task: {chosen.cpus}",
        "  # gpus_as: gres       # where --gpus-per-node is not accepted",
        "  # exclusive: true",
        "",
        "# network: {interface: ib0, bandwidth: 50}   # bandwidth of one node, GB/s",
        "",
        "# setup:                # shell lines before training; without any, the Python that runs distft is used",
        "#   - module load cuda",
        "#   - source /path/to/venv/bin/activate",
        "# max_requeues: 1       # queue again without nodes that fail the preflight",
        "",
    ]
    return re.sub(r"[^\w.-]", "-", settings.get("ClusterName") or "cluster"), "\n".join(lines)


def check(cluster: Cluster, nodes: int = 1) -> list[Check]:
    """Compare a profile with the cluster, for a job on so many nodes.

    Raises:
        SubmitError: SLURM does not answer.
    """
    listed = partitions()
    checks: list[Check] = []
    s, names = cluster.slurm, sorted({n.partition for n in listed})
    wanted = s.partition.split(",") if s.partition else [n.partition for n in listed if n.default]
    for name in wanted:
        checks.append(_one_of(f"partition {name}", name, names))
    mine = [n for n in listed if n.partition in wanted]
    if mine:
        down = not any(n.up for n in mine)
        checks += [(False, f"partition {', '.join(wanted)} is down")] if down else []
        gpus = max(n.gpus for n in mine)
        checks.append(_within("node.gpus_per_node", cluster.node.gpus_per_node, gpus, "GPUs per node"))
        if cluster.node.gpu_type:
            kinds = sorted({n.gpu_type for n in mine if n.gpu_type})
            checks.append(_one_of(f"node.gpu_type {cluster.node.gpu_type}", cluster.node.gpu_type, kinds))
        if s.cpus_per_task:
            cores = max(n.cpus for n in mine)
            checks.append(_within("slurm.cpus_per_task", s.cpus_per_task, cores, "cores per node"))
        if s.time:
            longest = max(mine, key=lambda n: minutes(n.time)).time
            ok = minutes(str(s.time)) <= minutes(longest)
            checks.append((ok, f"slurm.time {s.time}, the partition allows {longest}"))
        checks.append(_within("nodes", nodes, sum(n.count for n in mine if n.up), "nodes"))
    checks += _accounts(cluster)
    runs = Path(cluster.runs_dir)
    above = next(folder for folder in (runs, *runs.parents) if folder.exists())
    writable = os.access(above, os.W_OK)
    checks.append((writable, f"runs_dir {runs} {_where(runs, above, writable)}"))
    try:
        topology = Topology(nodes, cluster.node.gpus_per_node or 1)
        job = SlurmJob("check", RunDir(runs / "check"), topology, ("true",), {}, {}, cluster)
        checks.append((True, f"sbatch --test-only: {slurm.test_only(slurm.render(job))}"))
    except DistftError as error:
        checks.append((False, f"sbatch --test-only: {error}"))
    return checks


def _where(runs: Path, above: Path, writable: bool) -> str:
    if not writable:
        return f"cannot be written: you may not write to {above}"
    return "can be written from here" if above == runs else f"does not exist yet, and can be created in {above}"


def _within(what: str, got: int, most: int, of: str) -> Check:
    return got <= most, f"{what} {got}, the partition has {most} {of}"


def _one_of(what: str, name: str, names: list[str]) -> Check:
    if name in names:
        return True, what
    return False, f"{what}: not one of {', '.join(names)}" if names else f"{what}: the cluster lists none"


def _accounts(cluster: Cluster) -> list[Check]:
    known, s = accounts(), cluster.slurm
    if known is None:
        return [(None, "account and qos: this cluster has no accounting to ask")] if s.account or s.qos else []
    checks = []
    if s.account:
        checks.append(_one_of(f"slurm.account {s.account}", s.account, sorted({account for account, _ in known})))
    if s.qos:
        mine = {name for account, names in known if s.account in (None, account) for name in names.split(",")}
        checks.append(_one_of(f"slurm.qos {s.qos}", s.qos, sorted(mine)))
    return checks
