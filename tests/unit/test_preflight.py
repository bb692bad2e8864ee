"""How the preflight judges: what is bad, which node it is, and what is only worth a warning."""

from __future__ import annotations

import faulthandler
import os
import time
from typing import Any

import pytest

from distft.diagnostics.preflight import rounds, uses_sockets
from distft.diagnostics.trials import Trial
from distft.diagnostics.verdict import judge_machines, judge_network

NAMES = ["a1", "a2", "a3", "a4"]
FACTS = {"distft": "1", "python": "3.11", "torch": "2.13", "cuda": "13.0", "driver": "580", "transformers": "5.23"}


def first(rank: int, **changes: Any) -> dict[str, Any]:
    facts = FACTS | {"device": "cuda", "tflops": 700.0, "gpus_gb_per_s": 230.0} | changes
    return {"rank": rank, "facts": facts, "problems": [], "warnings": []}


def test_all_pass() -> None:
    assert judge_machines({rank: first(rank) for rank in range(4)}, NAMES, {}) == ({}, [])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"torch": "2.12"}, "has torch 2.12, the others 2.13"),
        ({"driver": None}, "has driver None, the others 580"),
        ({"tflops": 300.0}, "computes at 300 TFLOP/s, the others at 700"),
        ({"gpus_gb_per_s": 21.0}, "its GPUs all-reduce at 21.0 GB/s, the others' at 230.0 (NVLink?)"),
    ],
)
def test_the_odd_one_out(changes: dict[str, Any], reason: str) -> None:
    reports = {rank: first(rank, **(changes if rank == 2 else {})) for rank in range(4)}
    assert judge_machines(reports, NAMES, {}) == ({"a3": reason}, [])


def test_one_that_does_not_report_and_one_that_reports_problems() -> None:
    reports = {rank: first(rank) for rank in (0, 1, 3)}
    reports[3]["problems"] = ["versions: ModuleNotFoundError: No module named 'torch'", "runs does not exist"]
    reports[1]["warnings"] = ["runs has only 3.0 GiB free"]
    bad, warnings = judge_machines(reports, NAMES, {1: 61.0})
    assert list(bad) == ["a3", "a4"]
    assert bad["a3"].startswith("did not report within 35 s")
    assert bad["a4"] == "versions: ModuleNotFoundError: No module named 'torch'; runs does not exist"
    assert warnings == ["a2: runs has only 3.0 GiB free", "a2: its clock is off by 61 s"]


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8, 9])
def test_every_node_meets_its_neighbours(nodes: int) -> None:
    pairs = [pair for ring in rounds(nodes) for pair in ring]
    for ring in rounds(nodes):
        members = [rank for pair in ring for rank in pair]
        assert len(members) == len(set(members))  # disjoint: all pairs of a round work at once
    wanted = {(rank, rank + 1) for rank in range(nodes - 1)} | (
        {(nodes - 1, 0)} if nodes > 2 and nodes % 2 == 0 else set()
    )
    assert set(pairs) == wanted
    assert len(pairs) == len(wanted)


def second(rank: int, errors: tuple[int, ...] = (), speed: float = 40.0, **changes: Any) -> dict[str, Any]:
    neighbours = [(rank - 1) % 4, (rank + 1) % 4]
    pairs = [{"peer": p, "error": "timed out"} if p in errors else {"peer": p, "gb_per_s": speed} for p in neighbours]
    return first(rank) | {"seen": True, "sockets": False, "pairs": pairs} | changes


def test_a_node_that_reaches_nobody_is_bad_and_its_neighbours_are_not() -> None:
    reports = {0: second(0, (1,)), 1: second(1, (0, 2)), 2: second(2, (1,)), 3: second(3)}
    assert judge_network(reports, NAMES, True) == ({"a2": "all-reduce with a1: timed out"}, [])


def test_a_host_name_that_resolves_to_loopback_is_named() -> None:
    """gloo listens on the address of the host's name: neighbours connect to 127.x, to themselves."""
    reports = {0: second(0, (1,)), 1: second(1, (0, 2)), 2: second(2, (1,)), 3: second(3)}
    reports[1]["facts"]["loopback"] = True
    bad, _ = judge_network(reports, NAMES, False)
    assert bad == {"a2": "all-reduce with a1: timed out; its host name resolves to 127.x: set network.interface"}


def test_the_rest_of_the_network_checks() -> None:
    reports = {0: second(0), 1: second(1), 2: second(2, seen=False), 3: second(3, sockets=True)}
    reports[0]["pairs"][1]["gb_per_s"] = reports[1]["pairs"][0]["gb_per_s"] = 4.0
    bad, warnings = judge_network(reports, NAMES, True)
    assert bad == {"a3": "does not see the file that the head node wrote into runs_dir"}
    assert warnings[0] == "a1 and a2: 4.00 GB/s, the others 40.00"
    assert warnings[1].startswith("NCCL uses plain sockets")
    del reports[3]
    assert judge_network(reports, NAMES, True)[0]["a4"] == "did not report after its first report"


def test_a_slow_node_is_named_by_its_own_pairs() -> None:
    """Each of its neighbours has another pair, which is as fast as the others."""
    reports = {rank: second(rank) for rank in range(4)}
    for rank, other in ((1, 0), (1, 2), (0, 1), (2, 1)):
        pair = next(pair for pair in reports[rank]["pairs"] if pair["peer"] == other)
        pair["gb_per_s"] = 4.0
    assert judge_network(reports, NAMES, True) == ({}, ["a2: 4.00 GB/s with its neighbours, the others 40.00"])


def hangs(send: Any, seconds: float) -> None:
    send({"doing": "over nccl"})
    time.sleep(seconds)


def aborts(send: Any) -> None:
    """As NCCL's watchdog does."""
    send({"doing": "over gloo"})
    send({"gb_per_s": 3.0})
    send({"doing": "over nccl"})
    faulthandler.disable()  # pytest's would print every thread
    os.abort()


def raises(send: Any) -> None:
    send({"doing": "over gloo"})
    raise RuntimeError("connection refused\nand more")


def works(send: Any, speed: float) -> None:
    send({"doing": "over gloo"})
    send({"gb_per_s": 1.0})
    send({"gb_per_s": speed})


@pytest.mark.parametrize(
    ("target", "arguments", "answer"),
    [
        (works, (40.0,), {"gb_per_s": 40.0}),
        (raises, (), {"error": "over gloo: connection refused"}),
        (aborts, (), {"error": "over nccl: its process ended with signal SIGABRT"}),
        (hangs, (60.0,), {"error": "over nccl: no answer in 1 s"}),
    ],
)
def test_a_trial_ends_by_its_deadline(target: Any, arguments: tuple[Any, ...], answer: dict[str, Any]) -> None:
    trial = Trial(target)
    began = time.monotonic()
    trial.begin(*arguments)
    assert trial.result(1.0) == answer
    trial.process.join(5)
    assert trial.process.exitcode is not None
    assert time.monotonic() - began < 5


def test_nccl_log() -> None:
    """Lines of NCCL 2.2x with NCCL_DEBUG=INFO."""
    assert uses_sockets("gpu3:31:45 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.3<0>\n")
    assert uses_sockets("gpu3:31:45 [0] NCCL INFO Using network Socket\n")
    assert not uses_sockets("gpu3:31:45 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [RO]\nUsing network IB\n")
