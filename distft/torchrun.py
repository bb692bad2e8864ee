"""Plan → the torchrun command. One torchrun a node starts the node's ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from distft.cluster import Topology


def torchrun_argv(topology: Topology, name: str, module: str, arguments: Sequence[str]) -> list[str]:
    """Start `python -m module arguments...` as every rank of one node; `name` is the rendezvous id of several.

    On one node, --standalone picks a free port and a random rendezvous id, so that two runs never meet.
    """
    ranks = [f"--nnodes={topology.nnodes}", f"--nproc-per-node={topology.nproc_per_node}", "--max-restarts=0"]
    rendezvous = ["--standalone"] if topology.nnodes == 1 else ["--rdzv-backend=c10d", f"--rdzv-id={name}"]
    return [sys.executable, "-m", "torch.distributed.run", *ranks, *rendezvous, "-m", module, *arguments]


def rank_environment(topology: Topology) -> dict[str, str]:
    """Variables that every rank needs whatever it trains."""
    cores = len(os.sched_getaffinity(0))
    return {
        # torchrun's own default is 1 thread a rank, which idles most of a machine.
        "OMP_NUM_THREADS": str(max(1, cores // topology.nproc_per_node)),
        # Forked data workers warn and fall back anyway once tokenizers has run threads.
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
