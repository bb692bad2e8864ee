"""The job: everything that launch would write and start, before anything is written or started."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from distft.config.document import dump_yaml
from distft.config.loading import dump_recipe
from distft.config.recipe import Recipe, ScriptSettings
from distft.hardware.topology import Topology
from distft.jobs.target import cluster_python
from distft.jobs.torchrun import RANK_ENVIRONMENT, threads_here, torchrun_argv
from distft.planner.plan import Plan, RecipePlan, ScriptPlan, plan_json
from distft.runs import directory as names
from distft.runs.directory import RunDir
from distft.strategies import merge
from distft.strategies.accelerate import accelerate_config
from distft.strategies.deepspeed import deepspeed_config, portable_config
from distft.strategies.kinds import KINDS

if TYPE_CHECKING:
    from distft.config.cluster import Cluster


@dataclass(frozen=True)
class Job:
    """A run that has not started: `files` by name in the run directory, the command, and its extra environment.

    With a `cluster` it is SLURM's; `after` is the job that must have ended well before.
    """

    name: str
    run: RunDir
    topology: Topology
    argv: tuple[str, ...]
    env: Mapping[str, str]
    files: Mapping[str, str]
    cluster: Cluster | None = None
    after: str | None = None


def recipe_job(
    recipe: Recipe, plan: RecipePlan, run: RunDir, cluster: Cluster | None = None, after: str | None = None
) -> Job:
    """The job that trains a recipe."""
    files = {names.RECIPE: dump_recipe(recipe)} | _config_files(plan, recipe, run)
    if cluster:
        files[names.CLUSTER] = dump_yaml(cluster)
    return _job(recipe.name, plan, run, "distft.train", [str(run.path)], files, cluster, after)


def script_job(
    settings: ScriptSettings,
    script: Sequence[str],
    plan: ScriptPlan,
    run: RunDir,
    cluster: Cluster | None = None,
    after: str | None = None,
) -> Job:
    """The job that runs a script of one's own, unmodified, under the plan's strategy."""
    files = _config_files(plan, settings, run)
    return _job(settings.name, plan, run, "distft.train.script", [str(run.path), *script], files, cluster, after)


def _job(
    name: str,
    plan: Plan,
    run: RunDir,
    module: str,
    arguments: Sequence[str],
    files: Mapping[str, str],
    cluster: Cluster | None,
    after: str | None,
) -> Job:
    if cluster is None:
        python, env = sys.executable, {"OMP_NUM_THREADS": threads_here(plan.topology)}
    else:
        # Prepared data lies where all nodes see it.
        python, env = cluster_python(cluster), {"DISTFT_CACHE": str(Path(cluster.runs_dir) / ".cache")}
    argv = torchrun_argv(python, plan.topology, module, arguments)
    return Job(name, run, plan.topology, tuple(argv), RANK_ENVIRONMENT | env, files, cluster, after)


def _config_files(plan: Plan, settings: Recipe | ScriptSettings, run: RunDir) -> dict[str, str]:
    """plan.json, and what the strategy needs: accelerate.yaml, and ds_config.json under ZeRO."""
    files = {names.PLAN: json.dumps(plan_json(plan, settings.name), indent=1) + "\n"}
    zero = KINDS[plan.strategy].engine == "deepspeed"
    if zero:
        files[names.DS_CONFIG] = json.dumps(_ds_config(plan, settings), indent=2) + "\n"
    config = accelerate_config(
        strategy=plan.strategy,
        offload=plan.offload,
        topology=plan.topology,
        shard_size=plan.shard_size,
        mixed_precision=plan.mixed_precision,
        device_type=plan.device.type,
        quantization=settings.model.quantization if isinstance(settings, Recipe) else None,
        ds_config_file=str(run.ds_config) if zero else None,
        overrides=settings.fsdp.overrides,
    )
    files[names.ACCELERATE] = yaml.safe_dump(config, sort_keys=False)
    return files


def _ds_config(plan: Plan, settings: Recipe | ScriptSettings) -> dict[str, Any]:
    common = {"strategy": plan.strategy, "offload": plan.offload, "device_type": plan.device.type}
    if isinstance(plan, RecipePlan):
        return deepspeed_config(
            **common,
            world_size=plan.topology.world_size,
            recipe=plan.recipe,
            batch=plan.batch,
            trainable_parameters=plan.model.trainable_parameters,
        )
    return merge(portable_config(**common), settings.deepspeed.overrides)
