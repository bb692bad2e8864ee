"""Variables with which processes see two GPUs that are not there (fake_cuda/sitecustomize.py): emulated."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from running import first_on_path

FOLDER = Path(__file__).parent / "fake_cuda"
sys.path.append(str(FOLDER))

RECORDS = "fake-cuda"  # in the folder that tests share: `decisions` and `backends`


def environment(records: Path) -> dict[str, str]:
    """For ranks that torchrun starts: warm ones have imported a torch without GPUs."""
    records.mkdir(exist_ok=True)
    return {
        **first_on_path(FOLDER),
        "DISTFT_WARM_ONLY": "torchrun",
        "PATH": os.pathsep.join([str(FOLDER / "bin"), os.environ["PATH"]]),
        "FAKE_CUDA": str(records),
        # Both hold every tensor on the CPU.
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "DS_ACCELERATOR": "cpu",
        # transformers loads in threads, and torch's function modes, which place tensors, are of one thread.
        "HF_DEACTIVATE_ASYNC_LOAD": "1",
    }


def summary(records: Path) -> list[str]:
    """How many of distft's decisions about GPUs were taken as on a GPU, and which were not."""
    import walked

    wanted = walked.all_decisions(Path(__file__).parents[1] / "distft")
    taken = wanted & set((records / "decisions").read_text().split())
    left = sorted(wanted - taken)
    return [f"{len(taken)} of {len(wanted)} decisions about GPUs", *(f"not taken: {place}" for place in left)]
