"""How distft copes with a thousand nodes, a thousand runs, a million steps and 8,192 ranks, on one machine.

    python benchmarks/scale.py [--rounds 5] [--json]

Times are the wall time of the whole process, the best of the rounds. The median and the least CPU time beside it show,
on a busy machine, how much of that is distft's. Exit status 1: a bound is missed. Launches are measured where a SLURM
controller can be started (slurm_cluster.py). Its 1,024 nodes are not real, so jobs are held; sbatch's own time is
subtracted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import NamedTuple

import yaml

from distft.runs.directory import RunDir
from distft.runs.status import State, add_job_id, update_status

sys.path.append(str(Path(__file__).parents[1] / "tests" / "slurm"))
import slurm_cluster
from slurm_cluster import Cluster

NODES = (1, 16, 128, 1024)
GPUS = 8
RANKS = NODES[-1] * GPUS
RUNS, OPEN_RUNS = 1000, 50
STEPS = 1_000_000
DISTFT = (sys.executable, "-m", "distft")

COMMAND_SECONDS, STATUS_SECONDS, FAILED_SECONDS = 0.5, 1.0, 2.0
NOISE = 1.5  # two timings of the same work may differ by this factor
FOLLOW_MIB = 8  # a few blocks of a file; the files themselves have some hundred MiB


@dataclass(frozen=True)
class Figure:
    """One line of the table; without a bound it is only shown."""

    what: str
    value: float
    unit: str
    bound: float | None = None
    median: float | None = None
    cpu: float | None = None

    @property
    def ok(self) -> bool:
        return self.bound is None or self.value <= self.bound


class Took(NamedTuple):
    """Seconds of a process, start to end."""

    wall: float
    cpu: float  # user and system


def seconds(what: str, times: list[Took], bound: float) -> Figure:
    walls = [took.wall for took in times]
    return Figure(what, min(walls), "s", bound, statistics.median(walls), min(took.cpu for took in times))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ.pop("DISTFT_CLUSTER", None)
    skipped = slurm_cluster.missing()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        big = {"nodes": 1, "gpus": GPUS, "big": NODES[-1]}
        cluster = None if skipped else stack.enter_context(Cluster(folder / "slurm", **big))
        figures = [
            *commands(folder / "launch", cluster, options.rounds),
            *status(folder / "status", cluster, options.rounds),
            *following(folder / "follow"),
            *failed(folder / "failed", options.rounds),
        ]
    if options.json:
        rows = [{**asdict(figure), "ok": figure.ok} for figure in figures]
        print(json.dumps({"rounds": options.rounds, "launch_skipped": skipped, "figures": rows}))
    else:
        print(f"{'best of ' + str(options.rounds):>58}{'median':>12}{'CPU':>12}{'bound':>12}")
        for figure in figures:
            print(_line(figure))
        if skipped:
            print(f"launch: not measured: {skipped}")
    sys.exit(not all(figure.ok for figure in figures))


def _line(figure: Figure) -> str:
    numbers = (figure.value, figure.median, figure.cpu, figure.bound)
    columns = "".join(f"{'' if number is None else f'{number:.2f} {figure.unit}':>12}" for number in numbers)
    return f"{figure.what:<46}{columns}{'' if figure.bound is None else '   ok' if figure.ok else '   OVER'}"


def run(command: tuple[str, ...], folder: Path, env: dict[str, str] | None = None) -> tuple[Took, str]:
    """How long it took, and what it printed."""
    began, used = time.perf_counter(), _cpu_of_children()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    took = Took(time.perf_counter() - began, _cpu_of_children() - used)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return took, done.stdout


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---- plan, render and launch for up to 1,024 nodes


def commands(folder: Path, cluster: Cluster | None, rounds: int) -> Iterator[Figure]:
    """render, launch --dry-run, and a real launch: plan, sbatch --test-only, write, sbatch."""
    write_inputs(folder)
    env, clock = dict(os.environ), folder / "clock"
    clock.touch()
    argv = {"render": ["-o"], "launch --dry-run": ["--json"]}
    if cluster:
        sbatch = f'began=$EPOCHREALTIME\n{cluster.bin}/sbatch "$@"\nrc=$?'
        sbatch += f'\necho "$began $EPOCHREALTIME" >>{clock}\nexit $rc'
        env = with_command(cluster.env(), folder / "bin", "sbatch", sbatch)
        argv["launch --detach"] = []
    times: dict[tuple[str, int], list[Took]] = {(what, nodes): [] for what in argv for nodes in NODES}
    written, of_sbatch = {}, []
    for number, nodes, what in product(range(rounds + 1), NODES, argv):
        last = [f"rendered-{number}-{nodes}"] if what == "render" else []
        where = ("recipe.yaml", "--cluster", "site.yaml", "--nodes", str(nodes))
        took, shown = run((*DISTFT, *what.split(), *where, *argv[what], *last), folder, env)
        if what == "launch --dry-run":
            files = json.loads(shown)["files"]
            assert json.loads(files["plan.json"])["topology"]["world_size"] == nodes * GPUS
            written[nodes] = sum(map(len, files.values()))
        own = [float(after) - float(before) for before, after in map(str.split, clock.read_text().splitlines())]
        assert len(own) == (2 if what == "launch --detach" else 0), "--test-only, and the submission"
        clock.write_text("")
        if number:  # the first round fills the disk cache
            times[what, nodes].append(took._replace(wall=took.wall - sum(own)))
            of_sbatch += own
    for (what, nodes), values in times.items():
        yield seconds(f"{what} --nodes {nodes}", values, COMMAND_SECONDS)
    if of_sbatch:
        yield Figure("  sbatch itself, taken off, a call", min(of_sbatch), "s", None, statistics.median(of_sbatch))
    more = written[NODES[-1]] / written[1]
    yield Figure("what is written, 1,024 nodes to 1", more, "x")
    for what in argv:
        most, least = (min(took.cpu for took in times[what, nodes]) for nodes in (NODES[-1], 1))
        yield Figure(f"CPU of {what}, 1,024 nodes to 1", most / least, "x", max(1.0, more) * NOISE)


def write_inputs(folder: Path) -> None:
    """A recipe that shards 8 billion parameters, and a profile of nodes with eight H100s; jobs are held."""
    (folder / "model").mkdir(parents=True)
    write_model(folder / "model")
    (folder / "data.jsonl").write_text('{"text": "a row"}\n' * 100)
    recipe = {
        "name": "scale",
        "model": {"name_or_path": "model"},
        "lora": None,
        "data": {"train": "data.jsonl"},
        "training": {"global_batch_size": 4 * RANKS, "max_steps": 10},
        "parallelism": {"strategy": "zero3"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    site = {
        "runs_dir": str(folder / "runs"),
        "node": {"gpus_per_node": GPUS, "gpu": "H100"},
        "slurm": {"partition": "big", "sbatch": ["--hold"]},
        "python": "python3",  # the nodes' Python: the job prepares the data, not the login node
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site))


def write_model(folder: Path) -> None:
    """Llama-3-8B's shapes. The weights are a hole in the file: only its header is read."""
    hidden, mlp, vocabulary, kv, layers = 4096, 14336, 128_256, 1024, 32
    config = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary, "num_attention_heads": 32}
    (folder / "config.json").write_text(json.dumps(config))
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes = {f"model.layers.{k}.{name}.weight": shape for k in range(layers) for name, shape in block.items()}
    shapes |= {f"{name}.weight": (vocabulary, hidden) for name in ("model.embed_tokens", "lm_head")}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)


def with_command(env: dict[str, str], folder: Path, name: str, script: str) -> dict[str, str]:
    """The environment, with one of our commands first on the PATH."""
    folder.mkdir(parents=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)
    return {**env, "PATH": f"{folder}:{env['PATH']}"}


# ---- status of 1,000 runs

# squeue where there is no SLURM. Its last argument is the format of a line.
STUB = r"""
for ((id = 1; id <= runs; id++)); do
  line=${!#} line=${line//\%[iA]/$id} line=${line//\%T/PENDING}
  echo "${line//\%[a-zA-Z]/N/A}"
done"""


def status(folder: Path, cluster: Cluster | None, rounds: int) -> Iterator[Figure]:
    """Local and SLURM runs that have ended, and 50 that are queued. Without SLURM a stub answers for it."""
    folder.mkdir()
    sbatch = ("sbatch", "--parsable", "--hold", "--partition=big", "--output=/dev/null", "--wrap=true")
    queued = [cluster.run(*sbatch).stdout.strip() if cluster else str(k) for k in range(1, OPEN_RUNS + 1)]
    squeue = f'{cluster.bin}/squeue "$@"' if cluster else f"runs={OPEN_RUNS}{STUB}"
    asked = folder / "asked"
    environment = cluster.env() if cluster else dict(os.environ)
    env = with_command(environment, folder / "bin", "squeue", f"echo >>{asked}\n{squeue}")
    kinds = [("completed", "local"), ("completed", "slurm"), ("failed", "slurm")]
    for k in range(RUNS):
        made = RunDir.create(str(folder / "runs"), f"run-{k}")
        state, where = ("queued", "slurm") if k < OPEN_RUNS else kinds[k % len(kinds)]
        job_id = queued[k] if k < OPEN_RUNS else f"{900_000 + k}" if where == "slurm" else f"local:{k}:{k}"
        if where == "slurm":
            add_job_id(made, job_id)
        reason = "rank 3: OutOfMemoryError: CUDA out of memory" if state == "failed" else None
        update_status(
            made, state=State(state), job_id=job_id, name=made.path.name, step=100, max_steps=1000, reason=reason
        )
    found = json.loads(run((*DISTFT, "status", "--json"), folder, env)[1])["runs"]
    assert len(found) == RUNS
    assert sum(one.get("slurm_state") == "PENDING" for one in found) == OPEN_RUNS, "what SLURM says of them is shown"
    times = [run((*DISTFT, "status"), folder, env)[0] for _ in range(rounds)]
    yield seconds(f"status, {RUNS:,} runs, {OPEN_RUNS} of them open", times, STATUS_SECONDS)
    calls = asked.read_text().count("\n") / (rounds + 1)
    yield Figure("  squeue is asked", calls, "times", 1)


# ---- following a run of a million steps

FOLLOW = """
import sys
from pathlib import Path
from rich.console import Console
from distft.views.progress import Follower
from distft.runs.directory import RunDir
with Follower(RunDir(Path(sys.argv[1])), Console()) as follower:
    follower.poll()
    assert follower.latest["step"] == int(sys.argv[2]), follower.latest
print(Path("/proc/self/status").read_text())
"""


def following(folder: Path) -> Iterator[Figure]:
    """The peak memory over a million lines minus that over a thousand."""
    few, many = (run_of(folder, steps) for steps in (1000, STEPS))
    peaks = [follow_metrics(made, steps) for made, steps in ((few, 1000), (many, STEPS))]
    size = many.metrics.stat().st_size >> 20
    yield Figure(f"more memory for a metrics.jsonl of {size} MiB", peaks[1] - peaks[0], "MiB", FOLLOW_MIB)
    peaks = [follow_log(few), follow_log(many)]
    size = many.rank_log(0).stat().st_size >> 20
    yield Figure(f"more memory for logs -f of {size} MiB", peaks[1] - peaks[0], "MiB", FOLLOW_MIB)


def run_of(folder: Path, steps: int) -> RunDir:
    """A run in progress, with a line per step in metrics.jsonl and in rank 0's log. The last line is incomplete."""
    made = RunDir.create(str(folder), f"steps-{steps}")
    # No job id: nothing is asked about the process, and the run stays open.
    update_status(made, state=State.RUNNING, step=steps, max_steps=2 * steps)
    with made.metrics.open("w") as metrics, made.rank_log(0).open("w") as log:
        for step in range(1, steps + 1):
            metrics.write(
                f'{{"step": {step}, "loss": {3 + 1 / step}, "grad_norm": {1 + 1 / step}, "learning_rate": 0.0002, '
                f'"tokens": {step * 65536}, "tokens_per_second": 51234.56789, "peak_memory_bytes": 71234567890, '
                f'"time": {1.7e9 + step}}}\n'
            )
            log.write(f"step {step}: a line such as libraries print, with accents: é, ü, 步\n")
        metrics.write('{"step": ')
    return made


def follow_metrics(made: RunDir, steps: int) -> float:
    return peak_mib(run((sys.executable, "-c", FOLLOW, str(made.path), str(steps)), made.path)[1])


def follow_log(made: RunDir) -> float:
    """`distft logs -f` of rank 0 until everything has arrived; then the run ends, and with it the command."""
    wanted = made.rank_log(0).stat().st_size
    with subprocess.Popen((*DISTFT, "logs", "-f", str(made.path)), stdout=subprocess.PIPE) as process:
        while wanted > 0 and (block := process.stdout.read1(2**20)):
            wanted -= len(block)
        peak = peak_mib(Path(f"/proc/{process.pid}/status").read_text())
        update_status(made, state=State.COMPLETED)
        rest = process.stdout.read()
    assert (process.returncode, wanted, rest) == (0, 0, b""), (process.returncode, wanted)
    return peak


def peak_mib(proc_status: str) -> float:
    """VmHWM. Not wait4's ru_maxrss, which includes the parent's memory before exec."""
    line = next(line for line in proc_status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


# ---- logs --failed of 8,192 ranks


def failed(folder: Path, rounds: int) -> Iterator[Figure]:
    """One rank runs out of memory; later the others lose their peer. torchrun on each node reports who ended."""
    made, guilty = RunDir.create(str(folder), "wide"), RANKS // 2 + 1
    for rank in range(RANKS):
        kind, message = "DistBackendError", "NCCL error: remote process exited or there was a network error"
        if rank == guilty:
            kind, message = "OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB"
        trace = "Traceback (most recent call last):\n" + '  File "trainer.py", line 7, in step\n    loss()\n' * 30
        trace += f"{kind}: {message}\n"
        record = {"rank": rank, "host": f"big{rank // GPUS + 1}", "time": 1.7e9 + (rank != guilty) + rank / RANKS}
        record |= {"type": kind, "message": message, "user_error": False, "traceback": trace}
        made.rank_log(rank).write_text(f"rank {rank} starts\n" * 20 + trace)
        made.rank_error(rank).write_text(json.dumps(record))
    for node in range(NODES[-1]):
        ended = [f"  rank      : {rank} (local_rank: {rank % GPUS})" for rank in range(node * GPUS, (node + 1) * GPUS)]
        log = "".join(f"[{k}]:\n{rank}\n  exitcode  : 1 (pid: 7)\n" for k, rank in enumerate(ended))
        (made.logs / f"torchrun-{node}.log").write_text("W1001 torchrun says a line\n" * 20 + log)
    add_job_id(made, "4711")
    update_status(made, state=State.FAILED, job_id="4711", exit_status=1, reason=f"rank {guilty}: OutOfMemoryError")
    times = []
    for _ in range(rounds):
        took, shown = run((*DISTFT, "logs", "--failed", str(made.path)), folder)
        assert f"rank {guilty} on big{guilty // GPUS + 1} failed first" in shown, shown
        assert "hint: out of memory" in shown, shown
        times.append(took)
    yield seconds(f"logs --failed, {RANKS:,} ranks", times, FAILED_SECONDS)


if __name__ == "__main__":
    main()
