"""The speed of an earlier run, for a plan (`distft plan --calibrate RUN`)."""

from __future__ import annotations

from distft.config.document import load_yaml
from distft.config.loading import validate
from distft.config.recipe import Recipe
from distft.errors import DistftError, PlanError
from distft.hardware.devices import known_gpu
from distft.planner import speed
from distft.runs.directory import RunDir
from distft.runs.measured import measured, planned


def flops_per_second(word: str, runs_dir: str, gpu: str | None) -> float:
    """FLOP/s of a rank in an earlier run, including what gradient checkpointing repeats; of one that was compiled, as
    if it had not been.

    Args:
        word: a run directory, or a run's name in `runs_dir`.
        gpu: what the plan is for, as in plan.json.

    Raises:
        PlanError: there is no such run, too little is known about it, or it ran on another device.
    """
    try:
        run = RunDir.find(word, runs_dir)
    except DistftError as error:
        raise PlanError(f"--calibrate: {error}") from None
    found, plan = measured(run), planned(run)
    per_token = plan.get("time", {}).get("flops_per_token")
    if not found or not per_token:
        what = "it has completed no step" if not found else "its plan.json has no time.flops_per_token"
        raise PlanError(f"--calibrate: {run.path} cannot be used: {what}")
    there = plan["topology"]["gpu"]
    if _usual_name(there) != _usual_name(gpu):
        raise PlanError(
            f"--calibrate: {run.path} ran on {there or 'the CPU'}, and this plan is for {gpu or 'the CPU'}; set --gpu, "
            "or name another run"
        )
    # This includes communication: a plan for another world size adds its own to it, and errs on the slow side.
    per_rank = found.tokens_per_second / plan["topology"]["world_size"]
    recipe = validate(load_yaml(run.recipe, Recipe))
    again = speed.checkpointing_factor(recipe.lora is not None, plan["gradient_checkpointing"])
    return float(per_rank * per_token * again / (speed.compiled_factor(recipe) if known_gpu(there or "") else 1.0))


def _usual_name(gpu: str | None) -> str | None:
    """nvidia-smi and profiles call the same GPU by different names."""
    return gpu and (known_gpu(gpu) or gpu)
