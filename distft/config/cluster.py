"""WHERE: a site's profile. It never names a model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from distft.config.recipe import Group, NonEmpty, PositiveInt
from distft.errors import ClusterError, RecipeError

# A word of a #SBATCH line: no quotes, spaces, `#` or control characters.
Word = Annotated[
    str,
    StringConstraints(pattern=r"^[\w.,:@+=/&|*()\[\]%-]+$"),
    Field(json_schema_extra={"x-pattern": "without spaces or quotes"}),
]
Time = Annotated[
    str,
    StringConstraints(pattern=r"^\d+(:\d\d(:\d\d)?)?$|^\d+-\d\d?(:\d\d){0,2}$"),
    Field(json_schema_extra={"x-pattern": "such as 30 (minutes), 12:00:00 or 2-00:00:00 (days-hours)"}),
]
Variable = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"),
    Field(json_schema_extra={"x-pattern": "of letters, digits and `_`"}),
]


Flag = Annotated[
    str,
    StringConstraints(pattern=r"^-[^\n\r#]+$"),
    Field(json_schema_extra={"x-pattern": "that is a flag (--...) on one line"}),
]


class Slurm(Group):
    """Options of sbatch, by their own names."""

    partition: Word | None = None
    """Partition, or several separated by commas."""

    account: Word | None = None
    """Account to charge."""

    qos: Word | None = None
    """Quality of service."""

    reservation: Word | None = None
    """Reservation to run in."""

    constraint: Word | None = None
    """Node features: `h100`, `a100|h100`."""

    time: Time | PositiveInt | None = None
    """Time limit; a number is minutes. Default: the partition's."""

    mem: Word | Annotated[int, Field(ge=0)] | None = None
    """Memory per node: `200G`; a number is MB, and 0 is all of it."""

    cpus_per_task: PositiveInt | None = None
    """Cores per node (one task runs on each node)."""

    exclusive: bool = False
    """Ask for whole nodes."""

    gpus_as: Literal["gpus_per_node", "gres"] = "gpus_per_node"
    """How to ask for GPUs: `--gpus-per-node=8`, or `--gres=gpu:8` where the site wants that."""

    sbatch: list[Flag] = []
    """More flags, as on sbatch's command line: `["--mail-type=END"]`."""


class Node(Group):
    """What a node has."""

    gpus_per_node: Annotated[int, Field(ge=0)]
    """GPUs per node, and the default of --gpus-per-node. 0: ranks are CPU processes."""

    gpu: NonEmpty | None = None
    """Model of the GPUs: `H100`, `A100-40GB`, ... (GPUS in distft/hardware/devices.py)."""

    gpu_memory: Annotated[float, Field(gt=0)] | None = None
    """Memory of one GPU in GiB, for a model that is not in the list."""

    gpu_type: Word | None = None
    """Type of the GPUs in SLURM's gres, where a job must ask for it: `--gpus-per-node=h100:8`."""

    memory: Annotated[float, Field(gt=0)] | None = None
    """Host memory in GiB."""


class Network(Group):
    """The network between nodes."""

    interface: Word | None = None
    """Interface for NCCL and gloo (`ib0`, `eth1`). Default: their own choice."""

    bandwidth: Annotated[float, Field(gt=0)] | None = None
    """Bandwidth of one node in GB/s (400 Gb/s InfiniBand: 50)."""


class Container(Group):
    """For training inside a container."""

    runtime: Literal["pyxis", "apptainer"]
    """`pyxis`: srun --container-image (enroot); `apptainer`: apptainer exec."""

    image: NonEmpty
    """Image, as the runtime names it: a .sqsh or .sif file, or the address in a registry."""

    mounts: list[NonEmpty] = []
    """`HOST:CONTAINER` pairs. runs_dir is always mounted, at the same path."""


class Cluster(Group):
    """The profile of a site. Everything in it holds for all recipes."""

    runs_dir: NonEmpty
    """Where run directories are created: a folder on a file system that all nodes share. `~` and `$VARIABLES` are
    expanded on the submitting host."""

    node: Node
    slurm: Slurm = Slurm()
    network: Network = Network()
    container: Container | None = None

    python: NonEmpty | None = None
    """Python on the nodes. Default: the one that runs distft, or `python` with `setup` lines or a container."""

    setup: list[str] = []
    """Shell lines that run before the training, unchanged: `module load cuda`, `source .../bin/activate`."""

    env: dict[Variable, str] = {}
    """Environment variables of the job. Not for secrets: the job script contains them."""

    preflight: bool = True
    """Check all nodes for a few seconds before training."""

    max_requeues: Annotated[int, Field(ge=0)] = 0
    """How often a run may continue by itself, from its newest checkpoint: after the time limit, preemption or a fault,
    or on other nodes after some failed the preflight."""

    signal_seconds: Annotated[int, Field(ge=0, le=65535)] = 120
    """How many seconds before the time limit or preemption a run is told to save and stop. 0: never."""

    price_per_gpu_hour: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Price that plans are computed with, in any currency."""

    template: NonEmpty | None = None
    """Your own job template (`distft slurm template`), relative to the profile's folder."""

    @property
    def cache_dir(self) -> Path:
        """Prepared data, where all nodes see it."""
        return Path(self.runs_dir) / ".cache"


def profiles_dir() -> Path:
    """The folder in which profiles are found by name."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "distft" / "clusters"


def find_cluster(word: str) -> Path:
    """The file of a profile given by path or by name.

    Raises:
        ClusterError: there is no such profile.
    """
    from distft.config.paths import near
    from distft.config.schema_text import closest, did_you_mean

    path = Path(word).expanduser()
    if path.is_file():
        return path
    named = profiles_dir() / f"{word}.yaml"
    if "/" not in word and named.is_file():
        return named
    known = sorted(p.stem for p in profiles_dir().glob("*.yaml"))
    have = f"; {profiles_dir()} has {', '.join(known)}" if known else f"; {profiles_dir()} is empty"
    hint = did_you_mean(closest(word, known)) or near(path)
    raise ClusterError(f"--cluster: no such profile: {word}{hint}{have}")


def load_cluster(word: str, given: Mapping[str, str] = MappingProxyType({})) -> Cluster:
    """The profile given by path or by name, with the values of `given` (by dotted key) over it.

    Raises:
        ClusterError: there is no such profile, or all its problems at once.
    """
    from distft.config.document import load_yaml
    from distft.config.loading import validate
    from distft.config.paths import near

    path = find_cluster(word)
    try:
        document = load_yaml(path, Cluster)
        for key, value in given.items():
            document.override(f"{key}={value}", origin=f"--{key.removeprefix('slurm.')} {value}")
        template, runs_dir = document.get(("template",)), document.get(("runs_dir",))
        if isinstance(template, str) and template:
            file = (path.parent / Path(template).expanduser()).absolute()
            document.data["template"] = str(file)
            if not file.is_file():
                document.problem(("template",), f"no such file: {file}{near(file)}")
        if isinstance(runs_dir, str) and runs_dir:
            expanded = os.path.expandvars(os.path.expanduser(runs_dir))  # noqa: PTH111
            document.data["runs_dir"] = expanded
            if re.search(r"\$[\w{]", expanded):
                document.problem(("runs_dir",), f"got {runs_dir}, which has a variable that is not set here")
            elif not expanded.startswith("/"):
                document.problem(("runs_dir",), f"got {runs_dir}, need an absolute path that all nodes share")
        return validate(document)
    except RecipeError as error:
        raise ClusterError(str(error)) from None
