"""The files for people in ds_configs/, launch/accelerate/ and slurm/reference/: generated here, never read by distft.

python tools/reference_files.py ROOT           write them
python tools/reference_files.py ROOT --check   list those that differ; exit status 1 if any does
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from distft.config.cluster import Cluster, load_cluster
from distft.hardware.topology import Topology
from distft.jobs.job import SlurmJob
from distft.jobs.torchrun import RANK_ENVIRONMENT, torchrun_argv
from distft.runs.directory import RECIPE, RunDir
from distft.schedulers import slurm
from distft.strategies.accelerate import accelerate_config, needs
from distft.strategies.deepspeed import portable_config
from distft.strategies.kinds import KINDS

# ZeRO-1 with offload is left out: ZeRO-2 moves as much and keeps less on the GPU.
DEEPSPEED = {
    "zero1": ("zero1", "none"),
    "zero2": ("zero2", "none"),
    "zero2_offload": ("zero2", "optimizer"),
    "zero3": ("zero3", "none"),
    "zero3_offload": ("zero3", "all"),
}
ONE_NODE, TWO_NODES = Topology(1, 8), Topology(2, 8)
ACCELERATE = dict.fromkeys(("ddp", "zero1", "zero2", "zero3", "fsdp"), ONE_NODE) | {"hsdp": TWO_NODES}


def files(root: Path) -> dict[str, str]:
    """Path under the repository's root → contents. The job scripts come from the profiles in slurm/clusters/."""
    made = {
        f"ds_configs/{name}.json": json.dumps(portable_config(strategy=strategy, offload=offload), indent=2) + "\n"
        for name, (strategy, offload) in DEEPSPEED.items()
    }
    made |= {f"launch/accelerate/{name}.yaml": _yaml(name, topology) for name, topology in ACCELERATE.items()}
    return made | _job_scripts(root)


def _job_scripts(root: Path) -> dict[str, str]:
    made = {}
    for path in sorted((root / "slurm" / "clusters").glob("*.yaml")):
        cluster = load_cluster(str(path))
        folder = Path(cluster.runs_dir) / "example"
        job = _example_job(cluster, RunDir(folder))
        made[f"slurm/reference/{path.stem}.sbatch"] = slurm.render(job)
        if path.stem == "bare_metal":
            made["slurm/reference/array.sbatch"] = slurm.array_script(job, folder.with_name("example-sweep"), 4)
    return made


def _example_job(cluster: Cluster, run: RunDir) -> SlurmJob:
    """Four full nodes that train a recipe."""
    topology = Topology(4, cluster.node.gpus_per_node or 2)
    argv = torchrun_argv(cluster.python or "python", topology, "distft.train", [str(run.path)])
    env = RANK_ENVIRONMENT | {"DISTFT_CACHE": str(cluster.cache_dir)}
    return SlurmJob("example", run, topology, tuple(argv), env, {RECIPE: ""}, cluster)


def _yaml(strategy: str, topology: Topology) -> str:
    zero = KINDS[strategy].engine == "deepspeed"
    config = accelerate_config(
        strategy=strategy,
        offload="none",
        topology=topology,
        shard_size=topology.nproc_per_node,
        mixed_precision="bf16",
        device_type="cuda",
        ds_config_file=f"ds_configs/{strategy}.json" if zero else None,
    )
    command = f"accelerate launch --config_file launch/accelerate/{strategy}.yaml"
    if topology.nnodes == 1:
        head = [
            f"One node of {topology.nproc_per_node} GPUs; another number: --num_processes N.",
            f"launch/accelerate.sh {strategy} script.py ARGS, which looks first for what is needed; or",
            f"{command} script.py ARGS",
        ]
    else:
        head = [
            f"{topology.nnodes} nodes of {topology.nproc_per_node} GPUs; on node R, counted from 0:",
            f"launch/accelerate.sh {strategy} script.py ARGS, which looks first for what is needed; or",
            f"{command} --machine_rank R --main_process_ip FIRST_NODE script.py ARGS",
            "Another world size, M nodes of G GPUs: --num_machines M --num_processes M*G",
            "--parallelism_config_dp_replicate_size M --parallelism_config_dp_shard_size G.",
        ]
    if zero:
        head += [
            "Run it in the root of the repository: the path below is relative. The script sets the precision, or",
            "--mixed_precision bf16; accelerate refuses it in a file that has a deepspeed_config_file.",
        ]
    return "".join(f"# {line}\n" for line in head) + needs(config) + yaml.safe_dump(config, sort_keys=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/reference_files.py", description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="the repository's root")
    parser.add_argument("--check", action="store_true", help="write nothing; list what differs")
    options = parser.parse_args(argv)
    status = 0
    for name, text in files(options.root).items():
        path = options.root / name
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            print(f"{name}: differs from its generator; run: make reference")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
