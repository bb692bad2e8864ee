"""What makes a job need less GPU memory, after it ran out of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distft.errors import DistftError
from distft.jobs.job import recipe_workload
from distft.jobs.target import Target, plan_recipe, target_of
from distft.runs.directory import RunDir
from distft.strategies.kinds import KINDS


@dataclass(frozen=True)
class Change:
    """What to change, in words, and the files of the run that it replaces, by name."""

    text: str
    files: Mapping[str, str]


def less_memory(run: RunDir) -> Change | None:
    """What makes a run need less GPU memory with the same global batch. Writes nothing.

    First FSDP2 reshards after the forward pass, then a smaller micro-batch, then gradient checkpointing, then offload;
    None when all of that is used up.
    """
    plan = json.loads(run.plan.read_text())
    batch, topology, strategy = plan["batch"], plan["topology"], plan["strategy"]
    micro, share = batch["micro_batch_size"], batch["global_batch_size"] // topology["world_size"]
    sets: dict[str, Any] = {
        "training.micro_batch_size": micro,
        "training.gradient_checkpointing": plan["gradient_checkpointing"],
        "parallelism.strategy": strategy,
        "parallelism.offload": plan["offload"],
    }
    change: dict[str, Any]
    resharding = plan.get("reshard_after_forward")
    if resharding is not None:  # else a smaller micro-batch could turn it off
        sets["fsdp.overrides.fsdp_reshard_after_forward"] = resharding
    if resharding is False:
        change = {"fsdp.overrides.fsdp_reshard_after_forward": True}
    elif micro > 1:
        smaller = max(n for n in range(1, micro // 2 + 1) if share % n == 0)
        change = {"training.micro_batch_size": smaller}
    elif not plan["gradient_checkpointing"]:
        change = {"training.gradient_checkpointing": True}
    elif plan["offload"] == "none":
        change = {"parallelism.offload": "all" if "all" in KINDS[strategy].offloads else "optimizer"}
        if not KINDS[strategy].offloads:
            change["parallelism.strategy"] = "zero2"
    else:
        return None
    words = [f"{name}={json.dumps(value)}" for name, value in (sets | change).items()]
    try:
        target = target_of(run, Target())
        recipe, planned = plan_recipe(str(run.recipe), words, target)
        files = recipe_workload(recipe, planned, run).files
    except DistftError:  # a rule: no offload with this model; or files that the profile names are not visible here
        return None
    text = ", ".join(f"{name}: {sets[name]} -> {json.dumps(value)}" for name, value in change.items())
    return Change(text, files)
