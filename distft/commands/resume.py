"""A run that goes on: what of its recipe may change, and from where it continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distft.commands.launch import Launch, must_fit
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
    """A launch of a run that has been, its newest checkpoint, and what --force let change, in words by dotted name."""

    launch: Launch
    newest: Checkpoint | None
    changed: dict[str, str]


def plan(run: RunDir, sets: Sequence[str], target: Target, force: bool = False, detach: bool = False) -> Resumption:
    """Plan how a run goes on. Nothing is written.

    Raises:
        RecipeError: it still runs, it is done, or what its checkpoint holds does not fit what is asked.
    """
    if not run.recipe.is_file():
        raise RecipeError(
            f"RUN: {run.path.name} is a script of one's own, which must resume by itself; launch it again"
        )
    status = dispatch.status_now(run)
    if status.state and not status.finished:
        raise RecipeError(f"RUN: {run.path.name} is {status.state}; end it first with: distft cancel {run.path}")
    target = target_of(run, target)
    recipe, planned = plan_recipe(str(run.recipe), sets, target, need_weights=True, for_launch=True)
    if not force:
        must_fit(planned)
    newest = next(iter(checkpoints.complete(run)), None)
    changed = checkpoints.changes(newest, recipe) if newest else {}
    if status.state is State.COMPLETED and not changed.keys() & {"training.max_steps", "training.num_train_epochs"}:
        raise RecipeError(f"RUN: {run.path.name} is completed; to train on: --set training.max_steps=... --force")
    fixed = {name: text for name, text in changed.items() if checkpoints.is_fixed(name)}
    if fixed or (changed and not force):
        lines = [f"{name}: {text}" for name, text in (fixed or changed).items()]
        mend = "launch a new run" if fixed else "--force goes on all the same"
        raise RecipeError("\n".join([*lines, f"{newest.path.name} of {run.path.name} belongs to other values; {mend}"]))
    return Resumption(Launch(recipe, planned, target, detach=detach, run=run), newest, changed)


def start(resumption: Resumption, console: Console) -> None:
    """Start it and follow it, as Launch.start does."""
    from distft.views.progress import say

    launch, newest = resumption.launch, resumption.newest
    say(console, [f"warning: {name} {text}" for name, text in resumption.changed.items()])
    if newest:
        before, width = newest.manifest["strategy"], newest.manifest["world_size"]
        say(console, [f"goes on after step {newest.step}, saved under {before} on {width} rank{'s' * (width > 1)}"])
    else:
        say(console, ["no complete checkpoint: it begins anew"])
    try:
        update_status(launch.run, accepted=sorted(resumption.changed))
    except OSError as error:
        raise RecipeError(f"RUN: {launch.run.path} cannot be written ({error.strerror})") from None
    launch.start(console)
