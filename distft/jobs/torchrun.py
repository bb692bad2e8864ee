"""Plan → the torchrun command. One torchrun a node starts the node's ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence

from distft.hardware.topology import Topology

# Variables that every rank needs whatever it trains.
RANK_ENVIRONMENT = {
    # Forked data workers warn and fall back anyway once tokenizers has run threads.
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


def torchrun_argv(python: str, topology: Topology, module: str, arguments: Sequence[str]) -> list[str]:
    """Start `python -m module arguments...` as every rank of one node.

    On one node, --standalone picks a free port and a random rendezvous id, so that two runs never meet. Several get
    PET_RDZV_ENDPOINT and PET_RDZV_ID from the job script (torchrun reads every option from such a variable).
    """
    ranks = [f"--nnodes={topology.nnodes}", f"--nproc-per-node={topology.nproc_per_node}", "--max-restarts=0"]
    rendezvous = "--standalone" if topology.nnodes == 1 else "--rdzv-backend=c10d"
    return [python, "-m", "torch.distributed.run", *ranks, rendezvous, "-m", module, *arguments]


def threads_here(topology: Topology) -> str:
    """OMP_NUM_THREADS on this machine: torchrun's own default is 1 thread a rank, which idles most of it."""
    return str(max(1, len(os.sched_getaffinity(0)) // topology.nproc_per_node))
