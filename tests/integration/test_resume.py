"""A run goes on from its checkpoint under any strategy at any width as if nothing had happened."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jobs import FP32, SAVED, STEPS, STRATEGIES, Job, alone, assert_ran
from running import Result, create, distft, first_on_path, inject, launch
from safetensors import safe_open
from safetensors.torch import load_file
from slurm_cluster import namespaces_work
from tiny import Tiny
from warm import WarmRanks

from distft.runs import checkpoints, processes
from distft.runs.directory import RunDir
from distft.runs.failure import rank_errors
from distft.runs.metrics import last_metrics
from distft.runs.status import State, read_status, update_status

JOBS = [
    Job(strategy, ranks, tuning, changes)
    for tuning in ("lora", "full", "nf4")
    for strategy, ranks, changes in [("ddp", 1, {}), *STRATEGIES]
    if (strategy, ranks) != ("ddp", 4)
    # 4-bit weights where a user would have them.
    and (tuning != "nf4" or (ranks <= 2 and not changes and strategy != "zero1"))
]


def sources(target: Job) -> list[Job]:
    """A star: a single process continues all others, and they continue it. And across: from 2 ranks to 4, and back."""
    same = [job for job in JOBS if job.tuning == target.tuning]
    if target == alone(target.tuning):
        return same
    across = [job for job in same if job.ranks not in (1, target.ranks)]
    itself = [target] if target.tuning == "lora" else []
    return [alone(target.tuning), *itself, *across[same.index(target) % max(1, len(across)) :][:1]]


def metrics(run: RunDir) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in map(json.loads, run.metrics.read_text().splitlines())}


def rows(run: RunDir, steps: range) -> Counter[tuple[int, ...]]:
    """What all ranks trained on in these steps, rows that several hold counted each time."""
    lines = [json.loads(line) for path in run.logs.glob("samples-*.jsonl") for line in path.read_text().splitlines()]
    return Counter(tuple(row) for line in lines if line["step"] in steps for row in line["rows"])


def whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint put together from the ranges in its shards, by the offsets written beside them."""
    ranges: dict[str, dict[int, torch.Tensor]] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118
                (start,) = offsets[name]["saved_offsets"]
                assert ranges.setdefault(name, {}).setdefault(start, file.get_tensor(name)) is not None
    found = {}
    for name, parts in ranges.items():
        ends = itertools.accumulate(len(part) for _, part in sorted(parts.items()))
        assert sorted(parts) == [0, *ends][:-1], f"{name}: ranges with a gap, or that overlap"
        found[name] = torch.cat([part for _, part in sorted(parts.items())])
    return found


def assert_same_tensors(found: Path, wanted: Path) -> None:
    for path in wanted.glob("*.safetensors"):
        tensors = load_file(found / path.name)
        for name, value in load_file(path).items():
            torch.testing.assert_close(tensors[name], value, atol=1e-4, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module")
def saved(trained: Callable[..., Result], tiny: Tiny) -> Callable[[Job], RunDir]:
    """Runs that saved at step 2 and went on to the end."""
    return lambda job: RunDir(trained(job.recipe(tiny), job.ranks).run_dir)


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_every_checkpoint_is_the_one_of_a_single_process(saved: Callable[[Job], RunDir], job: Job) -> None:
    """By name and value: weights, both of Adam's states, the step: so that to resume from one stands for the others."""
    run, reference = saved(job), saved(alone(job.tuning))
    found, wanted = (whole(each.checkpoint(SAVED)) for each in (run, reference))
    for tensors in (found, wanted):  # each rank has random generators of its own
        for name in [name for name in tensors if name.startswith("rng/")]:
            tensors.pop(name)
    assert found.keys() == wanted.keys()
    weights = {name for name in wanted if f"{name}/exp_avg" in wanted}
    assert weights
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32, name
        largest = value.abs().max().item()
        # Adam divides a gradient by its size: where that is little more than rounding noise, weights differ by such a
        # part of a step (rate 0.01).
        step = 3e-5 if name in weights else 0
        assert (found[name] - value).abs().max().item() <= 1e-4 * largest + step + 1e-9, name
    found, wanted = (json.loads((each.checkpoint(SAVED) / "manifest.json").read_text()) for each in (run, reference))
    for name in ("schema", "step", "samples", "tokens", "identity", "optimizer_steps", "scheduler_steps"):
        assert found[name] == wanted[name], name
    assert (found["scaler"] or {"scale": 1.0}) == {"scale": 1.0}  # DeepSpeed has one that does nothing
    assert (found["strategy"], found["world_size"]) == (job.strategy, job.ranks)
    assert rows(run, range(1, STEPS + 1)) == rows(reference, range(1, STEPS + 1))
    assert_same_tensors(run.final, reference.final)


@pytest.mark.parametrize(
    ("target", "source"),
    [pytest.param(job, source, id=f"{job}-from-{source}") for job in JOBS for source in sources(job)],
)
def test_goes_on_from_another(
    saved: Callable[[Job], RunDir], warm: WarmRanks, tiny: Tiny, tmp_path: Path, target: Job, source: Job
) -> None:
    before, reference = saved(source), saved(alone(target.tuning))
    run = create(target.recipe(tiny), tmp_path, target.ranks)
    shutil.copytree(before.checkpoint(SAVED), run.checkpoint(SAVED))
    shutil.copy(before.metrics, run.metrics)  # with the steps after the checkpoint, which come once more
    warm.train(run)
    assert_ran(Result(0, "", "", run.path), target)
    found, wanted = metrics(run), metrics(reference)
    assert [*found] == [*range(1, STEPS + 1)]
    for step in range(1, STEPS + 1):
        for name in ("loss", "grad_norm", "learning_rate", "tokens"):
            assert found[step][name] == pytest.approx(wanted[step][name], abs=FP32), (step, name)
    assert_same_tensors(run.final, reference.final)
    trained_on = rows(before, range(1, SAVED + 1)) + rows(run, range(1, STEPS + 1))
    assert trained_on == rows(reference, range(1, STEPS + 1))


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_a_checkpoint_holds_what_is_trained(saved: Callable[[Job], RunDir], job: Job) -> None:
    """Adapters and their states alone; readable without pickle; every rank wrote its share."""
    run = saved(job)
    folder = run.checkpoint(SAVED)
    files = sorted(folder.iterdir())
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    shards = [path for path in files if path.suffix == ".safetensors"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"].keys() == {path.name for path in shards}
    assert len(shards) == job.ranks
    elements: Counter[str] = Counter()
    for path in shards:
        with safe_open(path, framework="pt") as file:
            sizes = {name: file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118
            elements.update({name: size for name, size in sizes.items() if not name.startswith("rng/")})
            assert sum(sizes.values()) > 1000, path
    plan = json.loads(run.plan.read_text())
    weights = {name: size for name, size in elements.items() if "/" not in name}
    assert sum(weights.values()) == plan["model"]["trainable_parameters"]
    assert all(("lora" in name) == (job.tuning != "full") for name in weights)
    for state in ("exp_avg", "exp_avg_sq"):
        assert {n.split("/")[0]: s for n, s in elements.items() if n.endswith(f"/{state}")} == weights


# ---- the command


@pytest.fixture(scope="module")
def stopped(tiny: Tiny, once: Callable[..., Path]) -> tuple[Path, str]:
    """A folder with a run that Ctrl-C stopped after some steps, and what was printed. Change nothing in it."""

    def make(folder: Path) -> None:
        recipe = tiny.recipe(training__max_steps=3000, training__lr_scheduler_type="constant", checkpoint__save_steps=5)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "distft", "launch", "recipe.yaml", "--gpus-per-node", "2"]
        with (folder / "printed").open("w") as printed:
            process = subprocess.Popen(command, cwd=folder, stdout=printed, stderr=subprocess.STDOUT)
        metrics = folder / "runs" / "tiny" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 12:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1

    folder = once("stopped", make)
    return folder, (folder / "printed").read_text()


def test_ctrl_c_saves_at_the_next_step(stopped: tuple[Path, str]) -> None:
    folder, said = stopped
    run = RunDir(folder / "runs" / "tiny")
    status, step = read_status(run), last_metrics(run)["step"]
    assert status.state is State.STOPPED
    assert status.reason == f"stopped: SIGINT; step-{step} is saved"
    assert f"resume it with: distft resume {run.path}" in said
    assert (run.checkpoint(step) / "manifest.json").exists()
    assert not run.final.exists()
    assert status.saves[-1]["step"] == step
    assert status.saves[-1].keys() == {"step", "stall_seconds", "seconds"}


def interrupted(
    folder: Path, recipe: dict[str, Any], slow: str, when: Callable[[RunDir], bool], ranks: int = 1
) -> tuple[int, str]:
    """Ctrl-C, as a terminal sends it, once `when` holds, to a launch in which every call of `slow` takes a second."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    env = inject(folder, slow, f"open('{folder}/slow', 'w').close(); time.sleep(1)")
    # The tests may run in the background, where shells ignore SIGINT.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "distft", "launch", "recipe.yaml"]
    command += ["--gpus-per-node", str(ranks)]
    env = {**os.environ, **env, "DISTFT_CACHE": str(folder / "cache")}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, cwd=folder, env=env, **options)
    run, deadline = RunDir(folder / "runs" / "tiny"), time.monotonic() + 120
    while not when(run):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    (folder / "sitecustomize.py").unlink()
    return process.returncode, said


def test_ctrl_c_while_it_tokenizes(tiny: Tiny, tmp_path: Path) -> None:
    returncode, said = interrupted(
        tmp_path, tiny.recipe(), "distft.train.encoding:fit", lambda run: (tmp_path / "slow").exists()
    )
    assert returncode == 1 and said.endswith("Aborted!\n"), said
    assert not (tmp_path / "runs").exists()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_ctrl_c_while_it_evaluates(tiny: Tiny, tmp_path: Path) -> None:
    """At the end: all steps are saved, and what is left is made by `resume`. After a batch of the evaluation FSDP2 has
    its last unit gathered: the checkpoint has the shards of it all the same."""
    recipe = tiny.recipe(
        lora=None,
        data__eval=str(tiny.path / "heldout.jsonl"),
        training__global_batch_size=2,
        training__micro_batch_size=1,
        parallelism__strategy="fsdp",
    )

    def at_the_end(run: RunDir) -> bool:
        return last_metrics(run).get("step") == 4

    slow = "transformers.trainer:Trainer._prepare_inputs"
    returncode, said = interrupted(tmp_path, recipe, slow, at_the_end, ranks=2)
    run = RunDir(tmp_path / "runs" / "tiny")
    assert returncode == 1, said
    assert read_status(run).reason == "stopped: SIGINT; step-4 is saved"
    assert read_status(run).eval_loss_after is None
    assert not run.final.exists()
    lines = run.metrics.read_text()
    done = distft("resume", "tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_status(run).eval_loss_after is not None
    assert run.metrics.read_text() == lines


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["lora.r=8"], "lora.r: was 4, is 8"),
        (["model.quantization=nf4"], "model.quantization: was None, is 'nf4'"),
        (['model.add_tokens=["<new>"]'], "model.add_tokens: was None, is ['<new>']"),
        (['model.eos_token="<|go|>"'], "model.eos_token: was None, is '<|go|>'"),
        (["training.optim=adafactor"], "training.optim: was 'adamw_torch_fused', is 'adafactor'"),
        (["training.global_batch_size=16"], "training.global_batch_size: was 8, is 16"),
        (["data.max_length=128"], "data: its content has changed"),
        (["training.max_steps=20"], "training.max_steps: was 3000, is 20"),
    ],
)
def test_what_cannot_be_continued(stopped: tuple[Path, str], sets: list[str], said: str) -> None:
    folder, _ = stopped
    before = (folder / "runs" / "tiny" / "status.json").read_bytes()
    done = distft("resume", "tiny", *(word for text in sets for word in ("--set", text)), cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and "Traceback" not in done.stderr
    fixed = sets[0].split(".")[0] in ("lora", "model") or "optim" in sets[0]
    assert ("launch a new run" if fixed else "--force continues anyway") in done.stderr
    assert (folder / "runs" / "tiny" / "status.json").read_bytes() == before


def test_no_run_of_that_name(stopped: tuple[Path, str]) -> None:
    done = distft("resume", "tony", cwd=stopped[0])
    assert done.returncode == 2 and "runs/ has tiny\n" in done.stderr


def test_a_damaged_checkpoint_is_passed_over(stopped: tuple[Path, str], tmp_path: Path) -> None:
    """The newest is corrupted, the one before cut short: the third is taken, and that is said. Then on to the end."""
    shutil.copytree(stopped[0], tmp_path / "copy")
    folder = tmp_path / "copy"
    run = RunDir(folder / "runs" / "tiny")
    steps = sorted(int(path.name.split("-")[1]) for path in run.checkpoints.iterdir())
    newest, cut, good = steps[-1], steps[-2], steps[-3]
    shard = next(run.checkpoint(newest).glob("shard-00002-*"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    shard = next(run.checkpoint(cut).glob("shard-00001-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    (run.checkpoints / ".step-99.partial").mkdir()
    to = ("--set", f"training.max_steps={newest + 3}", "--force", "--gpus-per-node", "1")
    done = distft("resume", "tiny", *to, "--set", "parallelism.strategy=fsdp", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: training.max_steps was 3000" in done.stdout
    assert f"warning: checkpoint step-{newest} is damaged (shard-00002" in done.stdout
    before, after = done.stdout.split("warning: checkpoint step-", 1)
    assert "\nstep " not in before and f"\nstep {newest + 3}/{newest + 3}" in after  # no steps of before
    assert read_status(run).state is State.COMPLETED
    assert f"step-{newest} is damaged (shard-00002" in run.rank_log(0).read_text()
    assert f"continues after step {good} of {newest + 3}" in run.rank_log(0).read_text()
    before = [json.loads(line) for line in (stopped[0] / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    after = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in after] == [*range(1, newest + 4)]
    for old, new in zip(before, after, strict=False):
        assert new["loss"] == pytest.approx(old["loss"], abs=FP32)
    assert not (run.checkpoints / ".step-99.partial").exists()
    assert (run.checkpoints / f"damaged-step-{newest}").is_dir()  # counts no more for save_total_limit
    for sets in ((), ("--set", "parallelism.strategy=zero3")):
        completed = distft("resume", "tiny", *sets, cwd=folder)
        assert completed.returncode == 2 and "is completed; to train more" in completed.stderr


# What happens when a rank flushes its part of the save of step 3.
AT_STEP_3 = """
import os
original = os.fsync
def fsync(descriptor):
    if '.step-3.partial/shard' in os.readlink(f'/proc/self/fd/{descriptor}'):
        WHAT
    return original(descriptor)
os.fsync = fsync
"""


def test_a_save_that_fails_leaves_the_one_before(tiny: Tiny, tmp_path: Path) -> None:
    """The run goes on, says so, and saves again at step 4."""
    (tmp_path / "sitecustomize.py").write_text(AT_STEP_3.replace("WHAT", "raise OSError(30, 'Read-only file system')"))
    recipe = tiny.recipe(checkpoint__save_steps=1, checkpoint__save_total_limit=2)
    result = launch(recipe, tmp_path, ranks=2, env=first_on_path(tmp_path))
    assert result.status["state"] == "completed"
    log = (result.run_dir / "logs" / "rank-0.log").read_text().replace("\n", "")
    assert "checkpoint step-3 could not be written (OSError: [Errno 30] Read-only file system)" in log
    assert "the last complete one is step-2" in log
    assert sorted(path.name for path in (result.run_dir / "checkpoints").iterdir()) == ["step-2", "step-4"]


@pytest.mark.real_ranks(warm_torchrun=True)  # torchrun names the one that was killed
def test_a_rank_killed_while_it_saves(tiny: Tiny, warm: WarmRanks, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        AT_STEP_3.replace("WHAT", "os.environ['RANK'] == '1' and os.kill(os.getpid(), 9)")
    )
    recipe = tiny.recipe(checkpoint__save_steps=1, training__max_steps=1000)
    result = launch(recipe, tmp_path, ranks=2, env=first_on_path(tmp_path), expect=1)
    assert result.status["reason"] == "rank 1 was killed by SIGKILL"
    run = RunDir(result.run_dir)
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-1", "step-2", ".step-3.partial"}
    (tmp_path / "sitecustomize.py").unlink()
    to = ("--set", "training.max_steps=4", "--force")
    done = distft("resume", "tiny", *to, cwd=tmp_path, env=warm.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continues after step 2," in done.stdout
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-1", "step-2", "step-3", "step-4"]


def test_a_disk_that_stays_full(tiny: Tiny, tmp_path: Path) -> None:
    """One clear error at the end, the last checkpoint untouched; with room again it goes on from there."""
    if not namespaces_work():
        pytest.skip("a file system to fill is mounted: root is needed")
    (tmp_path / "runs").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", tmp_path / "runs"], check=True)
    try:
        recipe = tiny.recipe(training__max_steps=200, checkpoint__save_steps=20)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        run, filler = RunDir(tmp_path / "runs" / "tiny"), tmp_path / "runs" / "filler"
        command = [sys.executable, "-m", "distft", "launch", "recipe.yaml", "--gpus-per-node", "1"]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        while not (saved := checkpoints.complete(run)):
            assert process.poll() is None
            time.sleep(0.05)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 1
        assert "No space left on device" in said and "Traceback" not in said, said
        found = checkpoints.complete(run)
        assert found and found[0].damage(0, 1) is None and found[0].step >= saved[0].step
        filler.unlink()
        done = distft("resume", "tiny", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"continues after step {found[0].step}," in done.stdout
        steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
        assert steps == [*range(1, 201)]
    finally:
        subprocess.run(["umount", "--lazy", tmp_path / "runs"], check=True)


def test_two_widths_and_eight_bits(tiny: Tiny, tmp_path: Path) -> None:
    """bitsandbytes' 8-bit states: exact at the same sharding, close at another."""
    recipe = tiny.recipe(training__optim="adamw_bnb_8bit", training__max_steps=4, lora=None, checkpoint__save_steps=2)
    whole = launch(recipe, tmp_path / "whole", ranks=1)
    for ranks, tolerance in ((1, FP32), (2, 2e-3)):
        folder = tmp_path / f"x{ranks}"
        shutil.copytree(tmp_path / "whole", folder)
        run = RunDir(folder / "runs" / "tiny")
        shutil.rmtree(run.checkpoint(4))
        update_status(run, state=State.FAILED)
        sets = ("--set", "parallelism.strategy=zero2") if ranks == 2 else ()
        done = distft("resume", "tiny", "--gpus-per-node", str(ranks), *sets, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
        assert losses == pytest.approx(whole.column("loss"), abs=tolerance)


def test_all_steps_made_and_no_final(tiny: Tiny, tmp_path: Path) -> None:
    """Killed while final/ was written: nothing is trained again."""
    result: Result = launch(tiny.recipe(checkpoint__save_steps=4), tmp_path, ranks=1)
    before = (result.run_dir / "final" / "adapter_model.safetensors").read_bytes()
    lines = (result.run_dir / "metrics.jsonl").read_text()
    shutil.rmtree(result.run_dir / "final")
    update_status(RunDir(result.run_dir), state=State.FAILED)
    done = distft("resume", "tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (result.run_dir / "final" / "adapter_model.safetensors").read_bytes() == before
    assert (result.run_dir / "metrics.jsonl").read_text() == lines


def test_out_of_gpu_memory(tiny: Tiny, saved: Callable[[Job], RunDir], tmp_path: Path) -> None:
    """Injected at a step: half the micro-batch, then checkpointing, then offload; the losses stay."""
    fails = (
        "import json, torch\n"
        "enough = json.load(open(sys.argv[1] + '/plan.json'))['offload'] != 'none'\n"
        "if args[0].state.global_step == 2 and not enough and os.environ['RANK'] == '1':\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')"
    )
    env = inject(tmp_path, "transformers.trainer:Trainer.training_step", fails)
    recipe = tiny.recipe(training__micro_batch_size=4, checkpoint__save_steps=1, parallelism__strategy="zero2")
    result = launch(recipe, tmp_path, ranks=2, env=env)
    assert result.status["state"] == "completed"
    said = [attempt["reason"].split("; ", 1)[1] for attempt in result.status["attempts"]]
    assert said == [
        "training.micro_batch_size: 4 -> 2",
        "training.micro_batch_size: 2 -> 1",
        "training.gradient_checkpointing: False -> true",
        'parallelism.offload: none -> "optimizer"',
    ]
    plan = json.loads((result.run_dir / "plan.json").read_text())
    batch = {"global_batch_size": 8, "micro_batch_size": 1, "gradient_accumulation_steps": 4}
    assert (plan["batch"], plan["gradient_checkpointing"], plan["offload"]) == (batch, True, "optimizer")
    reference = metrics(saved(alone("lora")))
    assert result.column("step") == [*reference]
    assert result.column("loss") == pytest.approx([line["loss"] for line in reference.values()], abs=FP32)


@pytest.mark.real_ranks(warm_torchrun=True)
def test_a_rank_that_is_stopped_is_named(tiny: Tiny, warm: WarmRanks, tmp_path: Path) -> None:
    """SIGSTOP: the others notice, write their stacks, name it and end the run, which then goes on."""
    recipe = tiny.recipe(training__max_steps=3000, training__lr_scheduler_type="constant", checkpoint__save_steps=5)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "distft", "launch", "recipe.yaml", "--gpus-per-node", "2"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "DISTFT_HANG_SECONDS": "6"},
    )
    run = RunDir(tmp_path / "runs" / "tiny")
    deadline = time.monotonic() + 120
    while last_metrics(run).get("step", 0) < 12:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in processes.of_run(run.path)}
    stopped = next(pid for pid, environment in environments.items() if b"\0RANK=1\0" in environment)
    os.kill(stopped, signal.SIGSTOP)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    reason = read_status(run).reason
    assert reason.startswith("rank 1: Hang: no step for ") and "rank 1 does not answer: suspended, or cut off" in reason
    assert "rank 1 on " in said and "failed first" in said
    log = run.rank_log(0).read_text()
    assert "stacks of this rank:" in log and "(most recent call first)" in log
    assert not list(processes.of_run(run.path))
    step = last_metrics(run)["step"]
    to = ("--set", f"training.max_steps={step + 2}", "--force")
    done = distft("resume", "tiny", *to, cwd=tmp_path, env=warm.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in map(json.loads, run.metrics.read_text().splitlines())] == [*range(1, step + 3)]


def test_one_that_lost_its_run_to_another_attempt(tiny: Tiny, tmp_path: Path) -> None:
    """As when SLURM starts the job elsewhere while its old node goes on: it ends, and leaves the run alone."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(training__max_steps=100_000)))
    command = [sys.executable, "-m", "distft", "launch", "recipe.yaml", "--gpus-per-node", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run, deadline = RunDir(tmp_path / "runs" / "tiny"), time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if last_metrics(run):
            update_status(run, owner="another")
        time.sleep(0.1)
    assert process.wait(timeout=1) == 1
    assert "another attempt has taken over this run; this one exits" in run.rank_log(0).read_text()
    assert not rank_errors(run)


@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_starts_from_an_adapter(tiny: Tiny, tmp_path: Path, strategy: str) -> None:
    """Weights alone: the first loss is that of the trained adapter, and the rate begins anew."""
    first = launch(tiny.recipe(data__eval=str(tiny.path / "heldout.jsonl")), tmp_path / "first", ranks=1)
    recipe = tiny.recipe(data__eval=str(tiny.path / "heldout.jsonl"), parallelism__strategy=strategy)
    recipe["lora"]["start_from"] = str(first.run_dir / "final")
    second = launch(recipe, tmp_path / "second", ranks=2)
    before = second.status["eval_loss_before"]
    assert before == pytest.approx(first.status["eval_loss_after"], abs=1e-4)
    assert second.column("learning_rate") == first.column("learning_rate")
    assert "starts from the weights of" in (second.run_dir / "logs" / "rank-0.log").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("lora.r=8", "the adapter has r 4, and lora.r is 8"),
        ("lora.target_modules=[q_proj]", "another model, or has other lora.target_modules"),
        ("lora.start_from=.", "is not a peft adapter in safetensors"),
        ("lora.start_from=nowhere", "no such folder"),
    ],
)
def test_an_adapter_that_does_not_fit(tiny: Tiny, tmp_path: Path, change: str, said: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny.path / "model")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    recipe = tiny.recipe()
    recipe["lora"]["start_from"] = "adapter"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert distft("validate", "recipe.yaml", cwd=tmp_path).returncode == 0
    done = distft("validate", "recipe.yaml", "--set", change, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
