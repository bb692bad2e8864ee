"""`distft doctor`: what works here, or on the nodes of a cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.commands.follow import follow
from distft.errors import ClusterError, RunError
from distft.jobs.job import SlurmJob
from distft.jobs.target import Target
from distft.runs import attempts
from distft.runs.directory import SBATCH, RunDir
from distft.schedulers import local, slurm

if TYPE_CHECKING:
    from rich.console import Console

Check = dict[str, str]  # name, state (ok | failed | missing | warning | absent), text
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def _check(name: str, state: str, text: str) -> Check:
    return {"name": name, "state": state, "text": text}


# ---- this machine


def this_machine() -> Iterator[Check]:
    """Every check of this machine, the quick ones first. One that raises has failed, and the others still run."""
    looks: dict[str, Callable[[], Iterable[Check]]] = {
        "python": _python,
        "distft[train]": _packages,
        "gpu": _gpus,
        "slurm": _slurm,
        "cache": _cache,
        "hub": _hub,
        "training": _training,
    }
    for name, look in looks.items():
        try:
            yield from look()
        except Exception as error:
            text = next(iter(str(error).strip().splitlines()), "")
            yield _check(name, "failed", f"{name}: {type(error).__name__}: {text}")


def _python() -> Iterator[Check]:
    import platform

    import distft

    yield _check("python", "ok", f"python {platform.python_version()} in {sys.prefix}")
    yield _check("distft", "ok", f"distft {distft.__version__} in {Path(distft.__file__).parent}")


def _packages() -> Iterator[Check]:
    """The packages of distft[train], from their metadata: nothing is imported."""
    from importlib import metadata

    from distft import extras

    missing = []
    for name, bounds in extras.requirements():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if extras.within(version, bounds):
            yield _check(name, "ok", f"{name} {version}")
        else:
            yield _check(name, "failed", f"{name} {version} (need {extras.describe(bounds)}): {extras.INSTALL}")
    if missing:
        yield _check("distft[train]", "missing", f"{', '.join(missing)}: {extras.INSTALL}")


def _gpus() -> Iterator[Check]:
    import subprocess

    from distft.hardware.devices import visible_gpus
    from distft.units import GIB

    try:
        gpus = visible_gpus()
    except ClusterError as error:
        yield _check("gpu", "failed", str(error))
        return
    for number, gpu in enumerate(gpus):
        yield _check("gpu", "ok", f"GPU {number}: {gpu.name}, {gpu.memory / GIB:.1f} GiB")
    if gpus:
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield _check("gpu", "absent", "CUDA_VISIBLE_DEVICES hides all GPUs: CPU ranks over gloo")
        return
    if shutil.which("nvidia-smi"):
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
        if done.returncode:
            text = next(iter((done.stdout + done.stderr).strip().splitlines()), f"exit status {done.returncode}")
            yield _check("gpu", "failed", f"nvidia-smi: {text}")
            return
    yield _check("gpu", "absent", "no NVIDIA GPU: CPU ranks over gloo")


def _slurm() -> Iterator[Check]:
    from distft.schedulers.slurm import client

    if not shutil.which("sbatch"):
        yield _check("slurm", "absent", "no SLURM commands: jobs run on this machine only")
        return
    version = client("sbatch", "--version", check=None)
    if "configuration source" in version.stderr:
        yield _check("slurm", "absent", "sbatch has no slurm.conf: jobs run on this machine only")
        return
    name = version.stdout.strip() or f"sbatch: exit status {version.returncode}"
    done = client("sinfo", "-h", "-o", "%R", check=None)
    if done.returncode:
        text = next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")
        yield _check("slurm", "failed", f"{name}: {text}")
    else:
        yield _check("slurm", "ok", f"{name}: partitions {', '.join(sorted({*done.stdout.split()})) or '(none)'}")


def _cache() -> Iterator[Check]:
    """Write to the folder of prepared data, or to the one that it will be created in."""
    import tempfile

    from distft.data.cache import cache_root
    from distft.diagnostics.checks import MIN_FREE
    from distft.units import GIB

    cache = cache_root()
    folder = next(path for path in (cache.absolute(), *cache.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"distft")
    except OSError as error:
        why = f"{folder} is not writable ({error.strerror})"
        yield _check("cache", "failed", f"cache {cache}: {why}; set DISTFT_CACHE to another folder")
        return
    free = shutil.disk_usage(folder).free
    yield _check("cache", "ok" if free >= MIN_FREE else "failed", f"cache {cache}: {free / GIB:.1f} GiB free")


def _hub() -> Iterator[Check]:
    """Only the names of variables: their values are secrets."""
    offline = [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    if offline:
        yield _check("hub", "ok", f"hub: offline, nothing is downloaded ({', '.join(offline)})")
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    file = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser()
    tokens = [*(name for name in TOKENS if os.environ.get(name)), *([str(file)] if file.is_file() else [])]
    if tokens:
        yield _check("hub token", "ok", f"hub token: found in {', '.join(tokens)}")
    else:
        yield _check("hub token", "absent", "no hub token: gated models and data cannot be downloaded")


def _training() -> Iterator[Check]:
    """The checks that need torch, in another process: the command line never imports it."""
    import subprocess

    if importlib.util.find_spec("torch") is None:
        return  # missing: _packages has reported it
    done = subprocess.run([sys.executable, "-m", "distft.diagnostics.doctor"], capture_output=True, text=True)
    if done.returncode:
        text = next(reversed(done.stderr.strip().splitlines()), "")
        yield _check("training", "failed", f"the checks ended with status {done.returncode}: {text}")
        return
    yield from json.loads(done.stdout)


# ---- the nodes of a cluster


def nodes(target: Target, console: Console) -> Iterator[Check]:
    """What the preflight found on the nodes of a cluster."""
    try:
        found = preflight(target, console)
    except RunError as error:
        yield _check("job", "failed", str(error))
        return
    for name, why in found["bad"].items():
        yield _check(name, "failed", f"{name}: {why}")
    for text in found["warnings"]:
        yield _check("warning", "warning", text)
    passed = [report for report in found["reports"] if found["nodes"][report["rank"]] not in found["bad"]]
    if passed:
        facts = [report["facts"] for report in passed]
        what = f"python {facts[0]['python']}, torch {facts[0]['torch']}"
        if facts[0]["device"] == "cuda":
            what += f", at least {min(fact['tflops'] for fact in facts):.0f} TFLOP/s"
        yield _check("nodes", "ok", f"{len(passed)} node{'s' * (len(passed) > 1)} passed ({what})")
    speeds = [pair["gb_per_s"] for report in passed for pair in report.get("pairs", ()) if "gb_per_s" in pair]
    if speeds:
        yield _check("network", "ok", f"all-reduce between neighbours: at least {min(speeds):.2f} GB/s")


def preflight(target: Target, console: Console) -> dict[str, Any]:
    """Check the nodes of a cluster in a job that does nothing else, and follow it.

    Returns:
        The job's logs/preflight.json: nodes, bad (name: why), warnings, reports.

    Raises:
        DistftError: nothing was started.
        RunError: the job ended without a word on which nodes are bad.
    """
    from distft.views.progress import say

    if target.cluster is None:
        raise ClusterError("--cluster: missing; the nodes to check are those of a profile or an allocation")
    cluster = target.cluster.model_copy(update={"preflight": True, "max_requeues": 0})
    run = RunDir.create(cluster.runs_dir, "doctor")
    job = SlurmJob("doctor", run, target.topology(), argv=(), env={}, files={}, cluster=cluster)
    ended = None
    try:
        if slurm.allocation():
            attempts.fill(run, {SBATCH: slurm.render(job)}, job.name)
            local.supervise(run)
        else:
            say(console, [f"job {slurm.submit(job)} is queued: {run.path}"])
            follow(run, console)
    except RunError as error:
        ended = error
    found = json.loads(run.preflight.read_text()) if run.preflight.exists() else {}
    if not found or (ended and not found["bad"]):
        raise ended or RunError(f"{run.script}: the job ran no preflight")
    return found
