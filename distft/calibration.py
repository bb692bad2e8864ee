"""What an earlier run measured: beside its plan, and for the plans of later ones (`distft plan --calibrate RUN`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from distft.devices import known_gpu
from distft.errors import DistftError, PlanError
from distft.planner import speed
from distft.run_dir import RunDir, read_metrics

# The first steps compile kernels and fill caches.
WARM_UP = 3


@dataclass(frozen=True)
class Measured:
    """Of a run: tokens a second of all ranks (the median after the first steps), and the largest peak in bytes."""

    tokens_per_second: float
    peak_memory: int


def measured(run: RunDir) -> Measured | None:
    """None for a run that has made no step."""
    lines, _ = read_metrics(run.metrics)
    if not lines:
        return None
    speeds = sorted(line["tokens_per_second"] for line in lines[WARM_UP:] or lines)
    return Measured(speeds[len(speeds) // 2], max(line["peak_memory_bytes"] for line in lines))


def planned(run: RunDir) -> dict[str, Any]:
    """Its plan.json; {} where there is none that can be read."""
    try:
        found = json.loads(run.plan.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def flops_per_second(word: str, runs_dir: str, gpu: str | None) -> float:
    """What a rank of an earlier run computed a second, counting what checkpointing repeats.

    Args:
        word: a run directory, or a run's name in `runs_dir`.
        gpu: what the plan is for, as in plan.json.

    Raises:
        PlanError: there is no such run, it says too little, or it ran on something else.
    """
    try:
        run = RunDir.find(word, runs_dir)
    except DistftError as error:
        raise PlanError(f"--calibrate: {error}") from None
    found, plan = measured(run), planned(run)
    per_token = plan.get("time", {}).get("flops_per_token")
    if not found or not per_token:
        what = "it has made no step" if not found else "its plan.json has no time.flops_per_token"
        raise PlanError(f"--calibrate: {run.path} cannot be used: {what}")
    there = plan["topology"]["gpu"]
    if _usual_name(there) != _usual_name(gpu):
        raise PlanError(
            f"--calibrate: {run.path} ran on {there or 'the CPU'}, and this plan is for {gpu or 'the CPU'}; name that "
            "with --gpu, or another run"
        )
    # Communication is in it: a plan for another width adds its own to that, and errs on the slow side.
    per_rank = found.tokens_per_second / plan["topology"]["world_size"]
    trained = plan["model"]["trainable_parameters"] < plan["model"]["parameters"]
    return per_rank * per_token * speed.recomputed(trained, plan["gradient_checkpointing"])


def _usual_name(gpu: str | None) -> str | None:
    """nvidia-smi and profiles call the same GPU by different names."""
    return gpu and (known_gpu(gpu) or gpu)
