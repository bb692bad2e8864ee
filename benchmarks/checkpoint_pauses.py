"""For how long the write of a large checkpoint keeps a training thread from running: distft beside DCP's own writer.

    python benchmarks/checkpoint_pauses.py [--gigabytes 3] [--json]

Emulates a rank that only starts GPU kernels: the main thread asks for the interpreter every millisecond, while another
thread writes, flushes and (distft) reads back and checksums. Whatever it gets later than 20 ms is a pause. The copy
before the write holds up training as well: its seconds are those of this machine's memory, at the first save and at
those that use its buffers again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

TENSORS, LATE = 12, 0.02


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = measure(int(options.gigabytes * 1e9))
    if options.json:
        print(json.dumps(results))
        return
    print(f"{options.gigabytes:g} GB: copied in {results['copy']:.2f} s, again in {results['copy_again']:.2f} s")
    for name in ("distft", "DCP"):
        found = results[name]
        part = found["pauses"] / found["seconds"]
        print(
            f"{name:7} written in {found['seconds']:6.2f} s   training paused {found['pauses']:5.2f} s ({part:.1%}), "
            f"at most {found['longest']:.3f} s at once"
        )


def measure(size: int) -> dict[str, Any]:
    """Seconds of copies, and of both writers."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    from distft.train.checkpoint import Checkpointer
    from distft.train.ranges import Range, check_written, write_ranges

    live = {f"t{i}": torch.randn(size // 4 // TENSORS) for i in range(TENSORS)}
    holder: Any = SimpleNamespace(staged={})
    results: dict[str, Any] = {}
    for name in ("copy", "copy_again"):
        began = time.perf_counter()
        copies = {key: Checkpointer._copy(holder, key, tensor) for key, tensor in live.items()}
        results[name] = time.perf_counter() - began
    del live

    with tempfile.TemporaryDirectory(dir=".") as name:
        ours, theirs = Path(name, "ours"), Path(name, "theirs")
        ours.mkdir()
        ranges = {key: Range(tensor, 0, len(tensor)) for key, tensor in copies.items()}

        def of_distft() -> None:
            write_ranges(ranges, ours, 0)
            check_written(ranges, ours, 0)

        results["distft"] = paused(of_distft)
        writer = HuggingFaceStorageWriter(str(theirs), save_distributed=True)
        results["DCP"] = paused(lambda: save(copies, storage_writer=writer, no_dist=True))
    return results


def paused(write: Callable[[], object]) -> dict[str, float]:
    """Seconds of a write in a thread, and those in which this thread did not get the interpreter."""
    thread = threading.Thread(target=write)
    began = last = time.perf_counter()
    thread.start()
    pauses, longest = 0.0, 0.0
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest = max(longest, now - last)
        pauses += now - last if now - last > LATE else 0.0
        last = now
    return {"seconds": time.perf_counter() - began, "pauses": pauses, "longest": longest}


if __name__ == "__main__":
    main()
