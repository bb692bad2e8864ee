"""A run that goes on: what of its recipe may change, and from where it continues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distft import checkpoints, launching, schedulers
from distft.checkpoints import Checkpoint
from distft.errors import ClusterError, DistftError, RecipeError
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
    place = _place(run, place)
    recipe, planned = plan_recipe(str(run.recipe), sets, place, need_weights=True)
    if not force:
        launching.must_fit(planned)
    newest = next(iter(checkpoints.complete(run)), None)
    changed = checkpoints.differences(newest.manifest["identity"], checkpoints.identity(recipe)) if newest else {}
    if state == "completed" and not changed.keys() & {"training.max_steps", "training.num_train_epochs"}:
        raise RecipeError(f"RUN: {run.path.name} is completed; to train on: --set training.max_steps=... --force")
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
        say(console, [f"goes on after step {newest.step}, saved under {before} on {width} rank{'s' * (width > 1)}"])
    else:
        say(console, ["no complete checkpoint: it begins anew"])
    try:
        launch.run.update_status(accepted=sorted(resumption.changed))
    except OSError as error:
        raise RecipeError(f"RUN: {launch.run.path} cannot be written ({error.strerror})") from None
    launch.start(console)


def less_memory(run: RunDir) -> str | None:
    """Have a run that ran out of GPU memory need less of it, with the same global batch, and say what was changed.

    First a smaller micro-batch, then gradient checkpointing, then offload; None when all that is used up. Recipe, plan
    and configs in the run directory are written anew.
    """
    plan = json.loads(run.plan.read_text())
    batch, topology, strategy = plan["batch"], plan["topology"], plan["strategy"]
    micro, share = batch["micro_batch_size"], batch["global_batch_size"] // topology["world_size"]
    sets = {
        "training.micro_batch_size": micro,
        "training.gradient_checkpointing": plan["gradient_checkpointing"],
        "parallelism.strategy": strategy,
        "parallelism.offload": plan["offload"],
    }
    if micro > 1:
        smaller = max(n for n in range(1, micro // 2 + 1) if share % n == 0)
        change = {"training.micro_batch_size": smaller}
    elif not plan["gradient_checkpointing"]:
        change = {"training.gradient_checkpointing": True}
    elif plan["offload"] == "none":
        change = {"parallelism.offload": "all" if strategy in ("zero3", "fsdp", "hsdp") else "optimizer"}
        if strategy == "ddp":
            change["parallelism.strategy"] = "zero2"
    else:
        return None
    words = [f"{name}={json.dumps(value)}" for name, value in (sets | change).items()]
    try:
        place = _place(run, Place())
        recipe, planned = plan_recipe(str(run.recipe), words, place)
        files = Launch(recipe, planned, place, run=run).job(run).files
    except DistftError:  # a rule: no offload with this model; or what the profile names is not to be seen from here
        return None
    run.write(files)
    return ", ".join(f"{name}: {sets[name]} -> {json.dumps(value)}" for name, value in change.items())


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
