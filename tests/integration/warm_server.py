"""A process that has imported the training stack, and forks the ranks of jobs on request: see warm.py.

Nothing else happens here: no second thread, no process group, nothing computed. So every rank begins as one of
torchrun's that has imported the same modules. Each job has an agent, as torchrun's: the parent of its ranks, in which
their store is. Where the ranks are a user's script, the job is torchrun itself, which then starts them as ever.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

# What ranks import only once they train: the model's class, and what an engine, tuning or optimizer asks for.
LATER = (
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.triton_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "numpy.ctypeslib",
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "torch._subclasses.schema_check_mode",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.profiler._cupti_monitor",
    "transformers.integrations.bitsandbytes",
    "transformers.models.llama.modeling_llama",
)
KILL_SECONDS = 30  # after SIGTERM, as torchrun's


def import_stack() -> None:
    """Import what ranks of all strategies import, and start no thread by it."""
    from distft.train import cpu_ranks, worker

    with worker.importing():
        for name in ("bitsandbytes", "deepspeed.runtime.zero.muon.original_muon"):
            cpu_ranks._import_uncompiled(name)  # as cpu_ranks.apply() does, which is for each rank to call
        for name in LATER:
            importlib.import_module(name)

        import distft.train.__main__
        import distft.train.run  # noqa: F401
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # a thousand patterns, compiled with the first model
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads: a fork would lose all but one, with what they have locked"


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork an agent for each job that comes in, until the tests are over. Returns the job in each of its ranks."""
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            sys.exit()
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return agent(client)
        client.close()


def agent(client: socket.socket) -> dict[str, Any]:
    """Fork a job's ranks and wait for them. Ends this process; returns only in the ranks."""
    line, descriptors, _, _ = socket.recv_fds(client, 2**20, 2)
    while not line.endswith(b"\n"):
        line += client.recv(2**20)
    job = json.loads(line)
    for number, descriptor in enumerate(descriptors, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    pids, ports = {}, []
    for rank in range(job["ranks"]):
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            client.close()
            os.close(write)
            become(job, rank, os.read(read, 8).decode())
            return job
        os.close(read)
        pids[pid], ports = rank, [*ports, write]
    import torch.distributed as dist  # threads only now: nothing is forked any more

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for write in ports:
        os.write(write, str(store.port).encode())
    client.send(json.dumps(collect(pids, client)).encode())
    os._exit(0)


def become(job: dict[str, Any], rank: int, port: str) -> None:
    """Give a forked process the environment that torchrun gives a rank, or torchrun itself."""
    import torch

    os.environ.clear()
    os.environ.update(job["env"])
    if "torchrun" in job:
        return
    local = {"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RESTART_COUNT": 0}
    sizes = {f"{of}WORLD_SIZE": job["ranks"] for of in ("", "LOCAL_", "ROLE_")} | {"GROUP_WORLD_SIZE": 1}
    master = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in (local | sizes | master).items()})
    torch.set_num_threads(1)  # where more tests run than there are cores, two threads wait for each other at every step


def collect(pids: dict[int, int], client: socket.socket) -> list[int]:
    """Exit statuses by rank, -N after signal N. When a rank fails or the client is gone, the others are ended."""
    statuses: dict[int, int] = {}
    deadline = None
    while len(statuses) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[pids[pid]] = os.waitstatus_to_exitcode(status)
        asked: bytes | None = None
        if client and select.select([client], [], [], 0 if pid else 0.01)[0]:
            asked = client.recv(1)
            if not asked:
                client = None
        if deadline is None and (asked is not None or any(statuses.values())):
            deadline = time.monotonic() + KILL_SECONDS
            kill(pids, statuses, asked[0] if asked else signal.SIGTERM)
        elif deadline is not None and time.monotonic() > deadline:
            kill(pids, statuses, signal.SIGKILL)
    return [statuses[rank] for rank in range(len(pids))]


def kill(pids: dict[int, int], ended: dict[int, int], number: int) -> None:
    for pid, rank in pids.items():
        if rank not in ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def customize() -> None:
    """Run the sitecustomize that a test has put in front: a rank of torchrun's would have run it as it started."""
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        file = Path(folder, "sitecustomize.py")
        if file.exists() and file.parent.name != "warm_path":
            exec(compile(file.read_text(), str(file), "exec"), {"__name__": "sitecustomize"})
            return


def torchrun(options: list[str]) -> NoReturn:
    """Run torchrun, which starts ranks that import all for themselves."""
    from torch.distributed import run

    status = 1
    try:
        run.main(options)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)  # without the exit handlers of what it would not have imported


def record_rows(job: dict[str, Any]) -> None:
    """Have this rank write a line for each step into logs/samples-RANK.jsonl: the tokens of its rows."""
    from distft.train.trainer import RecipeTrainer

    path = Path(job["run_dir"], "logs", f"samples-{os.environ['RANK']}.jsonl")
    original = RecipeTrainer.get_batch_samples

    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        batches, tokens = original(self, *args, **kwargs)
        rows = [[i for i in row if i != 0] for batch in batches for row in batch["input_ids"].tolist()]
        with path.open("a") as file:
            file.write(json.dumps({"step": self.state.global_step + 1, "rows": rows}) + "\n")
        return batches, tokens

    RecipeTrainer.get_batch_samples = get_batch_samples


if __name__ == "__main__":
    import_stack()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{sys.argv[1]}.new")
        listener.listen()
        Path(f"{sys.argv[1]}.new").rename(sys.argv[1])
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # agents that have ended leave nothing
        job = serve(listener)
    if "torchrun" in job:
        torchrun(job["torchrun"])
    customize()
    if "DISTFT_RECORD_ROWS" in os.environ:
        record_rows(job)
    sys.argv = ["distft.train", job["run_dir"]]
    from distft.train.__main__ import main

    main()
