"""Jobs on a real four-node SLURM cluster: submitted, followed, cancelled, refused; scripts that stand on their own.

The jobs are real up to the training loop, of which most run a stub (stub/): what is trained, test_slurm_losses.py and
test_recovery.py look at, and test_slurm_docs.py starts real training in every way there is.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import slurm_cluster
import yaml
from running import Result, distft
from slurm_cluster import Cluster
from slurm_site import CLUSTER, LONG, STUB, Site, on_path, until
from tiny import Tiny

from distft.runs.directory import RunDir
from distft.runs.status import State, read_status

pytestmark = pytest.mark.slurm


# ---- looking after a run


def test_detach_status_logs_cancel(site: Site) -> None:
    site.recipe(**LONG)
    result = site.launch("--detach", nodes=2)
    job_id = json.loads(result.stdout)["job_id"]
    assert job_id.isdigit()
    waiting = site.launch("--detach", "--after", "tiny", nodes=1)
    site.trains(result.run_dir)
    status = site.status(result.run_dir)
    assert (status["state"], status["job_id"], status["nodes"]) == ("running", job_id, "node[1-2]")
    queued = site.status(waiting.run_dir)
    assert (queued["state"], queued["reason"]) == ("queued", "Dependency")
    text = site.run("status", "--output-dir", str(site.runs)).stdout
    assert "running" in text and "queued" in text and "Dependency" in text
    assert "stub of the training loop, rank 1" in site.run("logs", str(result.run_dir), "--rank", "1").stdout
    site.run("cancel", str(result.run_dir))
    status = site.status(result.run_dir)
    assert (status["state"], status["reason"]) == ("cancelled", "cancelled by distft cancel")
    assert site.cluster.run("squeue", "-h", "-j", job_id, "-t", "running,pending", check=False).stdout == ""
    # What waited for it never starts, and says so.
    ended = site.wait(waiting.run_dir, lambda status: status["state"] != "queued")
    assert ended["state"] == "cancelled"


def test_ctrl_c_leaves_the_job(site: Site) -> None:
    site.share_data()
    site.recipe(**LONG)
    command = [sys.executable, "-m", "distft", "launch", "recipe.yaml", "--cluster", "site.yaml"]
    env = {**site.cluster.env(), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        cwd=site.folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in a background job
    )
    run_dir = site.runs / "tiny"
    until(lambda: (run_dir / "metrics.jsonl").exists() or process.poll() is not None, RunDir(run_dir))
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "keeps running; follow it again with: distft logs -f" in said
    assert "Traceback" not in said
    assert site.status(run_dir)["state"] == "running"
    site.run("cancel", str(run_dir))


def test_a_rank_that_fails_is_named(site: Site) -> None:
    """The launcher's output has the first failing rank's own words, and so has `logs --failed`, out of all files."""
    (site.folder / "own.py").write_text(
        "import os, time\nif os.environ['RANK'] == '1':\n    raise ValueError('the disk said no')\ntime.sleep(60)\n"
    )
    done = site.run("launch", "--cluster", "site.yaml", "--nodes", "2", "--json", "--", "own.py", expect=1)
    run_dir = Path(json.loads(done.stdout)["run_dir"])
    failed = site.run("logs", str(run_dir), "--failed").stdout
    for text in (done.stderr, failed):
        assert "rank 1 on node2 failed first" in text
        assert "ValueError: the disk said no" in text
    assert site.status(run_dir)["reason"] == "rank 1: ValueError: the disk said no"


def test_a_node_that_fails(site: Site) -> None:
    site.recipe(**LONG)
    run_dir = site.launch("--detach", nodes=2).run_dir
    site.trains(run_dir)
    site.cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    try:
        status = site.wait(run_dir, lambda status: status["state"] != "running")
        assert status["state"] == "failed"
        assert "node" in status["reason"]
        assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"  # kept when SLURM forgets
    finally:
        site.cluster.run("scontrol", "update", "nodename=node2", "state=resume", check=False)
        site.cluster.wait_idle(60)


# ---- what is asked is wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--partition", "nowhere"], ["invalid partition", "set slurm.partition, or --partition"]),
        (["--nodes", "8"], ["ask for fewer --nodes"]),
        (["--partition", "short", "--time", "30"], ["time limit", "ask for less with --time"]),
        (["--constraint", "h100"], ["slurm.constraint"]),
        (["--reservation", "mine"], ["set slurm.reservation"]),
        (
            ["--time", "tomorrow"],
            ['slurm.time: got "tomorrow", need a string such as 30 (minutes)', "(--time tomorrow)"],
        ),
        (["--partition", "a b'; id"], ["slurm.partition: got", "without spaces or quotes"]),
        (["--after", "999999"], ["--after: SLURM does not know job 999999"]),
        (["--after", "nothing"], ["no run directory of that name"]),
    ],
)
def test_refused_before_anything_is_queued(site: Site, arguments: list[str], said: list[str]) -> None:
    done = site.run("launch", "recipe.yaml", "--cluster", "site.yaml", *arguments, expect=2)
    for words in said:
        assert words in done.stderr.replace("Invalid", "invalid")
    assert not site.runs.exists()
    assert site.cluster.run("squeue", "-h", "-t", "pending,running").stdout == ""


def test_a_controller_that_cannot_be_reached(site: Site, tmp_path: Path) -> None:
    site.profile(slurm={"sbatch": ["--hold"]})
    run_dir = site.launch("--detach", nodes=1).run_dir
    conf = tmp_path / "slurm.conf"
    lines = site.cluster.conf.read_text().splitlines()
    nobody = "SlurmctldHost=nobody(127.0.0.1)\nSlurmctldPort=9\nMessageTimeout=3\nTCPTimeout=1"
    conf.write_text(
        "\n".join(
            [
                *(
                    line
                    for line in lines
                    if not line.startswith(("SlurmctldPort", "SlurmctldHost", "MessageT", "TCPT"))
                ),
                nobody,
            ]
        )
    )
    # not the cluster's wrappers, which enter its network
    env = {**site.cluster.env(), "SLURM_CONF": str(conf), "PATH": os.environ["PATH"]}
    done = distft("launch", "recipe.yaml", "--cluster", "site.yaml", cwd=site.folder, env=env)
    assert done.returncode == 2
    assert "the controller does not answer" in done.stderr
    assert not (site.runs / "tiny-2").exists()
    done = distft("status", str(run_dir), cwd=site.folder, env=env)
    assert done.returncode == 0, done.stderr
    assert "tiny" in done.stdout


def test_no_slurm_here(site: Site) -> None:
    env = {**site.cluster.env(), "PATH": str(Path(sys.executable).parent)}
    done = distft("launch", "recipe.yaml", "--cluster", "site.yaml", cwd=site.folder, env=env)
    assert done.returncode == 2
    assert "sbatch: no such command here; run distft on a host with SLURM's client commands" in done.stderr


def test_a_full_runs_dir(namespaces: Cluster, site: Site) -> None:
    """For the launcher alone: what the nodes lack, the preflight finds."""
    site.runs.mkdir()
    launch = f"{sys.executable} -m distft launch recipe.yaml --cluster site.yaml"
    full = f"mount -t tmpfs -o size=8k tmpfs {site.runs} && {launch}; status=$?; ls -A {site.runs}; exit $status"
    command = ["unshare", "--mount", "bash", "-c", full]
    env = {**site.cluster.env(), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=site.folder, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "tiny" not in done.stdout.splitlines()
    assert namespaces.run("squeue", "-h", "-t", "pending,running").stdout == ""


def test_accounting(tiny: Tiny, tmp_path: Path) -> None:
    """With slurmdbd: sacct knows what squeue has forgotten, and accounts are checked before anything is queued."""
    if why := slurm_cluster.missing(accounting=True):
        pytest.skip(why)
    extra = "MinJobAge=2\nAccountingStorageEnforce=associations"
    with Cluster(tmp_path / "slurm", nodes=2, accounting=True, extra_conf=extra) as cluster:
        cluster.run("sacctmgr", "-i", "add", "account", "mine")
        cluster.run("sacctmgr", "-i", "add", "user", "root", "account=mine")
        site = Site(cluster, tmp_path / "site", tiny, stub=True, slurm={"account": "mine", "cpus_per_task": 1})
        site.recipe(**LONG)
        run_dir = site.launch("--detach", nodes=1).run_dir
        job = (run_dir / "logs" / "jobs").read_text().split()[0]
        cluster.run("scancel", job)
        deadline = time.monotonic() + 60
        while job in cluster.run("squeue", "-h", "-t", "all", "-o", "%i").stdout.split():
            assert time.monotonic() < deadline
            time.sleep(1)
        status = site.ended(run_dir)
        assert (status["state"], status["slurm_state"]) == ("cancelled", "CANCELLED")
        said = site.run("launch", "recipe.yaml", *CLUSTER, "--account", "theirs", expect=2).stderr
        assert "fix: set slurm.account" in said
        assert "ok: slurm.account mine" in site.run("cluster", "check", "site.yaml").stdout
        site.profile(slurm={"account": "theirs"})
        assert (
            "failed: slurm.account theirs: not one of mine"
            in site.run("cluster", "check", "site.yaml", expect=2).stdout
        )


def test_profiles_by_name(site: Site) -> None:
    home = site.folder / "config"
    (home / "distft" / "clusters").mkdir(parents=True)
    (site.folder / "site.yaml").rename(home / "distft" / "clusters" / "mine.yaml")
    env = site.cluster.env() | {"XDG_CONFIG_HOME": str(home)}
    done = distft("launch", "recipe.yaml", "--cluster", "mein", cwd=site.folder, env=env)
    assert (done.returncode, "no such profile: mein; did you mean mine?" in done.stderr) == (2, True)
    done = distft("launch", "recipe.yaml", "--dry-run", cwd=site.folder, env=env | {"DISTFT_CLUSTER": "mine"})
    assert "#SBATCH --nodes=1" in done.stdout
    done = distft("cluster", "init", cwd=site.folder, env=env)
    assert f"wrote {home}/distft/clusters/test.yaml" in done.stdout
    assert distft("cluster", "check", "test", cwd=site.folder, env=env).returncode == 0


def test_all_problems_of_a_profile(site: Site) -> None:
    site.profile(
        node={"gpus": 8}, slurm={"time": "soon", "sbatch": ["mail"]}, env={"A B": "x"}, runs_dir="runs", template="x.j2"
    )
    done = site.run("validate", "recipe.yaml", "--cluster", "site.yaml", expect=2)
    for words in (
        "node.gpus: unknown key; did you mean",
        "node.gpus_per_node: missing",
        'slurm.time: got "soon"',
        "slurm.sbatch[0]: got",
        "need an absolute path that all nodes share",
        "template: no such file",
        "env",
    ):
        assert words in done.stderr, words


# ---- preflight


def test_preflight_names_a_bad_node_and_goes_on_without_it(namespaces: Cluster, site: Site) -> None:
    site.runs.mkdir()
    site.profile(preflight=True, max_requeues=1)
    namespaces.mount_over("node2", site.runs)
    try:
        result = site.launch("--detach", nodes=2)
        assert (
            "warning: checkpoint.save_steps is not set: after a fault the run restarts from the beginning"
            in result.stderr
        )
        # SLURM holds back for two minutes what goes into the queue again.
        site.wait(result.run_dir, lambda status: "BeginTime" in (status["reason"] or ""))
        [job] = {*(result.run_dir / "logs" / "jobs").read_text().split()}
        site.cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now")
        site.ended(result.run_dir)
    finally:
        namespaces.unmount("node2", site.runs)
    assert result.status["state"] == "completed"
    # What the preflight finds counts against max_requeues, as all that has the job requeued.
    [attempt] = result.status["attempts"]
    assert (attempt["cause"], attempt["bad_nodes"], attempt["step"]) == ("bad_nodes", ["node2"], 0)
    assert "is its file system mounted?" in attempt["reason"]
    first, second = (
        (result.run_dir / "logs" / f"slurm-{job}.log").read_text().split(f"continues as job {job}, without node2")
    )
    assert "preflight: bad node node2: " in first and "is its file system mounted?" in first
    assert "preflight: 2 nodes passed" in second
    report = json.loads((result.run_dir / "logs" / "preflight.json").read_text())
    assert len(report["nodes"]) == 2 and "node2" not in report["nodes"]


def test_preflight_without_budget_fails_saying_which_node(namespaces: Cluster, site: Site) -> None:
    import torch

    site.profile(preflight=True)
    namespaces.mount_over("node1", Path(torch.__file__).parent)
    try:
        result = site.launch(nodes=2, expect=1)
    finally:
        namespaces.unmount("node1", Path(torch.__file__).parent)
    assert "preflight: bad node node1: versions: " in result.stderr
    assert result.status["reason"].startswith("preflight: bad node node1")
    assert not (result.run_dir / "metrics.jsonl").exists()
    shown = ""

    def ended_there() -> bool:  # until then, EndTime is when its time is up
        nonlocal shown
        shown = site.cluster.run("scontrol", "show", "job", result.status["job_id"]).stdout
        return "JobState=RUNNING" not in shown

    until(ended_there, RunDir(result.run_dir))
    times = re.search(r"StartTime=(\S+) EndTime=(\S+)", shown)
    began, ended = (datetime.fromisoformat(time) for time in times.groups())
    assert (ended - began).total_seconds() < 60


def test_preflight_counts_the_gpus(site: Site) -> None:
    """The cluster's GPUs are no GPUs for torch: SLURM hands them out, and the preflight finds none."""
    site.profile(preflight=True, node={"gpus_per_node": 2, "gpu": "H100"})
    result = site.launch(nodes=2, expect=1)
    assert "#SBATCH --gpus-per-node=2\n" in (result.run_dir / "job.sbatch").read_text()
    for node in ("node1", "node2") if site.cluster.mode == "namespaces" else ("",):
        assert f"bad node {node}" in result.stderr
    assert "the job wants 2 GPUs, and 0 are visible here" in result.stderr
    assert "preflight: bad node" in site.run("logs", str(result.run_dir)).stdout


# ---- files that stand on their own


HOSTILE = 'it\'s $(touch pwned) "q" `id` %j #x ünï'


def test_hostile_paths_and_values(site: Site) -> None:
    hostile = site.folder / HOSTILE
    site.runs = hostile / "runs"
    setup = """test "$HOSTILE" = 'x' || export SETUP="done\""""
    site.profile(python=sys.executable, env={"HOSTILE": HOSTILE + "\nnewline"}, setup=[setup])
    (site.folder / "ünï.py").write_text(
        "import json, os, sys\n"
        "if os.environ['RANK'] == '0':\n"
        "    open(sys.argv[1], 'w').write(json.dumps([os.environ['HOSTILE'], os.environ['SETUP'], sys.argv[2:]]))\n"
    )
    arguments = [str(site.folder / "said.json"), HOSTILE, "", "a\nb"]
    site.run("launch", "--cluster", "site.yaml", "--nodes", "2", "--", "ünï.py", *arguments)
    said = json.loads((site.folder / "said.json").read_text())
    assert said == [HOSTILE + "\nnewline", "done", arguments[1:]]
    assert not list(site.folder.rglob("pwned"))
    assert (site.runs / "ünï" / "logs" / "torchrun-0.log").is_file()
    site.profile(runs_dir=str(site.folder / "back\\slash"))
    done = site.run("launch", "recipe.yaml", "--cluster", "site.yaml", expect=2)
    assert "cannot hold control characters or a backslash" in done.stderr


def test_render_needs_no_distft_where_it_is_submitted(site: Site) -> None:
    site.share_data()
    site.run("render", "recipe.yaml", "--cluster", "site.yaml", "--nodes", "2", "-o", "out")
    done = site.run("render", "recipe.yaml", "--cluster", "site.yaml", "-o", "out", expect=2)
    assert "exists already" in done.stderr
    site.cluster.run("sbatch", str(site.folder / "out" / "job.sbatch"), cwd="/")
    status = site.ended(site.folder / "out")
    assert status["state"] == "completed"
    assert status["job_id"]


def test_inside_an_allocation(site: Site) -> None:
    site.share_data()
    command = [sys.executable, "-m", "distft", "launch", "recipe.yaml", "--cluster", "site.yaml", "--json"]
    done = site.cluster.run("salloc", "-N2", "--cpus-per-task=2", *command, cwd=site.folder, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert result["state"] == "completed"
    assert result["ran"]["world_size"] == 2
    assert "step 4/4" in done.stderr


def test_launch_slurm_sh(site: Site) -> None:
    """The ladder's last step: a plain sbatch script, no profile."""
    script = Path(__file__).parents[2] / "launch" / "slurm.sh"
    bin_folder = site.folder / "bin"
    bin_folder.mkdir()
    (bin_folder / "distft").write_text(f'#!/bin/sh\nexec {sys.executable} -m distft "$@"\n')
    (bin_folder / "distft").chmod(0o755)
    env = {**os.environ, "PATH": f"{bin_folder}:{site.cluster.bin}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    env |= {"SLURM_CONF": str(site.cluster.conf), **on_path(STUB)}
    site.share_data()
    options = ["--nodes=2", "--cpus-per-task=2", "--parsable"]
    subprocess.run(
        ["sbatch", *options, script, "recipe.yaml"], cwd=site.folder, env=env, check=True, capture_output=True
    )
    run = RunDir(site.runs / "tiny")
    until(lambda: read_status(run).finished, run)
    assert read_status(run).state is State.COMPLETED, [path.read_text() for path in site.folder.glob("distft-*.log")]
    assert read_status(run).ran["world_size"] == 2


def test_a_template_of_ones_own(site: Site) -> None:
    (site.folder / "own.jinja").write_text(
        '{% extends "job.sbatch" %}\n'
        '{% block setup %}{{ super() }}export GREETING={{ name ~ "\'s $(id)" }}\n{% endblock %}\n'
    )
    (site.folder / "own.py").write_text(
        f"import os\nopen({str(site.folder / 'said')!r}, 'w').write(os.environ['GREETING'])\n"
    )
    site.run("launch", "--cluster", "site.yaml", "--template", "own.jinja", "--", "own.py")
    assert (site.folder / "said").read_text() == "own's $(id)"
    for text, said in (
        ('{% extends "job.sbatch" %}{% block setup %}{{ nmae }}{% endblock %}', "'nmae' is undefined"),
        ('{% extends "job.sbatch" %}\n{% block setup %}', "own.jinja:2: "),
        ('{% extends "other" %}', 'can extend "job.sbatch" only'),
    ):
        (site.folder / "own.jinja").write_text(text)
        done = site.run("launch", "recipe.yaml", "--cluster", "site.yaml", "--template", "own.jinja", expect=2)
        assert said in done.stderr


# ---- the site


def test_cluster_init_and_check(site: Site) -> None:
    done = site.run("cluster", "init", "first.yaml")
    assert "review it" in done.stdout
    written = yaml.safe_load((site.folder / "first.yaml").read_text())
    assert written["slurm"]["partition"] == "debug"
    assert (written["node"]["gpus_per_node"], written["slurm"]["cpus_per_task"]) == (2, 8)
    assert "already exists" in site.run("cluster", "init", "first.yaml", expect=2).stderr
    right = site.run("cluster", "check", "first.yaml", "--nodes", "4").stdout
    assert "ok: partition debug" in right
    assert "wrong" not in right
    written["slurm"] |= {"partition": "short", "time": "1:00:00", "cpus_per_task": 9}
    written["node"] |= {"gpus_per_node": 3, "gpu_type": "h100"}
    (site.folder / "first.yaml").write_text(yaml.safe_dump(written))
    wrong = site.run("cluster", "check", "first.yaml", "--nodes", "5", expect=2).stdout
    for words in (
        "failed: node.gpus_per_node 3, the partition has 2 GPUs per node",
        "failed: node.gpu_type h100: the cluster lists none",
        "failed: slurm.cpus_per_task 9, the partition has 8 cores per node",
        "failed: slurm.time 1:00:00, the partition allows 5:00",
        "failed: nodes 5, the partition has 4 nodes",
        "failed: sbatch --test-only: SLURM refuses the job",
    ):
        assert words in wrong
    answer = json.loads(site.run("cluster", "check", "first.yaml", "--json", expect=2).stdout)
    assert answer["ok"] is False


def test_the_starter_template_runs(site: Site) -> None:
    site.run("slurm", "template", "-o", "own.jinja")
    assert site.run("slurm", "template").stdout == (site.folder / "own.jinja").read_text()
    (site.folder / "own.py").write_text("")
    site.run("launch", *CLUSTER, "--template", "own.jinja", "--", "own.py")
    assert "run own starts on node1" in next((site.runs / "own" / "logs").glob("slurm-*.log")).read_text()
    assert "--mail-type=FAIL" in (site.runs / "own" / "job.sbatch").read_text()


def test_sweep(site: Site) -> None:
    arguments = ["--sweep", "training.learning_rate=0.01,0.0001", *CLUSTER]
    shown = site.run("launch", "recipe.yaml", *arguments, "--dry-run").stdout
    assert "#SBATCH --array=0-1" in shown
    assert not site.runs.exists()
    assert "lora.r: got 0" in site.run("launch", "recipe.yaml", *CLUSTER, "--sweep", "lora.r=8,0", expect=2).stderr
    site.share_data()
    done = site.run("launch", "recipe.yaml", *arguments, "--json")
    answer = json.loads(done.stdout)
    assert [run["state"] for run in answer["runs"]] == ["completed", "completed"]
    results = [Result(0, "", "", Path(run["run_dir"])) for run in answer["runs"]]
    assert max(results[0].column("learning_rate")) == pytest.approx(0.01)
    assert max(results[1].column("learning_rate")) == pytest.approx(0.0001)
    table = site.run("status", answer["sweep"]).stdout.splitlines()
    assert len(table) == 3
    assert table[1].split() == [
        "0",
        "completed",
        "4",
        f"{results[0].column('loss')[-1]:.4f}",
        "training.learning_rate=0.01",
    ]
    assert "tiny-sweep/1 " in site.run("status", *CLUSTER).stdout
