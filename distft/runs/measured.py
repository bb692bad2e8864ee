"""What a run measured, and its plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from distft.runs.directory import RunDir
from distft.runs.metrics import read_metrics

# The first steps compile kernels and fill caches.
WARM_UP = 3


@dataclass(frozen=True)
class Measured:
    """Of a run: tokens a second of all ranks (the median after the first steps), and the largest peak in bytes."""

    tokens_per_second: float
    peak_memory: int


def measured(run: RunDir) -> Measured | None:
    """None for a run that has made no step."""
    lines, _ = read_metrics(run.metrics)
    if not lines:
        return None
    speeds = sorted(line["tokens_per_second"] for line in lines[WARM_UP:] or lines)
    return Measured(speeds[len(speeds) // 2], max(line["peak_memory_bytes"] for line in lines))


def planned(run: RunDir) -> dict[str, Any]:
    """Its plan.json; {} where there is none that can be read."""
    try:
        found = json.loads(run.plan.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
