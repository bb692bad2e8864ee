"""Checks all nodes of a job before the training, with one process per node.

`python -m distft.diagnostics.preflight RUN_DIR GPUS HEAD PORT`

Each node checks its own machine, an all-reduce of its GPUs included, and reports to the head node over a plain socket,
so that a node without the shared file system, or without torch, can still report that. If all pass, neighbours
all-reduce in pairs, over gloo and, with GPUs, NCCL: checkpoints and the training use both. The head node writes
logs/preflight.json and, if nodes are bad, logs/preflight.bad (their names, separated by commas), and exits with 3.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from distft.diagnostics import checks, trials
from distft.diagnostics.verdict import REPORT_SECONDS, Report, judge_machines, judge_network
from distft.runs.directory import RunDir

# With REPORT_SECONDS together under a minute, whatever goes wrong.
SEEN_SECONDS = 6.0  # NFS shows a new file when its attribute cache of 3 s has expired
PAIR_SECONDS = 9.0  # for each of two rounds, and for the GPUs of a node
BAD_NODES = 3  # the exit status


def main() -> int:
    run_dir, gpus, head, port = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    rank, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_NNODES"])
    listener = socket.create_server(("", port), backlog=max(nodes, 128)) if rank == 0 else None
    reduces = AllReduces(nodes, gpus)  # before a GPU is touched
    found = checks.look(run_dir, gpus)
    if gpus > 1 and not found.problems:
        found.attempt(reduces.among_gpus, "all-reduce of the GPUs")
    report = {"rank": rank, "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), **vars(found)}
    if listener is not None:
        return Head(run_dir, head, port, nodes, gpus, reduces).run(listener, report)
    with socket.create_connection((head, port), timeout=REPORT_SECONDS) as connection:
        connection.settimeout(REPORT_SECONDS + 2 * PAIR_SECONDS + SEEN_SECONDS)
        stream = connection.makefile("rw")
        _send(stream, report)
        answer = json.loads(stream.readline() or "{}")
        if answer:  # none where a machine is bad
            _send(stream, check_network(run_dir, answer["token"], head, port + 1, rank, nodes, reduces))
    return 0


def _send(stream: TextIO, value: Any) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


def check_network(
    run_dir: Path, token: str, head: str, port: int, rank: int, nodes: int, reduces: AllReduces
) -> Report:
    """The checks that need other nodes: the head node's file seen from here, and all-reduces with both neighbours."""
    return {
        "rank": rank,
        "seen": _sees(run_dir / "logs" / "preflight.token", token),
        "pairs": reduces.with_neighbours(rank, nodes, head, port) if nodes > 1 else [],
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
    """Pairs of neighbours on a ring, in two rounds of disjoint pairs.

    Two nodes make one pair. With an odd number the ring stays open: its last pair would need a third round.
    """
    first = [(i, i + 1) for i in range(0, nodes - 1, 2)]
    second = [(i, (i + 1) % nodes) for i in range(1, nodes - 1 + (nodes % 2 == 0), 2)]
    return [first, second] if nodes > 2 else [first]


class AllReduces:
    """The processes of this node's all-reduces; none where torch cannot be imported, which checks.look reports."""

    def __init__(self, nodes: int, gpus: int):
        self.gpus, self.pairs, self.local = gpus, [], []
        with contextlib.suppress(Exception):
            import torch  # noqa: F401 - once for all of them

            self.pairs = [trials.Trial(trials.with_peer) for _ in (rounds(nodes) if nodes > 1 else ())]
            self.local = [trials.Trial(trials.among_gpus) for _ in range(gpus if gpus > 1 else 0)]

    def among_gpus(self, found: checks.Findings) -> None:
        """Findings on an all-reduce of all GPUs of this node."""
        with tempfile.TemporaryDirectory() as folder:
            for rank, trial in enumerate(self.local):
                trial.begin(f"{folder}/store", rank, self.gpus)
            results = [trial.result(PAIR_SECONDS) for trial in self.local]
        errors = [
            f"all-reduce of {self.gpus} GPUs: cuda:{rank}: {result['error']}"
            for rank, result in enumerate(results)
            if "error" in result
        ]
        if errors:
            found.problems.append(errors[0])
        else:
            found.facts["gpus_gb_per_s"] = min(result["gb_per_s"] for result in results)

    def with_neighbours(self, rank: int, nodes: int, head: str, port: int) -> list[Report]:
        """All-reduce with each neighbour: GB/s in each direction, or the error. Rank 0 has the store."""
        import torch.distributed as dist

        tcp: Any = dist.TCPStore  # type: ignore[attr-defined]  # public, and not re-exported explicitly
        timeout = timedelta(seconds=PAIR_SECONDS)
        store = tcp(head, port, None, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
        backends, variables = ["gloo"], {}
        if self.gpus:
            backends.append("nccl")
            variables = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": _nccl_log()}
        results = []
        for number, (ring, trial) in enumerate(zip(rounds(nodes), self.pairs, strict=True)):
            for pair in ring:
                if rank in pair:
                    trial.begin(head, port, f"{number}-{pair[0]}", pair.index(rank), backends, variables)
                    results.append({"peer": pair[1 - pair.index(rank)]} | trial.result(PAIR_SECONDS))
        with contextlib.suppress(Exception):  # the head node keeps the store until all nodes are done
            store.add("done", 1)
            deadline = time.monotonic() + PAIR_SECONDS
            while rank == 0 and store.add("done", 0) < nodes and time.monotonic() < deadline:
                time.sleep(0.05)
        return results


def _nccl_log() -> str:
    return f"{tempfile.gettempdir()}/distft-nccl-{os.getpid()}.log"


def _nccl_sockets() -> bool:
    """Whether NCCL logged that it uses plain sockets (no InfiniBand, no plugin)."""
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
    """The head node's part: collects the reports, starts the network checks, decides."""

    def __init__(self, run_dir: Path, head: str, port: int, nodes: int, gpus: int, reduces: AllReduces):
        self.run_dir, self.head, self.port, self.nodes, self.gpus = run_dir, head, port, nodes, gpus
        self.reduces = reduces
        self.deadline = time.monotonic() + REPORT_SECONDS
        self.names = _hostnames(nodes)

    def run(self, listener: socket.socket, own: Report) -> int:
        reports: dict[int, Report] = {0: own}
        streams: dict[int, TextIO] = {}
        skew = {0: 0.0}
        while len(reports) < self.nodes and (left := self.deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # not a node of ours, or one that died halfway
                stream = self._accept(listener)
                report = json.loads(stream.readline())
                reports[report["rank"]], streams[report["rank"]] = report, stream
                skew[report["rank"]] = abs(report["facts"].get("time", time.time()) - time.time())
        problems, warnings = judge_machines(reports, self.names, skew)
        if not problems:
            token, path = secrets.token_hex(8), self.run_dir / "logs" / "preflight.token"
            path.write_text(token)
            for stream in streams.values():
                with contextlib.suppress(OSError):
                    _send(stream, {"token": token})
            of_network = {0: check_network(self.run_dir, token, self.head, self.port + 1, 0, self.nodes, self.reduces)}
            for rank, stream in streams.items():
                with contextlib.suppress(OSError, ValueError):
                    of_network[rank] = json.loads(stream.readline())
            path.unlink()
            both = {rank: reports[rank] | report for rank, report in of_network.items()}
            problems, more = judge_network(both, self.names, bool(self.gpus))
            warnings += more
            reports |= both
        return self._conclude(reports, problems, warnings)

    def _accept(self, listener: socket.socket) -> TextIO:
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
        speed = f"; at least {min(speeds):.2f} GB/s between neighbours" if speeds else ""
        print(f"preflight: {self.nodes} node{'s' * (self.nodes > 1)} passed{speed}", flush=True)
        return 0


def _hostnames(nodes: int) -> list[str]:
    """Names of the job's nodes by SLURM_NODEID, which counts them in the order of the list."""
    if shutil.which("scontrol"):  # there is none in a container
        command = ["scontrol", "show", "hostnames", os.environ.get("SLURM_STEP_NODELIST", "")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        if len(done.stdout.split()) == nodes:
            return done.stdout.split()
    return [f"node number {rank}" for rank in range(nodes)]  # of use to people, though not to sbatch --exclude


if __name__ == "__main__":
    sys.exit(main())
