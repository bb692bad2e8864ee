"""Where a job runs, and the plan for a recipe or a script there. Nothing here writes or starts anything."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distft import extras
from distft.config.document import Document
from distft.config.loading import DATA_FILES, read_recipe, validate
from distft.config.recipe import Recipe, ScriptSettings
from distft.data.reading import check_files, pinned
from distft.errors import ClusterError, DistftError, MissingPartError, RecipeError
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
from distft.jobs.planned import plan_any, with_packing
from distft.jobs.script import script_command
from distft.planner.plan import RecipePlan, ScriptPlan, script_plan
from distft.planner.search import Where
from distft.runs.directory import CLUSTER, RunDir
from distft.runs.status import job_ids
from distft.units import GIB

if TYPE_CHECKING:
    from distft.config.cluster import Cluster


@dataclass(frozen=True)
class Target:
    """Where a job runs: on a cluster or here, on so many nodes and ranks (None: the default of the place)."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    cluster: Cluster | None = None
    gpu: str | None = None  # plan for this GPU, whatever is there (devices.named_device)

    def topology(self) -> Topology:
        """Nodes and ranks, with defaults filled in."""
        if self.cluster is None and self.gpu in (None, "local"):
            return topology_here(self.nodes, self.gpus_per_node)
        ranks = self.gpus_per_node
        if ranks is None:
            ranks = (self.cluster.node.gpus_per_node if self.cluster else 1) or 1
        return Topology(self.nodes if self.nodes is not None else 1, ranks)

    def where(self) -> Where:
        """The topology, the device of one of its ranks, and what is known about network, host memory and price.

        Raises:
            ClusterError: such a topology is not available there.
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
        """Whether `launch` prepares the data, on this machine; otherwise the job does, on its first node."""
        if self.cluster is None:
            return True
        if cluster_python(self.cluster) != sys.executable:
            return False
        try:
            extras.require()
        except MissingPartError:  # a login node with the light part
            return False
        return True

    def needed_files(self, for_launch: bool = True) -> Sequence[str]:
        """The fields of a recipe whose files must be on this machine: those that a launch needs here, and all where
        nothing says that the recipe is for another machine."""
        if not for_launch:
            return DATA_FILES if self.cluster is None and self.gpu in (None, "local") else ()
        return DATA_FILES if self.prepares_data() else ("data.chat_template",)


HERE = Target()
CHECKED_ROWS = 10_000  # of each split, in less than a second


def cluster_python(cluster: Cluster) -> str:
    """The Python of the nodes."""
    return cluster.python or ("python" if cluster.setup or cluster.container else sys.executable)


def plan_recipe(
    path: str,
    sets: Sequence[str] = (),
    target: Target = HERE,
    need_weights: bool = False,
    for_launch: bool = False,
) -> tuple[Recipe, RecipePlan]:
    """Load and plan a recipe, and check the rows of its data that is on this machine: all problems at once.

    Args:
        need_weights: refuse a model without weights; planning alone needs only its config.json.
        for_launch: refuse data that is not on this machine where a launch would read it from here. Otherwise it is
            refused unless `target` is another machine; what is not refused is a warning of the plan.

    Raises:
        DistftError: the request is wrong.
    """
    wrong: list[DistftError] = []
    try:
        loaded = read_recipe(path, sets, target.needed_files(for_launch))
    except RecipeError as error:
        if error.loaded is None:
            raise
        loaded = error.loaded
        wrong.append(error)
    # A data set of the hub may change while a run goes on, so the run's recipe names its commit.
    recipe = pinned(loaded.recipe) if for_launch and target.prepares_data() and not wrong else loaded.recipe
    where = target.where()
    with _collecting(wrong), loaded.placing_errors():
        recipe, unpacked = with_packing(recipe)
        plan = plan_any(recipe, where, need_weights)
    if not any(isinstance(error, RecipeError) for error in wrong):
        # Where this machine prepares the data, or nothing is started, some rows are enough.
        whole = for_launch and not target.prepares_data() and not wrong
        with _collecting(wrong):
            data = check_files(recipe, None if whole else CHECKED_ROWS)
    if wrong:
        raise wrong[0] if len(wrong) == 1 else DistftError("\n".join(map(str, wrong)))
    return recipe, replace(plan, warnings=(*loaded.notes, *unpacked, *plan.warnings), data=tuple(data))


@contextmanager
def _collecting(wrong: list[DistftError]) -> Iterator[None]:
    """Lets what follows tell of its own problems too."""
    try:
        yield
    except DistftError as error:
        wrong.append(error)


def plan_script(
    script: Sequence[str], sets: Sequence[str] = (), target: Target = HERE
) -> tuple[ScriptSettings, ScriptPlan, tuple[str, ...]]:
    """The same for your own script; `script` is what stands after `--`.

    Raises:
        DistftError: the request is wrong.
    """
    command = script_command(script, here=target.cluster is None)
    document = Document("--set", ScriptSettings)
    for text in (f"name={json.dumps(command.name)}", *sets):  # quoted: a script may be called 1e3.py
        document.override(text)
    settings = validate(document)
    return settings, script_plan(settings, target.where()), command.words


def cluster_device(cluster: Cluster, nproc_per_node: int) -> Device:
    """The device of one rank on a cluster, as the profile describes it.

    Raises:
        ClusterError: more ranks than GPUs, or a GPU whose memory is unknown.
    """
    node = cluster.node
    if node.gpus_per_node == 0:
        host_memory = node.memory * GIB if node.memory else physical_memory()
        return Device("cpu", "cpu", int(host_memory // nproc_per_node), cores=cluster.slurm.cpus_per_task)
    if nproc_per_node > node.gpus_per_node:
        raise ClusterError(
            f"--gpus-per-node: got {nproc_per_node}, the profile's node.gpus_per_node is {node.gpus_per_node}"
        )
    known = known_gpu(node.gpu or "")
    gpu = GPUS[known] if known else None
    memory = node.gpu_memory or (gpu.memory if gpu else None)
    if memory is None:
        got = f"got {node.gpu}, which is not known" if node.gpu else "missing"
        raise ClusterError(f"node.gpu: {got}; give one of {', '.join(GPUS)}, or set node.gpu_memory (GiB)")
    return Device("cuda", known or node.gpu or "GPU", int(memory * GIB), gpu.compute_capability if gpu else None)


def allocated_cluster() -> Cluster:
    """The cluster of an allocation without a profile, as SLURM's variables and this machine show it.

    Raises:
        ClusterError: it has GPUs that are not visible from here (in salloc's shell on a login node).
    """
    from distft.config.cluster import Cluster, Node  # its models take a moment to build

    gpus = visible_gpus()
    if not gpus and int(os.environ.get("SLURM_GPUS_ON_NODE") or 0):
        raise ClusterError(
            "the GPUs of this allocation are not visible from here; describe them with --cluster PROFILE"
        )
    node = (
        Node(gpus_per_node=len(gpus), gpu=gpus[0].name, gpu_memory=gpus[0].memory / GIB)
        if gpus
        else Node(gpus_per_node=0)
    )
    return Cluster(runs_dir=str(Path("runs").absolute()), node=node, preflight=False)


def target_of(run: RunDir, target: Target) -> Target:
    """Where a run continues: on the cluster, nodes and ranks that it had, unless `target` names others.

    Raises:
        ClusterError: it ran on a cluster whose profile is not known.
    """
    cluster = target.cluster
    if cluster is None and job_ids(run):
        if not (run.path / CLUSTER).is_file():
            raise ClusterError(f"--cluster: {run.path.name} ran on a cluster; name its profile")
        from distft.config.cluster import load_cluster

        cluster = load_cluster(str(run.path / CLUSTER))
    had = json.loads(Path(run.plan).read_text())["topology"]
    nodes = target.nodes if target.nodes is not None else had["nnodes"]
    ranks = target.gpus_per_node if target.gpus_per_node is not None else had["nproc_per_node"]
    return replace(target, nodes=nodes, gpus_per_node=ranks, cluster=cluster)
