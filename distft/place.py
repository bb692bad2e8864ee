"""Where a job is to run, and the plan for a recipe or a script there. Writes and starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distft import data_files
from distft.devices import GIB, cluster_device, local_device, named_device, physical_memory, topology_here
from distft.errors import RecipeError
from distft.loading import Document, load_recipe, validate
from distft.planner.plan import Plan, make_plan, script_plan
from distft.planner.search import Where
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
    gpu: str | None = None  # plan for this one, whatever is there: see devices.named_device

    def topology(self) -> Topology:
        """Nodes and ranks, with what was not asked for filled in."""
        if self.cluster is None and self.gpu in (None, "local"):
            return topology_here(self.nodes, self.gpus_per_node)
        ranks = self.gpus_per_node
        if ranks is None:
            ranks = (self.cluster.node.gpus_per_node if self.cluster else 1) or 1
        return Topology(self.nodes if self.nodes is not None else 1, ranks)

    def where(self) -> Where:
        """The topology, what one of its ranks computes on, and what is known of network, host and price.

        Raises:
            ClusterError: it cannot be had there.
        """
        topology, cluster = self.topology(), self.cluster
        ranks = topology.nproc_per_node
        if self.gpu is not None:
            device = named_device(self.gpu, ranks)
        else:
            device = cluster_device(cluster, ranks) if cluster else local_device(ranks)
        if cluster:
            host = int(cluster.node.memory * GIB) if cluster.node.memory and device.type == "cuda" else None
            return Where(topology, device, cluster.network.bandwidth, host, cluster.price_per_gpu_hour)
        host = None if self.gpu not in (None, "local") or device.type == "cpu" else physical_memory()
        return Where(topology, device, host_memory=host)

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
    plan = make_plan(recipe, place.where(), need_weights)
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
    return settings, script_plan(settings, place.where())
