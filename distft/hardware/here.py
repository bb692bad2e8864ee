"""`python -m distft.hardware.here GPUS`: whether this machine has what a job script starts, before anything is started.

Without torch each rank would fail with a traceback of its own, and without GPUs it would train on the CPU.
"""

from __future__ import annotations

import sys

from distft import extras
from distft.errors import ClusterError, DistftError
from distft.hardware.devices import visible_gpus


def check(gpus: int) -> None:
    """
    Args:
        gpus: that the ranks of this node use; 0 for CPU ranks.

    Raises:
        MissingPartError: distft[train] is not installed.
        ClusterError: fewer GPUs.
    """
    extras.require()
    have = len(visible_gpus()) if gpus else 0
    if have < gpus:
        raise ClusterError(
            f"this job was planned for {gpus} GPU{'s' * (gpus > 1)} of a node, and {have} can be used here "
            "(nvidia-smi, CUDA_VISIBLE_DEVICES); plan it again on a machine like the one that trains"
        )


if __name__ == "__main__":
    try:
        check(int(sys.argv[1]))
    except DistftError as error:
        sys.exit(f"error: {error}")
