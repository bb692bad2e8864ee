"""The job: everything that launch would write and start, before anything is written or started."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from distft.strategies.accelerate import accelerate_config, needs
from distft.strategies.deepspeed import deepspeed_config, portable_config
from distft.strategies.kinds import KINDS

if TYPE_CHECKING:
    from distft.config.cluster import Cluster


@dataclass(frozen=True)
class Workload:
    """What every rank runs, and the files for it by name in the run directory. The same on any machine."""

    name: str
    topology: Topology
    module: str
    arguments: tuple[str, ...]
    files: Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """A run that has not started: its `files` by name in the run directory, its command, and its extra environment."""

    name: str
    run: RunDir
    topology: Topology
    argv: tuple[str, ...]
    env: Mapping[str, str]
    files: Mapping[str, str]

    @property
    def trains_recipe(self) -> bool:
        """As RunDir.trains_recipe, before anything is written."""
        return names.RECIPE in self.files


@dataclass(frozen=True)
class SlurmJob(Job):
    """A job for a cluster. `after`: SLURM's id of the job that must have completed before."""

    cluster: Cluster
    after: str | None = None


def recipe_workload(recipe: Recipe, plan: RecipePlan, run: RunDir) -> Workload:
    """Training a recipe."""
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
    files |= _config_files(
        plan,
        recipe.name,
        run,
        ds_config,
        recipe.fsdp.overrides,
        quantization=recipe.model.quantization,
        # Without float32 masters the ranks' model is bf16 by itself; accelerate would make it float32 again.
        mixed_precision="no" if recipe.training.is_pure_bf16 else plan.mixed_precision,
    )
    return Workload(recipe.name, plan.topology, "distft.train", (str(run.path),), files)


def script_workload(settings: ScriptSettings, script: Sequence[str], plan: ScriptPlan, run: RunDir) -> Workload:
    """Running the user's own script, unmodified, under the plan's strategy."""
    ds_config = None
    if KINDS[plan.strategy].engine == "deepspeed":
        portable = portable_config(strategy=plan.strategy, offload=plan.offload, device_type=plan.device.type)
        ds_config = merge(portable, settings.deepspeed.overrides)
    files = _config_files(
        plan, settings.name, run, ds_config, settings.fsdp.overrides, mixed_precision=plan.mixed_precision
    )
    return Workload(settings.name, plan.topology, "distft.train.script", (str(run.path), *script), files)


def local_job(work: Workload, run: RunDir) -> Job:
    """The job that runs on this machine."""
    env = RANK_ENVIRONMENT | {"OMP_NUM_THREADS": threads_here(work.topology)}
    return Job(work.name, run, work.topology, _argv(sys.executable, work), env, work.files)


def slurm_job(work: Workload, run: RunDir, cluster: Cluster, after: str | None = None) -> SlurmJob:
    """The job that runs on a cluster."""
    env = RANK_ENVIRONMENT | {"DISTFT_CACHE": str(cluster.cache_dir)}
    files = dict(work.files)
    if names.RECIPE in files:  # `distft resume` reads the profile
        files[names.CLUSTER] = dump_yaml(cluster)
    argv = _argv(cluster_python(cluster), work)
    return SlurmJob(work.name, run, work.topology, argv, env, files, cluster, after)


def _argv(python: str, work: Workload) -> tuple[str, ...]:
    return tuple(torchrun_argv(python, work.topology, work.module, work.arguments))


def _config_files(
    plan: Plan,
    name: str,
    run: RunDir,
    ds_config: dict[str, Any] | None,
    fsdp_overrides: dict[str, Any],
    *,
    mixed_precision: str,
    quantization: str | None = None,
) -> dict[str, str]:
    """plan.json, accelerate.yaml and, for DeepSpeed, ds_config.json."""
    config = accelerate_config(
        strategy=plan.strategy,
        offload=plan.offload,
        topology=plan.topology,
        shard_size=plan.shard_size,
        mixed_precision=mixed_precision,
        device_type=plan.device.type,
        quantization=quantization,
        reshard_after_forward=plan.reshard_after_forward,
        ds_config_file=str(run.ds_config) if ds_config else None,
        overrides=fsdp_overrides,
    )
    files = {
        names.PLAN: json.dumps(plan_json(plan, name), indent=1) + "\n",
        names.ACCELERATE: needs(config) + yaml.safe_dump(config, sort_keys=False),
    }
    if ds_config:
        files[names.DS_CONFIG] = json.dumps(ds_config, indent=2) + "\n"
    return files
