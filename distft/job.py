"""The job: everything that launch would write and start, before anything is written or started."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from distft import run_dir as names
from distft.loading import dump_recipe
from distft.planner.plan import Plan, plan_json
from distft.recipe import Recipe, ScriptSettings
from distft.run_dir import RunDir
from distft.strategies import merge
from distft.strategies.accelerate import accelerate_config
from distft.strategies.deepspeed import deepspeed_config, portable_config
from distft.torchrun import rank_environment, torchrun_argv


@dataclass(frozen=True)
class Job:
    """A run that has not started: `files` by name in the run directory, the command, and its extra environment."""

    name: str
    run: RunDir
    nnodes: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    files: Mapping[str, str]


def recipe_job(recipe: Recipe, plan: Plan, run: RunDir) -> Job:
    """The job that trains a recipe."""
    files = {names.RECIPE: dump_recipe(recipe)} | _config_files(plan, recipe, run)
    argv = torchrun_argv(plan.topology, run.path.name, "distft.train", [str(run.path)])
    return Job(recipe.name, run, plan.topology.nnodes, tuple(argv), rank_environment(plan.topology), files)


def script_job(settings: ScriptSettings, script: Sequence[str], plan: Plan, run: RunDir) -> Job:
    """The job that runs a script of one's own, unmodified, under the plan's strategy."""
    files = _config_files(plan, settings, run)
    argv = torchrun_argv(plan.topology, run.path.name, "distft.train.script", [str(run.path), *script])
    return Job(settings.name, run, plan.topology.nnodes, tuple(argv), rank_environment(plan.topology), files)


def _config_files(plan: Plan, settings: Recipe | ScriptSettings, run: RunDir) -> dict[str, str]:
    """plan.json, and what the strategy needs: accelerate.yaml, and ds_config.json under ZeRO."""
    files = {names.PLAN: json.dumps(plan_json(plan, settings.name), indent=1) + "\n"}
    zero = plan.strategy.startswith("zero")
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
    if isinstance(settings, Recipe):
        world_size = plan.topology.world_size
        return deepspeed_config(**common, world_size=world_size, recipe=settings, batch=plan.batch, model=plan.model)
    return merge(portable_config(**common), settings.deepspeed.overrides)
