"""All nodes of a job are checked before the training.

`python -m distft.diagnostics.preflight RUN_DIR GPUS HEAD PORT`.

One process a node. Each looks at its own machine and tells the head node, over a plain socket: a node without the
shared file system, or without torch, can still say so. If all are well, neighbours all-reduce in pairs. The head
writes logs/preflight.json and, if nodes are bad, logs/preflight.bad (names with commas), and exits with 3.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

from distft.diagnostics import checks
from distft.runs.directory import RunDir

# Together under a minute, whatever goes wrong.
REPORT_SECONDS = 35.0  # for all nodes to import torch and report; a cold shared file system takes half of it
SEEN_SECONDS = 6.0  # NFS shows a new file after its attribute cache's 3 s
PAIR_SECONDS = 8.0  # each of two rounds
CLOCK_SECONDS = 5.0
BAD_NODES = 3

Report = dict[str, Any]


def main() -> int:
    run_dir, gpus, head, port = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    rank, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_NNODES"])
    listener = socket.create_server(("", port), backlog=max(nodes, 128)) if rank == 0 else None
    found = checks.look(run_dir, gpus)
    report = {"rank": rank, "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), **vars(found)}
    if listener is not None:
        return Head(run_dir, head, port, nodes, gpus).run(listener, report)
    with socket.create_connection((head, port), timeout=REPORT_SECONDS) as connection:
        connection.settimeout(REPORT_SECONDS + 2 * PAIR_SECONDS + SEEN_SECONDS)
        stream = connection.makefile("rw")
        _send(stream, report)
        order = json.loads(stream.readline() or "{}")
        if order:
            _send(stream, second_part(run_dir, order, head, port + 1, rank, nodes, gpus))
    return 0


def _send(stream: Any, value: Any) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


def second_part(run_dir: Path, order: Report, head: str, port: int, rank: int, nodes: int, gpus: int) -> Report:
    """What takes the others: the head's file seen from here, and all-reduce with both neighbours."""
    return {
        "rank": rank,
        "seen": _sees(run_dir / "logs" / "preflight.token", order["token"]),
        "pairs": pairs(rank, nodes, head, port, "nccl" if gpus else "gloo") if nodes > 1 else [],
        "sockets": _nccl_sockets(),
    }


def _sees(path: Path, token: str) -> bool:
    deadline = time.monotonic() + SEEN_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if path.read_text() == token:
                return True
        time.sleep(0.2)
    return False


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Neighbours on a ring, in two rounds of disjoint pairs; one for two nodes, an open ring for an odd number."""
    first = [(i, i + 1) for i in range(0, nodes - 1, 2)]
    second = [(i, (i + 1) % nodes) for i in range(1, nodes - 1 + (nodes % 2 == 0), 2)]
    return [first, second] if nodes > 2 else [first]


def pairs(rank: int, nodes: int, head: str, port: int, backend: str) -> list[Report]:
    """All-reduce with each neighbour: bandwidth in GB/s of each direction, or the error."""
    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=PAIR_SECONDS)
    if backend == "nccl":
        os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": _nccl_log()}
        torch.cuda.set_device(0)
    device, size = ("cuda", 2**28) if backend == "nccl" else ("cpu", 2**22)
    store = dist.TCPStore(head, port, nodes, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    results = []
    for number, ring in enumerate(rounds(nodes)):
        for pair in ring:
            if rank not in pair:
                continue
            result: Report = {"peer": pair[1 - pair.index(rank)]}
            try:
                own = dist.PrefixStore(f"{number}-{pair[0]}", store)
                dist.init_process_group(backend, store=own, rank=pair.index(rank), world_size=2, timeout=timeout)
                data = torch.ones(size // 4, device=device)
                dist.all_reduce(data)
                _synchronize(device)
                began = time.perf_counter()
                for _ in range(4):
                    dist.all_reduce(data)
                _synchronize(device)
                result["gb_per_s"] = 4 * size / (time.perf_counter() - began) / 1e9
                if data[0].item() != 2.0**5 or data[-1].item() != 2.0**5:
                    result["error"] = "wrong sums"
            except Exception as error:
                result["error"] = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
            finally:
                with contextlib.suppress(Exception):
                    dist.destroy_process_group()
            results.append(result)
    with contextlib.suppress(Exception):  # the head holds the store until all are through
        store.add("done", 1)
        deadline = time.monotonic() + PAIR_SECONDS
        while rank == 0 and store.add("done", 0) < nodes and time.monotonic() < deadline:
            time.sleep(0.05)
    return results


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _nccl_log() -> str:
    return f"{tempfile.gettempdir()}/distft-nccl-{os.getpid()}.log"


def _nccl_sockets() -> bool:
    """Whether NCCL said that it goes over plain sockets (no InfiniBand, no plugin)."""
    log = Path(_nccl_log())
    if not log.exists():
        return False
    text = log.read_text(errors="replace")
    log.unlink()
    return uses_sockets(text)


def uses_sockets(nccl_info: str) -> bool:
    """Whether NCCL's INFO log names plain sockets as its network: `NET/Socket : Using ...`, `Using network Socket`."""
    return "Using network Socket" in nccl_info or "NET/Socket : Using" in nccl_info


class Head:
    """The head node's part: collects the reports, orders the second part, decides."""

    def __init__(self, run_dir: Path, head: str, port: int, nodes: int, gpus: int):
        self.run_dir, self.head, self.port, self.nodes, self.gpus = run_dir, head, port, nodes, gpus
        self.deadline = time.monotonic() + REPORT_SECONDS
        self.names = _hostnames(nodes)

    def run(self, listener: socket.socket, own: Report) -> int:
        reports, streams = {0: own}, {}
        skew = {0: 0.0}
        while len(reports) < self.nodes and (left := self.deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # a stranger, or a node that died in the middle
                stream = self._accept(listener)
                report = json.loads(stream.readline())
                reports[report["rank"]], streams[report["rank"]] = report, stream
                skew[report["rank"]] = abs(report["facts"].get("time", time.time()) - time.time())
        problems, warnings = judge(reports, self.names, skew)
        if not problems:
            token, path = secrets.token_hex(8), self.run_dir / "logs" / "preflight.token"
            path.write_text(token)
            for stream in streams.values():
                with contextlib.suppress(OSError):
                    _send(stream, {"token": token})
            seconds = {
                0: second_part(self.run_dir, {"token": token}, self.head, self.port + 1, 0, self.nodes, self.gpus)
            }
            for rank, stream in streams.items():
                with contextlib.suppress(OSError, ValueError):
                    seconds[rank] = json.loads(stream.readline())
            path.unlink()
            more, told = judge_second(seconds, self.names, bool(self.gpus))
            problems, warnings = problems | more, warnings + told
            for rank, second in seconds.items():
                reports[rank] |= second
        return self._conclude(reports, problems, warnings)

    def _accept(self, listener: socket.socket) -> Any:
        connection, _ = listener.accept()
        connection.settimeout(max(1.0, self.deadline - time.monotonic()) + 2 * PAIR_SECONDS)
        return connection.makefile("rw")

    def _conclude(self, reports: dict[int, Report], problems: dict[str, str], warnings: list[str]) -> int:
        logs = self.run_dir / "logs"
        speeds = [
            pair["gb_per_s"] for report in reports.values() for pair in report.get("pairs", ()) if "gb_per_s" in pair
        ]
        result = {
            "nodes": self.names,
            "bad": problems,
            "warnings": warnings,
            "reports": [reports[r] for r in sorted(reports)],
        }
        RunDir(self.run_dir).preflight.write_text(json.dumps(result, indent=1))
        (logs / "preflight.bad").unlink(missing_ok=True)
        for warning in warnings:
            print(f"preflight: warning: {warning}", flush=True)
        if problems:
            (logs / "preflight.bad").write_text(",".join(problems))
            for name, why in problems.items():
                print(f"preflight: bad node {name}: {why}", flush=True)
            return BAD_NODES
        speed = f", {min(speeds):.2f} GB/s between neighbours at least" if speeds else ""
        print(f"preflight: {self.nodes} nodes are well{speed}", flush=True)
        return 0


def _hostnames(nodes: int) -> list[str]:
    """The job's nodes by SLURM_NODEID: SLURM numbers them in the order of the list."""
    import shutil
    import subprocess

    if shutil.which("scontrol"):  # not in a container
        command = ["scontrol", "show", "hostnames", os.environ.get("SLURM_STEP_NODELIST", "")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        if len(done.stdout.split()) == nodes:
            return done.stdout.split()
    return [f"node number {rank}" for rank in range(nodes)]


def judge(reports: dict[int, Report], names: list[str], skew: dict[int, float]) -> tuple[dict[str, str], list[str]]:
    """Bad nodes with the reason, and warnings, from the first reports."""
    problems: dict[str, str] = {}
    warnings: list[str] = []
    for rank, name in enumerate(names):
        report = reports.get(rank)
        if report is None:
            problems[name] = f"said nothing in {REPORT_SECONDS:.0f} s (is distft installed there, and the network up?)"
        elif report["problems"]:
            problems[name] = "; ".join(report["problems"])
        else:
            warnings += [f"{name}: {text}" for text in report["warnings"]]
    well = {rank: report["facts"] for rank, report in reports.items() if names[rank] not in problems}
    for key in checks.VERSIONS:
        most = _most_common(facts.get(key) for facts in well.values())
        for rank, facts in well.items():
            if facts.get(key) != most:
                problems.setdefault(names[rank], f"has {key} {facts.get(key)}, the others {most}")
    for rank, seconds in skew.items():
        if seconds > CLOCK_SECONDS:
            warnings.append(f"{names[rank]}: its clock is off by {seconds:.0f} s")
    speeds = {rank: facts["tflops"] for rank, facts in well.items() if facts.get("device") == "cuda"}
    usual = statistics.median(speeds.values()) if speeds else 0
    for rank, speed in speeds.items():
        if speed < 0.7 * usual:
            problems.setdefault(names[rank], f"computes at {speed:.0f} TFLOP/s, the others at {usual:.0f}")
    return problems, warnings


def _most_common(values: Iterable[Any]) -> Any:
    counted = Counter(values)
    return counted.most_common(1)[0][0] if counted else None


def judge_second(seconds: dict[int, Report], names: list[str], gpus: bool) -> tuple[dict[str, str], list[str]]:
    """The same from the second reports. A node is bad if it cannot reach any neighbour; of one lone pair, both are."""
    problems: dict[str, str] = {}
    warnings: list[str] = []
    failed: dict[int, list[str]] = {}
    speeds: dict[tuple[int, int], float] = {}
    tried: Counter[int] = Counter()
    for rank, report in seconds.items():
        if not report["seen"]:
            problems[names[rank]] = "does not see what the head node writes into runs_dir"
        for pair in report["pairs"]:
            tried[rank] += 1
            if "error" in pair:
                failed.setdefault(rank, []).append(f"all-reduce with {names[pair['peer']]}: {pair['error']}")
            else:
                speeds[min(rank, pair["peer"]), max(rank, pair["peer"])] = pair["gb_per_s"]
    for rank in range(len(names)):
        if rank not in seconds:
            problems.setdefault(names[rank], "said nothing more after its first report")
    alone = [rank for rank, errors in failed.items() if len(errors) == tried[rank]]
    for rank in alone or failed:
        loop = "; its own name leads to 127.x: set network.interface" if seconds[rank].get("loopback") else ""
        problems.setdefault(names[rank], failed[rank][0] + loop)
    usual = statistics.median(speeds.values()) if speeds else 0
    for (a, b), speed in speeds.items():
        if speed < 0.5 * usual:
            warnings.append(f"{names[a]} and {names[b]}: {speed:.2f} GB/s, the others {usual:.2f}")
    if gpus and any(report["sockets"] for report in seconds.values()):
        warnings.append("NCCL goes over plain sockets: no InfiniBand or RDMA was found; is network.interface right?")
    return problems, warnings


if __name__ == "__main__":
    sys.exit(main())
