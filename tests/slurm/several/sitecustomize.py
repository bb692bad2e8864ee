"""The ranks of one job train its run directory RUNS/NAME, and then those in RUNS/others/NAME.

Importing the training stack takes longer than training a tiny model. With this file's folder on PYTHONPATH (Python
imports it at its start) a rank imports the stack once and then forks: each run directory is trained by a new process
that runs all of distft.train, and in which nothing was computed or connected before. The strategies may differ.
"""

import sys
from types import ModuleType


def train(run, plan, stopping):
    """In place of distft.train.run.train, in the rank."""
    import os
    import traceback

    for module in (loop, remedies):
        del sys.modules[module.__name__]
    from distft.train import cpu_ranks, worker

    with worker.importing():
        for name in ("bitsandbytes", "deepspeed.runtime.zero.muon.original_muon"):
            cpu_ranks._import_uncompiled(name)
        import deepspeed  # noqa: F401

        import distft.train.__main__
        import distft.train.run
    others = run.path.parent / "others" / run.path.name
    for number, path in enumerate([run.path, *sorted(others.iterdir())]):
        if (child := os.fork()) == 0:
            try:
                enter(number)
                sys.argv[1] = str(path)
                distft.train.__main__.main()
            except BaseException as error:
                worker.record_error(run, int(os.environ["RANK"]), error)
                traceback.print_exc()
                os._exit(1)
            worker._leave()
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"{path}: this rank failed")


def enter(number):
    """Make a forked process a rank that has done nothing yet: no variables of a strategy, a store without keys."""
    import os

    import torch.distributed as dist

    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG"))]:
        del os.environ[name]
    rendezvous = sys.modules["torch.distributed.rendezvous"]  # the package has a function of that name
    create = rendezvous._create_c10d_store
    rendezvous._create_c10d_store = lambda *args, **kwargs: dist.PrefixStore(f"run {number}", create(*args, **kwargs))


loop, remedies = ModuleType("distft.train.run"), ModuleType("distft.train.cpu_ranks")
loop.train, loop.leave, remedies.apply = train, lambda: None, lambda: None
sys.modules |= {loop.__name__: loop, remedies.__name__: remedies}
