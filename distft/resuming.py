"""A run that goes on: what of its recipe may change, and from where it continues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distft import checkpoints, launching, schedulers
from distft.checkpoints import Checkpoint
from distft.errors import ClusterError, RecipeError
from distft.launching import Launch
from distft.place import Place, plan_recipe
from distft.run_dir import CLUSTER, RunDir

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Resumption:
    """A launch of a run that has been, its newest checkpoint, and what --force let change, in words by dotted name."""

    launch: Launch
    newest: Checkpoint | None
    changed: dict[str, str]


def plan(run: RunDir, sets: Sequence[str], place: Place, force: bool = False, detach: bool = False) -> Resumption:
    """Plan how a run goes on. Nothing is written.

    Raises:
        RecipeError: it still runs, it is done, or what its checkpoint holds does not fit what is asked.
    """
    if not run.recipe.is_file():
        raise RecipeError(
            f"RUN: {run.path.name} is a script of one's own, which must resume by itself; launch it again"
        )
    state = schedulers.state_now(run).get("state")
    if state in ("queued", "running"):
        raise RecipeError(f"RUN: {run.path.name} is {state}; end it first with: distft cancel {run.path}")
    if state == "completed" and not sets:
        raise RecipeError(f"RUN: {run.path.name} is completed; to train on: --set training.max_steps=... --force")
    place = _place(run, place)
    recipe, planned = plan_recipe(str(run.recipe), sets, place, need_weights=True)
    if not force:
        launching.must_fit(planned)
    newest = next(iter(checkpoints.complete(run)), None)
    changed = checkpoints.differences(newest.manifest["identity"], checkpoints.identity(recipe)) if newest else {}
    fixed = {name: text for name, text in changed.items() if checkpoints.is_fixed(name)}
    if fixed or (changed and not force):
        lines = [f"{name}: {text}" for name, text in (fixed or changed).items()]
        mend = "launch a new run" if fixed else "--force goes on all the same"
        raise RecipeError("\n".join([*lines, f"{newest.path.name} of {run.path.name} belongs to other values; {mend}"]))
    return Resumption(Launch(recipe, planned, place, detach=detach, run=run), newest, changed)


def start(resumption: Resumption, console: Console) -> None:
    """Start it and follow it, as Launch.start does."""
    from distft.progress import say

    launch, newest = resumption.launch, resumption.newest
    say(console, [f"warning: {name} {text}" for name, text in resumption.changed.items()])
    if newest:
        before, width = newest.manifest["strategy"], newest.manifest["world_size"]
        say(console, [f"goes on after step {newest.step}, saved under {before} on {width} ranks"])
    else:
        say(console, ["no complete checkpoint: it begins anew"])
    launch.run.update_status(accepted=sorted(resumption.changed))
    launch.start(console)


def _place(run: RunDir, place: Place) -> Place:
    """Where it is to run: the cluster and the width that it had, unless others are given."""
    cluster = place.cluster
    if cluster is None and run.jobs():
        if not (run.path / CLUSTER).is_file():
            raise ClusterError(f"--cluster: {run.path.name} ran on a cluster; name its profile")
        from distft.cluster import load_cluster

        cluster = load_cluster(str(run.path / CLUSTER))
    had = json.loads(Path(run.plan).read_text())["topology"]
    nodes = place.nodes if place.nodes is not None else had["nnodes"]
    ranks = place.gpus_per_node if place.gpus_per_node is not None else had["nproc_per_node"]
    return replace(place, nodes=nodes, gpus_per_node=ranks, cluster=cluster)
