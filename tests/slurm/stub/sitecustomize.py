"""A STUB of the training loop: it makes steps, saves and stops as distft.train.run does, and trains nothing.

For tests whose subject is the job and not the training. Python imports this file at its start where its folder is on
PYTHONPATH. All else is real: SLURM, the job script, torchrun, and distft.train up to the loop, with its log, its error
file and its signals. A rank starts in 0.4 s of CPU instead of 3.

STUB_STEP_SECONDS: how long a step takes. STUB_DIES="RANK STEP": that rank kills itself before that step.
"""

import sys
from types import ModuleType


class Peers:
    """The other ranks, as gloo is to real ones: all meet at every step, and one that is gone fails the others."""

    def __init__(self, run, rank, world):
        import json
        import os
        import socket
        import time

        address = run.logs / "stub-address"
        self.sockets, self.first = [], rank == 0
        if rank == 0 and world > 1:
            server = socket.create_server(("", 0))
            address.write_text(json.dumps([os.environ["MASTER_ADDR"], server.getsockname()[1]]))
            self.sockets = [server.accept()[0] for _ in range(world - 1)]
        while rank > 0 and not self.sockets:
            try:  # until it is this attempt's address
                self.sockets = [socket.create_connection(json.loads(address.read_text()))]
            except (OSError, ValueError):
                time.sleep(0.05)

    def largest(self, value):
        """An all-reduce of a number from 0 to 255."""
        if self.first:
            value = max([value, *(self._receive(peer) for peer in self.sockets)])
        for peer in self.sockets:
            peer.sendall(bytes([value]))
        return value if self.first or not self.sockets else self._receive(self.sockets[0])

    def _receive(self, peer):
        if not (answer := peer.recv(1)):
            raise RuntimeError("Connection closed by peer")  # gloo's words
        return answer[0]


def train(run, plan, stopping):
    """In place of distft.train.run.train."""
    import hashlib
    import json
    import os
    import signal
    import time

    from distft.config.loading import load_recipe
    from distft.runs import checkpoints
    from distft.runs.metrics import cut_metrics
    from distft.runs.status import State, update_status
    from distft.runs.stop_file import stop_asked

    recipe, rank, world = load_recipe(run.recipe), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seconds = float(os.environ.get("STUB_STEP_SECONDS", "0.01"))
    dies = os.environ.get("STUB_DIES")
    saved = checkpoints.complete(run)
    done, steps = saved[0].step if saved else 0, recipe.training.max_steps
    peers = Peers(run, rank, world)
    if rank == 0:
        cut_metrics(run, done)
        nodes = os.environ.get("SLURM_JOB_NODELIST")
        ran = {"kind": plan["strategy"], "world_size": world, "backend": "stub"}
        state = {"state": State.RUNNING, "step": done, "max_steps": steps, "started": time.time(), "nodes": nodes}
        update_status(run, **state, ran=ran)
    print(f"stub of the training loop, rank {rank}: continues after step {done}", file=sys.stderr, flush=True)

    def save(step):
        folder = run.checkpoints / f"step-{step}"
        work = folder.with_name(f".{folder.name}")
        work.mkdir(parents=True)
        (work / "stub").write_text(str(step))
        files = {"stub": {"bytes": len(str(step)), "sha256": hashlib.sha256(str(step).encode()).hexdigest()}}
        manifest = {"schema": checkpoints.SCHEMA, "step": step, "files": files, "world_size": world}
        manifest |= {"strategy": plan["strategy"], "identity": checkpoints.identity(recipe)}
        (work / checkpoints.MANIFEST).write_text(json.dumps(manifest))
        work.rename(folder)

    stopping.training, stopped = True, False
    for step in range(done + 1, steps + 1):
        if dies == f"{rank} {step}":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        stopped = peers.largest(stopping.why is not None)
        if rank == 0:
            line = {"step": step, "loss": 1 / step, "grad_norm": 1.0, "learning_rate": recipe.learning_rate}
            line |= {"tokens": step, "tokens_per_second": 1.0, "peak_memory_bytes": 1, "time": time.time()}
            with run.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if stopped or (recipe.checkpoint.save_steps and step % recipe.checkpoint.save_steps == 0):
                save(step)
            if stopped or step % 10 == 0 or step == 1:
                update_status(run, step=step)
        if stopped:
            break
    if rank == 0 and stopped:
        update_status(run, stop_reason=stopping.why or stop_asked(run) or "asked of another rank")
    elif rank == 0:
        run.final.mkdir()
        update_status(run, state=State.COMPLETED, step=steps, ended=time.time(), reason=None)
    peers.largest(0)


loop, remedies = ModuleType("distft.train.run"), ModuleType("distft.train.cpu_ranks")
loop.train, loop.leave, remedies.apply = train, lambda: None, lambda: None
sys.modules |= {loop.__name__: loop, remedies.__name__: remedies}
