"""The plan of a recipe: by formula for the families that are known, counted on fake tensors for all others."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

from distft import extras
from distft.config.recipe import Recipe
from distft.errors import MissingPartError, PlanError, SimulationError
from distft.models.architecture import is_known
from distft.models.shapes import ModelShape, read_config, read_model_shape
from distft.planner.memory import Estimates
from distft.planner.plan import RecipePlan, make_plan, refuse_other_kinds
from distft.planner.search import Where


def plan_any(
    recipe: Recipe,
    where: Where,
    need_weights: bool = False,
    *,
    compare: bool = False,
    measured: float | None = None,
    simulate: bool = False,
) -> RecipePlan:
    """As planner.plan.make_plan. What is not known here is counted where distft[train] is installed, in some seconds;
    elsewhere, and for a model that cannot be counted, the plan says that it guesses.

    Args:
        simulate: count a known family too.

    Raises:
        DistftError: the request is wrong.
    """
    refuse_other_kinds(recipe, where)
    known = is_known(read_config(recipe))
    if known and not simulate:
        return make_plan(recipe, where, need_weights, compare=compare, measured=measured)
    if need_weights:
        read_model_shape(recipe, need_weights)
    model: ModelShape | None = None
    try:
        extras.require()
        # transformers and bitsandbytes warn about what does not matter here, and torch logs errors that are caught.
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        from distft.simulation.simulate import Counted

        counted = Counted(recipe)
        model = counted.model

        def estimate(wanted: Recipe, _: ModelShape) -> Estimates:
            return counted if wanted is recipe else Counted(wanted)

        return make_plan(recipe, where, compare=compare, measured=measured, model=model, estimate=estimate)
    except (MissingPartError, SimulationError) as error:
        if simulate:
            raise
        if model is None:
            try:
                model = read_model_shape(recipe)
            except PlanError:
                if isinstance(error, SimulationError):
                    raise error from None
                raise
        made = make_plan(recipe, where, compare=compare, measured=measured, model=model)
        return replace(made, warnings=(*made.warnings, f"the memory could not be counted: {error}"))
    finally:
        logging.disable(logging.NOTSET)
