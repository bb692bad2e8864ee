"""What a run measured, beside what its plan estimated."""

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
    """What the metrics of a run come down to."""

    tokens_per_second: float  # of all ranks: the median after the first steps
    peak_memory: int  # bytes, of the rank that needed most


def measured(run: RunDir) -> Measured | None:
    """None for a run without a step."""
    lines, _ = read_metrics(run.metrics)
    if not lines:
        return None
    speeds = sorted(line["tokens_per_second"] for line in lines[WARM_UP:] or lines)
    return Measured(speeds[len(speeds) // 2], max(line["peak_memory_bytes"] for line in lines))


def planned(run: RunDir) -> dict[str, Any]:
    """The plan.json of a run; {} if there is none that can be read."""
    try:
        found = json.loads(run.plan.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
