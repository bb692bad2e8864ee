"""`distft plan`: the plan of a recipe, its limits, and what would fit where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distft.config.loading import read_recipe
from distft.data import few_steps
from distft.jobs.planned import plan_any, with_packing
from distft.jobs.target import Target
from distft.planner import calibrate, limits
from distft.planner.plan import RecipePlan

# The GPU to plan for where neither --gpu nor --cluster names one: this machine's is used only when asked for.
USUAL_GPU = "H100"


@dataclass(frozen=True)
class Planned:
    """A plan and the limits around it; `would_fit` has changes that make a plan fit that does not."""

    plan: RecipePlan
    limits: limits.Limits
    would_fit: list[str]


def plan(
    path: str,
    sets: Sequence[str],
    target: Target,
    gpu: str | None = None,
    simulate: bool = False,
    calibrate_with: str | None = None,
) -> Planned:
    """Plan a recipe for a GPU, a cluster or this machine.

    Args:
        gpu: as for hardware.devices.named_device; None for the profile's, or USUAL_GPU.
        simulate: count the memory, of a model whose family is known too; needs torch.
        calibrate_with: a run whose speed is used.

    Raises:
        DistftError: the request is wrong.
    """
    assumed = gpu is None and not target.cluster
    target = replace(target, gpu=USUAL_GPU if assumed else gpu)
    loaded = read_recipe(path, sets, target.needed_files(for_launch=False))
    where = target.where()
    with loaded.placing_errors():
        recipe, unpacked = with_packing(loaded.recipe)
    measured = None
    if calibrate_with:
        name = where.device.name if where.device.type == "cuda" else None
        measured = calibrate.flops_per_second(calibrate_with, target.runs_dir(recipe), name)
    with loaded.placing_errors():
        made = plan_any(recipe, where, compare=True, measured=measured, simulate=simulate)
    if assumed:
        text = f"{USUAL_GPU}, because neither --gpu nor --cluster names a GPU; --gpu local is this machine's"
        made = replace(made, assumptions=(text, *made.assumptions))
    made = replace(made, warnings=(*loaded.notes, *unpacked, *few_steps.expected(recipe), *made.warnings))
    around = limits.limits(made.search, made.chosen)
    return Planned(made, around, [] if made.fits is not False else limits.would_fit(made.search))
