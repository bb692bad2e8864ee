"""`distft plan`: the plan of a recipe, its limits, and what would fit where it does not."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distft import extras
from distft.config.loading import read_recipe
from distft.config.recipe import Recipe
from distft.errors import PlanError
from distft.jobs.target import Target
from distft.models.shapes import ModelShape, read_model_shape
from distft.planner import calibrate, limits
from distft.planner.plan import RecipePlan, make_plan, refuse_other_kinds
from distft.planner.search import Where

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
        simulate: count the memory of the chosen candidate; needs torch.
        calibrate_with: a run whose speed is used.

    Raises:
        DistftError: the request is wrong.
    """
    loaded = read_recipe(path, sets)
    recipe = loaded.recipe
    assumed = gpu is None and not target.cluster
    where = replace(target, gpu=USUAL_GPU if assumed else gpu).where()
    measured = None
    if calibrate_with:
        name = where.device.name if where.device.type == "cuda" else None
        measured = calibrate.flops_per_second(calibrate_with, target.runs_dir(recipe), name)
    if simulate:
        made = _simulated(recipe, where, measured)
    else:
        made = make_plan(recipe, where, compare=True, measured=measured)
    if assumed:
        text = f"{USUAL_GPU}, because neither --gpu nor --cluster names a GPU; --gpu local is this machine's"
        made = replace(made, assumptions=(text, *made.assumptions))
    made = replace(made, warnings=(*loaded.notes, *made.warnings))
    around = limits.limits(made.search, made.chosen)
    return Planned(made, around, [] if made.fits else limits.would_fit(made.search))


def _simulated(recipe: Recipe, where: Where, measured: float | None) -> RecipePlan:
    """The plan with its memory counted; also for models whose config.json the planner does not know."""
    extras.require()
    # transformers and bitsandbytes warn about what does not matter here.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from distft.simulation.simulate import model_shape, simulate

    refuse_other_kinds(recipe, where)
    try:
        model: ModelShape = read_model_shape(recipe)
    except PlanError:
        model = model_shape(recipe)
    return make_plan(recipe, where, compare=True, count=simulate, model=model, measured=measured)
