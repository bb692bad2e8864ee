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
    """A run that has not started: its `files` by name in the run directory, its command, and its extra environment.

    With a `cluster`, SLURM runs it; `after` is the job that must have succeeded before it starts.
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
    ds_config = None
    if KINDS[plan.strategy].engine == "deepspeed":
        ds_config = deepspeed_config(
            strategy=plan.strategy,
            offload=plan.offload,
            device_type=plan.device.type,
            world_size=plan.topology.world_size,
            recipe=recipe,
            batch=plan.batch,
            trainable_parameters=plan.model.trainable_parameters,
        )
    files = {names.RECIPE: dump_recipe(recipe)}
    files |= _config_files(plan, recipe.name, run, ds_config, recipe.fsdp.overrides, recipe.model.quantization)
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
    """The job that runs the user's own script, unmodified, under the plan's strategy."""
    ds_config = None
    if KINDS[plan.strategy].engine == "deepspeed":
        portable = portable_config(strategy=plan.strategy, offload=plan.offload, device_type=plan.device.type)
        ds_config = merge(portable, settings.deepspeed.overrides)
    files = _config_files(plan, settings.name, run, ds_config, settings.fsdp.overrides)
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
        # Prepared data goes where all nodes see it.
        python, env = cluster_python(cluster), {"DISTFT_CACHE": str(Path(cluster.runs_dir) / ".cache")}
    argv = torchrun_argv(python, plan.topology, module, arguments)
    return Job(name, run, plan.topology, tuple(argv), RANK_ENVIRONMENT | env, files, cluster, after)


def _config_files(
    plan: Plan,
    name: str,
    run: RunDir,
    ds_config: dict[str, Any] | None,
    fsdp_overrides: dict[str, Any],
    quantization: str | None = None,
) -> dict[str, str]:
    """plan.json, accelerate.yaml and, for DeepSpeed, ds_config.json."""
    config = accelerate_config(
        strategy=plan.strategy,
        offload=plan.offload,
        topology=plan.topology,
        shard_size=plan.shard_size,
        mixed_precision=plan.mixed_precision,
        device_type=plan.device.type,
        quantization=quantization,
        ds_config_file=str(run.ds_config) if ds_config else None,
        overrides=fsdp_overrides,
    )
    files = {
        names.PLAN: json.dumps(plan_json(plan, name), indent=1) + "\n",
        names.ACCELERATE: yaml.safe_dump(config, sort_keys=False),
    }
    if ds_config:
        files[names.DS_CONFIG] = json.dumps(ds_config, indent=2) + "\n"
    return files
