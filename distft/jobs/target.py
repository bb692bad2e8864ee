"""Where a job is to run, and the plan for a recipe or a script there. Writes and starts nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distft import extras
from distft.config.document import Document
from distft.config.loading import DATA_FILES, read_recipe, validate
from distft.config.recipe import Recipe, ScriptSettings
from distft.data import rows
from distft.errors import ClusterError, MissingPartError, RecipeError
from distft.hardware.devices import (
    GPUS,
    Device,
    known_gpu,
    local_device,
    named_device,
    physical_memory,
    topology_here,
    visible_gpus,
)
from distft.hardware.topology import Topology
from distft.planner.plan import Plan, make_plan, script_plan
from distft.planner.search import Where
from distft.runs.directory import CLUSTER, RunDir
from distft.units import GIB

if TYPE_CHECKING:
    from distft.config.cluster import Cluster


@dataclass(frozen=True)
class Target:
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

    def prepares_data(self) -> bool:
        """Whether `launch` itself prepares the data, on this machine; else the job does it, on its first node."""
        if self.cluster is None:
            return True
        if cluster_python(self.cluster) != sys.executable:
            return False
        try:
            extras.require()
        except MissingPartError:  # a login node with the light part
            return False
        return True

    def needed_files(self) -> Sequence[str]:
        """Fields of a recipe whose files must be on this machine for a launch."""
        return DATA_FILES if self.prepares_data() else ("data.chat_template",)


HERE = Target()


def cluster_python(cluster: Cluster) -> str:
    """The Python of the nodes."""
    return cluster.python or ("python" if cluster.setup or cluster.container else sys.executable)


def plan_recipe(
    path: str, sets: Sequence[str] = (), target: Target = HERE, need_weights: bool = False, for_launch: bool = False
) -> tuple[Recipe, Plan]:
    """Load, plan, and check every row of the data that is on this machine.

    Args:
        need_weights: a plan takes the model's config.json alone; what is started needs its weights.
        for_launch: refuse data that is not here where the launch would read it from here; else that is a warning.

    Raises:
        DistftError: what is asked is wrong.
    """
    loaded = read_recipe(path, sets, target.needed_files() if for_launch else ())
    plan = make_plan(loaded.recipe, target.where(), need_weights)
    rows.check_files(loaded.recipe)
    return loaded.recipe, replace(plan, warnings=(*loaded.notes, *plan.warnings))


def plan_script(script: Sequence[str], sets: Sequence[str] = (), target: Target = HERE) -> tuple[ScriptSettings, Plan]:
    """The same for a script of one's own."""
    if not Path(script[0]).is_file():
        raise RecipeError(f"script: no such file: {script[0]}")
    document = Document("--set", ScriptSettings)
    for text in (f"name={Path(script[0]).stem}", *sets):
        document.override(text)
    settings = validate(document)
    return settings, script_plan(settings, target.where())


def cluster_device(cluster: Cluster, nproc_per_node: int) -> Device:
    """The device of one rank on a cluster, as its profile describes it.

    Raises:
        ClusterError: more ranks than GPUs, or a GPU whose memory is not known.
    """
    node = cluster.node
    if node.gpus_per_node == 0:
        memory = node.memory * GIB if node.memory else physical_memory()
        return Device("cpu", "cpu", int(memory // nproc_per_node), cores=cluster.slurm.cpus_per_task)
    if nproc_per_node > node.gpus_per_node:
        raise ClusterError(
            f"--gpus-per-node: got {nproc_per_node}, the profile's node.gpus_per_node is {node.gpus_per_node}"
        )
    known = known_gpu(node.gpu or "")
    memory, capability = GPUS[known][:2] if known else (node.gpu_memory, None)
    if memory is None:
        got = f"got {node.gpu}, which is not known" if node.gpu else "missing"
        raise ClusterError(f"node.gpu: {got}; give one of {', '.join(GPUS)}, or set node.gpu_memory (GiB)")
    return Device("cuda", known or node.gpu or "GPU", int((node.gpu_memory or memory) * GIB), capability)


def allocated_cluster() -> Cluster:
    """What an allocation without a profile is known to be, as `salloc` or `sbatch` and this machine show it.

    Raises:
        ClusterError: it has GPUs that cannot be seen from here (salloc's shell on a login node).
    """
    from distft.config.cluster import Cluster, Node  # its models take a moment to build

    gpus = visible_gpus()
    if not gpus and int(os.environ.get("SLURM_GPUS_ON_NODE") or 0):
        raise ClusterError(
            "the GPUs of this allocation cannot be seen from here; say what they are with --cluster PROFILE"
        )
    node = (
        Node(gpus_per_node=len(gpus), gpu=gpus[0].name, gpu_memory=gpus[0].memory / GIB)
        if gpus
        else Node(gpus_per_node=0)
    )
    return Cluster(runs_dir=str(Path("runs").absolute()), node=node, preflight=False)


def target_of(run: RunDir, target: Target) -> Target:
    """Where it is to run: the cluster and the width that it had, unless others are given."""
    cluster = target.cluster
    if cluster is None and run.jobs():
        if not (run.path / CLUSTER).is_file():
            raise ClusterError(f"--cluster: {run.path.name} ran on a cluster; name its profile")
        from distft.config.cluster import load_cluster

        cluster = load_cluster(str(run.path / CLUSTER))
    had = json.loads(Path(run.plan).read_text())["topology"]
    nodes = target.nodes if target.nodes is not None else had["nnodes"]
    ranks = target.gpus_per_node if target.gpus_per_node is not None else had["nproc_per_node"]
    return replace(target, nodes=nodes, gpus_per_node=ranks, cluster=cluster)
