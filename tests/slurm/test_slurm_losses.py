"""The maths on a real four-node cluster: every strategy, on four nodes and on two, has the losses of one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from running import Result, distft
from slurm_cluster import Cluster
from slurm_site import CLUSTER, Site, on_path
from tiny import Tiny

pytestmark = pytest.mark.slurm
LAYOUTS = [(4, 1), (2, 2)]  # nodes, ranks a node
STRATEGIES = ["zero3", "zero2", "ddp", "fsdp", "hsdp"]
STEPS = ("--set", "training.num_train_epochs=null", "--set", "training.max_steps=4", "--set", "data.eval=null")
SEVERAL = Path(__file__).with_name("several")


@dataclass(frozen=True)
class Trained:
    """`runs`: by strategy and layout. `jobs`: what `scontrol show job` says of the job of each layout."""

    one_process: Result
    runs: dict[tuple[str, int, int], Result]
    jobs: list[str]


def train_all(folder: Path, tiny: Tiny) -> Trained:
    """The quickstart's LoRA recipe on its untrained model. A job for each layout, both at once and on the same nodes.

    The first strategy is launched; the ranks of its job train the run directories of the others too (several/).
    """
    from distft import quickstart

    quickstart.write_data(folder)
    quickstart.write_recipes(folder)
    subprocess.run([sys.executable, "-m", "distft.quickstart.model", str(folder)], check=True, capture_output=True)
    (folder / "base").symlink_to(folder / "base-untrained")
    with Cluster(folder / "slurm", mode=os.environ.get("DISTFT_SLURM_MODE")) as cluster:
        site = Site(cluster, folder / "site", tiny, env=on_path(SEVERAL))
        runs = {}
        for name, (nodes, ranks) in zip(("quickstart", "quickstart-2"), LAYOUTS, strict=True):
            for strategy in reversed(STRATEGIES):
                options = ["--nodes", str(nodes), "--gpus-per-node", str(ranks), *STEPS]
                options += ["--set", f"parallelism.strategy={strategy}"]
                options += ["--set", "parallelism.hsdp_shard_size=2"] if strategy == "hsdp" else []
                launched = strategy == STRATEGIES[0]
                run_dir = site.runs / name if launched else site.runs / "others" / name / strategy
                how = ["launch", "--detach"] if launched else ["render", "-o", str(run_dir)]
                site.run(how[0], str(folder / "recipe.yaml"), *CLUSTER, *options, *how[1:])
                runs[strategy, nodes, ranks] = Result(0, "", "", run_dir)
        done = distft("launch", "recipe.yaml", *STEPS, "--gpus-per-node", "1", "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
        one_process = Result(0, done.stdout, done.stderr, Path(json.loads(done.stdout)["run_dir"]))
        launched = [runs[(STRATEGIES[0], *layout)] for layout in LAYOUTS]
        for result in launched:
            status = site.ended(result.run_dir)
            assert status["state"] == "completed", (status, result.log())
        jobs = [site.cluster.run("scontrol", "show", "job", result.status["job_id"]).stdout for result in launched]
        return Trained(one_process, runs, jobs)


@pytest.mark.beside.with_args(train_all)
@pytest.mark.parametrize(("nodes", "ranks"), LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_losses_of_one_process(outcome: Trained, strategy: str, nodes: int, ranks: int) -> None:
    result, launched = outcome.runs[strategy, nodes, ranks], outcome.runs[STRATEGIES[0], nodes, ranks]
    ran = result.status["ran"]
    assert (ran["kind"], ran["world_size"], ran["backend"]) == (strategy, 4, "gloo")
    for column in ("loss", "grad_norm"):
        assert result.column(column) == pytest.approx(outcome.one_process.column(column), abs=1e-5)
    # One torchrun a node. Another strategy's job has the same script, and so the same command of torchrun.
    logs = sorted(path.name for path in (launched.run_dir / "logs").glob("torchrun-*.log"))
    assert logs == [f"torchrun-{node}.log" for node in range(nodes)]
    script, own = ((r.run_dir / "job.sbatch").read_text().replace(str(r.run_dir), "RUN") for r in (launched, result))
    assert own == script


@pytest.mark.beside.with_args(train_all)
def test_two_jobs_on_the_same_nodes_at_once(outcome: Trained) -> None:
    """Neither disturbs the other: their losses are looked at above."""
    times = [re.search(r"StartTime=(\S+) EndTime=(\S+)", job).groups() for job in outcome.jobs]
    assert max(start for start, _ in times) < min(end for _, end in times)
    nodes = [re.search(r"\bNodeList=(\S+)", job)[1] for job in outcome.jobs]
    assert nodes == ["node[1-4]", "node[1-2]"]
    assert [outcome.runs[(STRATEGIES[0], *layout)].run_dir.name for layout in LAYOUTS] == ["quickstart", "quickstart-2"]
