"""Which collective each rank waits in, by torch's flight recorder: of NCCL's process groups and of gloo's.

https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
"""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

import torch

ENTRIES = 1000  # kept per rank; torch keeps none by default


class Last(NamedTuple):
    """The newest collective of a rank in a process group."""

    number: int  # counted from 1, by group
    name: str  # nccl:all_reduce
    waits: bool


def record(dump_to: str) -> None:
    """Have torch keep the newest collectives. Before the first process group is made.

    Args:
        dump_to: prefix of the files that torch writes by itself when NCCL's own time-out ends a rank.
    """
    for name, value in (
        ("TORCH_FR_BUFFER_SIZE", str(ENTRIES)),
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", str(ENTRIES)),  # its name until torch 2.9
        ("TORCH_FR_DUMP_TEMP_FILE", dump_to),
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", dump_to),
    ):
        os.environ.setdefault(name, value)


def newest() -> dict[str, Last]:
    """This rank's newest collective in each process group, by the group's name and ranks. {} where nothing is known."""
    module = torch._C._distributed_c10d
    dump = getattr(module, "_dump_nccl_trace_json", None) or getattr(module, "_dump_fr_trace_json", None)
    if dump is None:
        return {}
    trace: dict[str, Any] = json.loads(dump(True, False))
    members = {name: group.get("ranks", "") for name, group in trace.get("pg_config", {}).items()}
    found: dict[str, Last] = {}
    for entry in trace.get("entries", ()):
        if not entry["is_p2p"]:
            name, title = entry["process_group"]
            ranks = members.get(name) or next(iter(members.values()), "")
            found[f"{title or name} {ranks}"] = Last(
                entry["collective_seq_id"], entry["profiling_name"], not entry["retired"]
            )
    return found


def behind(ranks: dict[int, dict[str, Last]]) -> tuple[list[int], str] | None:
    """The ranks for which others wait, and in which collective; None where no rank is behind.

    Args:
        ranks: what `newest` gave on each rank that answered.
    """
    for group in sorted({name for found in ranks.values() for name in found}):
        inside = {rank: found[group] for rank, found in ranks.items() if group in found}
        front = max(inside.values(), key=lambda last: last.number)
        late = [rank for rank, last in inside.items() if last.number < front.number]
        if front.waits and late:
            return late, f"{front.name} number {front.number} of the group {group}"
    return None
