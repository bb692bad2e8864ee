"""Topology → the torchrun command. One torchrun per node starts the ranks of the node."""

from __future__ import annotations

import os
from collections.abc import Sequence

from distft.hardware.topology import Topology

# Variables that every rank needs, whatever it trains.
RANK_ENVIRONMENT = {
    # Once tokenizers has run threads, forked data workers warn and fall back to this anyway.
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


def torchrun_argv(python: str, topology: Topology, module: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs `python -m module arguments...` as every rank of one node.

    On one node, --standalone picks a free port and a random rendezvous id, so that two runs never meet. On several, the
    job script sets PET_RDZV_ENDPOINT and PET_RDZV_ID: torchrun reads every option from such a variable.
    """
    ranks = [f"--nnodes={topology.nnodes}", f"--nproc-per-node={topology.nproc_per_node}", "--max-restarts=0"]
    rendezvous = "--standalone" if topology.nnodes == 1 else "--rdzv-backend=c10d"
    return [python, "-m", "torch.distributed.run", *ranks, rendezvous, "-m", module, *arguments]


def threads_here(topology: Topology) -> str:
    """OMP_NUM_THREADS on this machine: torchrun's default of one thread per rank leaves most of it idle."""
    return str(max(1, len(os.sched_getaffinity(0)) // topology.nproc_per_node))
