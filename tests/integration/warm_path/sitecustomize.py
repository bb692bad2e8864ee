"""A stand-in for torchrun, which Python imports as it starts where warm.environment() is set.

`python -m torch.distributed.run ... -m distft.train RUN_DIR` on one node hands its job to the server of warm ranks, and
ends when they have. With another module for its ranks, or DISTFT_WARM_ONLY=torchrun, it is torchrun that the server
forks: importing torch takes it longer than its work, and the ranks that it starts are new processes as ever. Everything
else starts as ever.
"""

import os
import sys

HERE = __file__.rpartition("/")[0]


def stand_in(job: dict) -> int:
    """The exit status of the job. Signals go on to its ranks, which end also when this process is killed outright."""
    import json
    import signal
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["DISTFT_WARM_RANKS"])
        job |= {"cwd": os.getcwd(), "env": dict(os.environ)}  # noqa: PTH109
        socket.send_fds(server, [json.dumps(job).encode() + b"\n"], [1, 2])
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: server.send(bytes([number])))
        statuses = json.loads(server.makefile().read())
    for rank, status in enumerate(statuses if "run_dir" in job else []):
        print(f"rank {rank} of {job['run_dir']} ended with {status}", flush=True)
    return int(any(statuses))


def main() -> None:
    _, *options = sys.orig_argv
    if "DISTFT_WARM_RANKS" in os.environ and options[:2] == ["-m", "torch.distributed.run"]:
        if options[-3:-1] != ["-m", "distft.train"] or os.environ.get("DISTFT_WARM_ONLY") == "torchrun":
            os._exit(stand_in({"ranks": 1, "torchrun": options[2:]}))
        if "--nnodes=1" in options:
            (ranks,) = (option.split("=")[1] for option in options if option.startswith("--nproc-per-node="))
            os._exit(stand_in({"ranks": int(ranks), "run_dir": options[-1]}))
    for folder in sys.path:  # the sitecustomize that this one is in front of
        file = f"{folder}/sitecustomize.py"
        if folder != HERE and os.access(file, os.R_OK):
            with open(file) as text:
                exec(compile(text.read(), file, "exec"), {"__name__": "sitecustomize"})
            return


main()
