"""HOW WIDE a job is. Kept apart from the cluster profile, whose pydantic models take a moment to build."""

from __future__ import annotations

from dataclasses import dataclass

from distft.errors import ClusterError


@dataclass(frozen=True)
class Topology:
    """`nnodes` machines with `nproc_per_node` ranks each."""

    nnodes: int
    nproc_per_node: int

    def __post_init__(self) -> None:
        for option, value in (("--nodes", self.nnodes), ("--gpus-per-node", self.nproc_per_node)):
            if value < 1:
                raise ClusterError(f"{option}: got {value}, need >= 1")

    @property
    def world_size(self) -> int:
        return self.nnodes * self.nproc_per_node
