"""The plan of a recipe: by formula for the families that are known, counted on fake tensors for all others."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

from distft import extras
from distft.config.recipe import Recipe
from distft.errors import MissingPartError, PlanError, SimulationError
from distft.models.architecture import is_known
from distft.models.kinds import has_own_code
from distft.models.packing import why_mixed
from distft.models.shapes import ModelShape, check_stored, read_config, read_model_shape
from distft.planner.counting import Counted, Counts
from distft.planner.kept_counts import Kept
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
    else:
        check_stored(recipe)
    model: ModelShape | None = None
    # transformers and bitsandbytes warn about what does not matter here, and torch logs errors that are caught.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            counts = Kept(recipe, lambda: _count(recipe))
            model = counts.model

            def estimate(wanted: Recipe, _: ModelShape) -> Counted:
                return Counted(wanted, counts if wanted is recipe else Kept(wanted, lambda: _count(wanted)))

            return make_plan(recipe, where, compare=compare, measured=measured, model=model, estimate=estimate)
        except (MissingPartError, SimulationError) as error:
            why = error
        finally:
            logging.disable(logging.NOTSET)
    if simulate:
        raise why
    if model is None:
        try:
            model = read_model_shape(recipe)
        except PlanError:
            if isinstance(why, SimulationError):
                raise why from None
            raise
    made = make_plan(recipe, where, compare=compare, measured=measured, model=model)
    return replace(made, warnings=(*made.warnings, f"the memory could not be counted: {why}"))


def with_packing(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with true or false for `data.packing: auto`, and warnings: that rows are not packed, and why.

    Rows are packed where the model keeps them apart under every attention, so that the same rows make a step wherever
    the recipe runs.

    Raises:
        PlanError: as read_config.
        MissingPartError: likewise.
    """
    if recipe.data.packing != "auto":
        return recipe, ()
    config = read_config(recipe)
    why = why_mixed(str(config.get("model_type") or ""))
    if recipe.model.trust_remote_code and has_own_code(config):
        why = "the model's own code may let attention cross from one document to the next"
    settled = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": not why})})
    said = "rows are not packed, so training.global_batch_size counts them as they are in the data"
    return settled, (f"data.packing: auto: {said}: {why}",) if why else ()


def _count(recipe: Recipe) -> Counts:
    """Raises MissingPartError without distft[train], and SimulationError where the model cannot be counted."""
    extras.require()
    from distft.simulation.simulate import Traced

    return Traced(recipe)
