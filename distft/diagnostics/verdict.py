"""Which nodes are bad, from what each node reported in the preflight. Pure functions, without sockets or torch.

A bad node comes with the reason; warnings do not keep a job from training.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

from distft.diagnostics import checks

REPORT_SECONDS = 35.0  # for all nodes to import torch and report; a cold shared file system takes half of it
CLOCK_SECONDS = 5.0  # that clocks may differ

Report = dict[str, Any]


def judge_machines(
    reports: dict[int, Report], names: list[str], skew: dict[int, float]
) -> tuple[dict[str, str], list[str]]:
    """Bad nodes and warnings from the reports on single machines (checks.look), by rank.

    `skew`: seconds by which the clocks differ from the head node's.
    """
    problems: dict[str, str] = {}
    warnings: list[str] = []
    for rank, name in enumerate(names):
        report = reports.get(rank)
        if report is None:
            problems[name] = (
                f"did not report within {REPORT_SECONDS:.0f} s (is distft installed there, and the network up?)"
            )
        elif report["problems"]:
            problems[name] = "; ".join(report["problems"])
        else:
            warnings += [f"{name}: {text}" for text in report["warnings"]]
    passed = {rank: report["facts"] for rank, report in reports.items() if names[rank] not in problems}
    for key in checks.VERSIONS:
        most = _most_common(facts.get(key) for facts in passed.values())
        for rank, facts in passed.items():
            if facts.get(key) != most:
                problems.setdefault(names[rank], f"has {key} {facts.get(key)}, the others {most}")
    for rank, seconds in skew.items():
        if seconds > CLOCK_SECONDS:
            warnings.append(f"{names[rank]}: its clock is off by {seconds:.0f} s")
    speeds = {rank: facts["tflops"] for rank, facts in passed.items() if facts.get("device") == "cuda"}
    usual = statistics.median(speeds.values()) if speeds else 0
    for rank, speed in speeds.items():
        if speed < checks.SLOW * usual:
            problems.setdefault(names[rank], f"computes at {speed:.0f} TFLOP/s, the others at {usual:.0f}")
    speeds = {rank: facts["gpus_gb_per_s"] for rank, facts in passed.items() if "gpus_gb_per_s" in facts}
    usual = statistics.median(speeds.values()) if speeds else 0
    for rank, speed in speeds.items():
        if speed < 0.5 * usual:
            why = f"its GPUs all-reduce at {speed:.1f} GB/s, the others' at {usual:.1f} (NVLink?)"
            problems.setdefault(names[rank], why)
    return problems, warnings


def _most_common(values: Iterable[Any]) -> Any:
    counted = Counter(values)
    return counted.most_common(1)[0][0] if counted else None


def judge_network(reports: dict[int, Report], names: list[str], gpus: bool) -> tuple[dict[str, str], list[str]]:
    """Bad nodes and warnings from the reports of the nodes, those on the network included (preflight.check_network).

    A node is bad if it cannot reach any of its neighbours. Of a single pair, both are.
    """
    problems: dict[str, str] = {}
    warnings: list[str] = []
    failed: dict[int, list[str]] = {}
    speeds: dict[tuple[int, int], float] = {}
    tried: Counter[int] = Counter()
    for rank, report in reports.items():
        if not report["seen"]:
            problems[names[rank]] = "does not see the file that the head node wrote into runs_dir"
        for pair in report["pairs"]:
            tried[rank] += 1
            if "error" in pair:
                failed.setdefault(rank, []).append(f"all-reduce with {names[pair['peer']]}: {pair['error']}")
            else:
                speeds[min(rank, pair["peer"]), max(rank, pair["peer"])] = pair["gb_per_s"]
    for rank in range(len(names)):
        if rank not in reports:
            problems.setdefault(names[rank], "did not report after its first report")
    alone = [rank for rank, errors in failed.items() if len(errors) == tried[rank]]
    for rank in alone or failed:
        loop = (
            "; its host name resolves to 127.x: set network.interface" if reports[rank]["facts"].get("loopback") else ""
        )
        problems.setdefault(names[rank], failed[rank][0] + loop)
    usual = statistics.median(speeds.values()) if speeds else 0
    slow = {pair: speed for pair, speed in speeds.items() if speed < 0.5 * usual}
    others = statistics.median([speed for pair, speed in speeds.items() if pair not in slow] or [0])
    both = [rank for rank in tried if tried[rank] > 1 and sum(rank in pair for pair in slow) == tried[rank]]
    for rank in both:
        own = [speed for pair, speed in slow.items() if rank in pair]
        warnings.append(f"{names[rank]}: {max(own):.2f} GB/s with its neighbours, the others {others:.2f}")
    for (a, b), speed in slow.items():
        if a not in both and b not in both:
            warnings.append(f"{names[a]} and {names[b]}: {speed:.2f} GB/s, the others {others:.2f}")
    if gpus and any(report["sockets"] for report in reports.values()):
        warnings.append("NCCL uses plain sockets: it found no InfiniBand or RDMA; is network.interface right?")
    return problems, warnings
