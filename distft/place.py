"""Where a job is to run, and the plan for a recipe or a script there. Writes and starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distft import data_files
from distft.devices import Device, cluster_device, local_device, topology_here
from distft.errors import RecipeError
from distft.loading import Document, load_recipe, validate
from distft.planner.plan import Plan, make_plan, script_plan
from distft.recipe import Recipe, ScriptSettings
from distft.topology import Topology

if TYPE_CHECKING:
    from distft.cluster import Cluster


@dataclass(frozen=True)
class Place:
    """Where a job is to run: nodes and ranks as asked for (None: the place's own), on a cluster or here."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    cluster: Cluster | None = None

    def topology(self) -> Topology:
        """Nodes and ranks, with what was not asked for filled in."""
        if self.cluster is None:
            return topology_here(self.nodes, self.gpus_per_node)
        ranks = self.gpus_per_node if self.gpus_per_node is not None else self.cluster.node.gpus_per_node or 1
        return Topology(self.nodes if self.nodes is not None else 1, ranks)

    def devices(self) -> tuple[Topology, Device]:
        """The topology, and what one of its ranks computes on.

        Raises:
            ClusterError: it cannot be had there.
        """
        topology = self.topology()
        if self.cluster is None:
            return topology, local_device(topology.nproc_per_node)
        return topology, cluster_device(self.cluster, topology.nproc_per_node)

    def runs_dir(self, settings: Recipe | ScriptSettings) -> str:
        return self.cluster.runs_dir if self.cluster else settings.output_dir


HERE = Place()


def plan_recipe(
    path: str, sets: Sequence[str] = (), place: Place = HERE, need_weights: bool = False
) -> tuple[Recipe, Plan]:
    """Load, plan, and check every row of the data that lies here.

    A plan takes the model's config.json alone; what is to be started needs its weights.
    """
    recipe = load_recipe(path, sets)
    network = place.cluster.network if place.cluster else None
    plan = make_plan(recipe, *place.devices(), need_weights, bandwidth=network and network.bandwidth)
    data_files.check_files(recipe)
    return recipe, plan


def plan_script(script: Sequence[str], sets: Sequence[str] = (), place: Place = HERE) -> tuple[ScriptSettings, Plan]:
    """The same for a script of one's own."""
    if not Path(script[0]).is_file():
        raise RecipeError(f"script: no such file: {script[0]}")
    document = Document("--set", ScriptSettings)
    for text in (f"name={Path(script[0]).stem}", *sets):
        document.override(text)
    settings = validate(document)
    return settings, script_plan(settings.parallelism, settings.training.mixed_precision, *place.devices(), settings)
