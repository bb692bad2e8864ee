"""All-reduces in processes of their own, which are ended at a deadline.

NCCL's watchdog ends the process whose collective fails, and a communicator that is being made can hang for ever:
neither may take the report of the node with it. The processes are forked before this one touches a GPU.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from distft.errors import first_line
from distft.runs.processes import die_with_parent

Report = dict[str, Any]
Send = Callable[[Report], None]
LIMIT = timedelta(seconds=60)  # of what is ended at a deadline anyway


class Trial:
    """A process that waits for its arguments, and then calls `target(send, *arguments)`."""

    def __init__(self, target: Callable[..., None]):
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(target, theirs, self.pipe), daemon=True)
        self.process.start()
        theirs.close()
        self.began = 0.0

    def begin(self, *arguments: Any) -> None:
        """Give it its arguments."""
        self.began = time.monotonic()
        with contextlib.suppress(OSError):  # it has ended
            self.pipe.send(arguments)

    def result(self, seconds: float) -> Report:
        """`gb_per_s`, or `error`, `seconds` after it began at most."""
        found: Report = {}
        deadline = self.began + seconds
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll(max(0.0, deadline - time.monotonic())):
                found |= self.pipe.recv()
        self.process.join(0.2)
        code = self.process.exitcode
        self.process.kill()
        why = found.pop("error", None)
        if why is None and "done" not in found:
            why = f"no answer in {seconds:.0f} s" if code is None else f"its process ended with {_status(code)}"
        if why is not None:
            return {"error": f"{found['doing']}: {why}" if "doing" in found else why}
        return {"gb_per_s": found["gb_per_s"]}


def _status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def _run(target: Callable[..., None], pipe: Any, other_end: Any) -> None:
    die_with_parent()
    other_end.close()
    try:
        arguments = pipe.recv()
    except EOFError:
        os._exit(0)
    try:
        target(pipe.send, *arguments)
        pipe.send({"done": True})
    except Exception as error:
        pipe.send({"error": first_line(error)[:200]})
    os._exit(0)  # a destructor may wait for peers


def with_peer(
    send: Send, head: str, port: int, name: str, rank: int, backends: Sequence[str], variables: dict[str, str]
) -> None:
    """All-reduces of two nodes over each backend: `gb_per_s` of the last one, in each direction.

    Args:
        head, port: of a TCPStore.
        rank: in the pair.
        variables: of the environment.
    """
    import torch.distributed as dist

    os.environ |= variables
    tcp: Any = dist.TCPStore  # type: ignore[attr-defined]  # both are public, and not re-exported explicitly
    prefix: Any = dist.PrefixStore  # type: ignore[attr-defined]
    store = tcp(head, port, None, is_master=False, timeout=LIMIT)
    for backend in backends:
        send({"doing": f"over {backend}"})
        send({"gb_per_s": _all_reduce(backend, prefix(f"{name}-{backend}", store), rank, 2, 0)})


def among_gpus(send: Send, file: str, rank: int, gpus: int) -> None:
    """An all-reduce of this node's GPUs, of which this process has one: `gb_per_s`."""
    import torch.distributed as dist

    store = dist.FileStore(file, gpus)  # type: ignore[attr-defined]
    send({"gb_per_s": _all_reduce("nccl", store, rank, gpus, rank)})


def _all_reduce(backend: str, store: Any, rank: int, world: int, gpu: int) -> float:
    """GB/s of four sums, which must be right."""
    import torch
    import torch.distributed as dist

    device, size = ("cuda", 2**28) if backend == "nccl" else ("cpu", 2**22)
    if device == "cuda":
        torch.cuda.set_device(gpu)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=LIMIT)
    data = torch.ones(size // 4, device=device)
    dist.all_reduce(data)
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(4):
        dist.all_reduce(data)
    _synchronize(device)
    speed = 4 * size / (time.perf_counter() - began) / 1e9
    if data[0].item() != float(world**5) or data[-1].item() != float(world**5):
        raise RuntimeError("wrong sums")
    dist.destroy_process_group()
    return speed


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
