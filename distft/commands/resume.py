"""Resuming a run: what of its recipe may change, and from where it continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distft.commands.launch import RecipeLaunch, must_fit
from distft.errors import RecipeError
from distft.jobs.target import Target, plan_recipe, target_of
from distft.runs import checkpoints
from distft.runs.checkpoints import Checkpoint
from distft.runs.directory import RunDir
from distft.runs.status import State, update_status
from distft.schedulers import dispatch

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Resumption:
    """A planned resumption: its launch, its newest checkpoint, and what --force let change, in words by dotted name."""

    run: RunDir
    launch: RecipeLaunch
    newest: Checkpoint | None
    changed: dict[str, str]


def plan(run: RunDir, sets: Sequence[str], target: Target, force: bool = False, detach: bool = False) -> Resumption:
    """Plan how a run continues. Writes nothing.

    Raises:
        RecipeError: it is still running, it is done, or its checkpoint does not fit what was asked.
    """
    if not run.trains_recipe:
        raise RecipeError(f"RUN: {run.path.name} runs your own script, which must resume by itself; launch it again")
    status = dispatch.status_now(run)
    if status.damaged:
        raise RecipeError(f"RUN: {run.path.name}: {status.damaged}")
    if status.state and not status.finished:
        where = f" ({status.reason})" if status.reason else ""
        raise RecipeError(f"RUN: {run.path.name} is {status.state}{where}; end it first with: distft cancel {run.path}")
    target = target_of(run, target)
    recipe, planned = plan_recipe(str(run.recipe), sets, target, need_weights=True, for_launch=True)
    if not force:
        must_fit(planned)
    newest = next(iter(checkpoints.complete(run)), None)
    changed = checkpoints.changes(newest, recipe) if newest else {}
    if status.state is State.COMPLETED and not changed.keys() & {"training.max_steps", "training.num_train_epochs"}:
        raise RecipeError(f"RUN: {run.path.name} is completed; to train more: --set training.max_steps=... --force")
    if newest:
        _accept(run, newest, changed, force)
    return Resumption(run, RecipeLaunch(recipe, planned, target, detach=detach, run=run), newest, changed)


def _accept(run: RunDir, newest: Checkpoint, changed: dict[str, str], force: bool) -> None:
    """Raises RecipeError where the checkpoint belongs to other values, unless `force` can accept them."""
    fixed = {name: text for name, text in changed.items() if checkpoints.is_fixed(name)}
    if fixed or (changed and not force):
        lines = [f"{name}: {text}" for name, text in (fixed or changed).items()]
        fix = "launch a new run" if fixed else "--force continues anyway"
        raise RecipeError("\n".join([*lines, f"{newest.path.name} of {run.path.name} belongs to other values; {fix}"]))


def start(resumption: Resumption, console: Console) -> None:
    """Start it and follow it, as Launch.start does."""
    from distft.views.progress import say

    run, newest = resumption.run, resumption.newest
    say(console, [f"warning: {name} {text}" for name, text in resumption.changed.items()])
    if newest:
        strategy, ranks = newest.manifest["strategy"], newest.manifest["world_size"]
        say(console, [f"continues after step {newest.step}, saved under {strategy} on {ranks} rank{'s' * (ranks > 1)}"])
    else:
        say(console, ["no complete checkpoint: restarts from the beginning"])
    try:
        update_status(run, accepted=sorted(resumption.changed))
    except OSError as error:
        raise RecipeError(f"RUN: {run.path} cannot be written ({error.strerror})") from None
    resumption.launch.start(console)
