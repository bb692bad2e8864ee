"""A tiny model with its tokenizer and data, made once a session, and a way to launch real jobs on them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
import yaml
from slurm_cluster import Cluster

from distft.runs.directory import RunDir

WORDS = [
    "list",
    "dict",
    "file",
    "open",
    "read",
    "write",
    "path",
    "node",
    "rank",
    "step",
    "loss",
    "model",
    "data",
    "batch",
    "token",
    "shard",
    "plan",
    "launch",
    "run",
    "mesh",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content + '<|go|>' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Tiny:
    """Folder with model/, chat.jsonl, heldout.jsonl, text.jsonl and a recipe() for them."""

    path: Path

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """A recipe as a dict; `changes` are dotted keys with `__` for the dot."""
        recipe: dict[str, Any] = {
            "name": "tiny",
            "model": {"name_or_path": str(self.path / "model")},
            "lora": {"r": 4, "lora_alpha": 8},
            "data": {"train": str(self.path / "chat.jsonl"), "max_length": 64, "packing": True},
            "training": {
                "global_batch_size": 8,
                "max_steps": 4,
                "learning_rate": 0.01,
                "mixed_precision": "no",
                "weight_decay": 0.1,
                "warmup_ratio": 0.25,
            },
            "checkpoint": {},
            "parallelism": {},
        }
        for key, value in changes.items():
            *groups, last = key.split("__")
            target = recipe
            for group in groups:
                target = target[group]
            target[last] = value
        return recipe


@dataclass(frozen=True)
class Result:
    """A launch that has ended."""

    returncode: int
    stdout: str
    stderr: str
    run_dir: Path | None

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "status.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def column(self, name: str) -> list[float]:
        return [line[name] for line in self.metrics]

    def log(self) -> str:
        """All that was logged, for a failed assertion."""
        logs = sorted((self.run_dir / "logs").glob("*.log")) if self.run_dir else []
        return "\n".join([self.stdout, self.stderr, *(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in logs)])


def distft(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run the command line as a user would."""
    command = [sys.executable, "-m", "distft", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def launch(
    recipe: dict[str, Any],
    folder: Path,
    *arguments: str,
    ranks: int = 1,
    expect: int = 0,
    env: dict[str, str] | None = None,
) -> Result:
    """`distft launch` of a recipe in `folder`, to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--gpus-per-node", str(ranks), "--json", *arguments]
    done = distft("launch", "recipe.yaml", *options, cwd=folder, env=env)
    run_dir = Path(json.loads(done.stdout)["run_dir"]) if done.stdout.startswith("{") else None
    result = Result(done.returncode, done.stdout, done.stderr, run_dir)
    assert done.returncode == expect, result.log()
    return result


BEFORE = """
import os, sys, threading, time
def before(*args, **kwargs):
    {code}
def patch():
    while True:
        for module in ({module!r}, "__main__"):
            owner = sys.modules.get(module)
            for part in {owners!r}:
                owner = getattr(owner, part, None)
            original = getattr(owner, {name!r}, None)
            if original is not None:
                def changed(*args, **kwargs):
                    before(*args, **kwargs)
                    return original(*args, **kwargs)
                setattr(owner, {name!r}, changed)
                return
        time.sleep(0.005)
threading.Thread(target=patch, daemon=True).start()
"""


def inject(folder: Path, where: str, code: str) -> dict[str, str]:
    """Have every Python run `code` before each call of MODULE:NAME, with its `args`. Returns the variables for that."""
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    text = BEFORE.format(module=module, owners=owners, name=name, code=code.replace("\n", "\n    "))
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


def ready(recipe: dict[str, Any], folder: Path, ranks: int, name: str) -> RunDir:
    """A run directory under `folder`, ready to start."""
    from distft.commands import launch
    from distft.jobs.target import Target, plan_recipe

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    target = Target(1, ranks)
    loaded, plan = plan_recipe(str(folder / "recipe.yaml"), (), target)
    run = RunDir.create(str(folder), name)
    job = launch.Launch(loaded, plan, target).job(run)
    run.fill(launch.render(job), job.name)
    return run


def train_together(runs: list[RunDir], ranks: int) -> None:
    """Train runs of one strategy one after the other in the same ranks (several_runs.py)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = Path(__file__).with_name("several_runs.py")
    done = subprocess.run([*command, str(script), *(str(run.path) for run in runs)], capture_output=True, text=True)
    logs = "\n".join(path.read_text()[-2000:] for run in runs for path in run.logs.glob("rank-*.log"))
    assert done.returncode == 0, done.stderr[-1000:] + logs


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """In CI a test of SLURM that is skipped has failed: the cluster must be there."""
    report = (yield).get_result()
    if report.skipped and item.get_closest_marker("slurm") and os.environ.get("DISTFT_REQUIRE_SLURM"):
        report.outcome = "failed"


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared data of the tests stays out of the user's cache."""
    os.environ["DISTFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    path = tmp_path_factory.mktemp("tiny")
    make_tokenizer(path / "model")
    make_model(path / "model")
    chat = random.Random(1)
    write_jsonl(path / "chat.jsonl", [chat_row(chat) for _ in range(90)])
    write_jsonl(path / "heldout.jsonl", [chat_row(chat) for _ in range(11)])
    write_jsonl(path / "text.jsonl", [{"text": sentence(chat, 4, 30)} for _ in range(60)])
    return Tiny(path)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that is easily filled, on all nodes; a plain folder where nothing can be mounted."""
    folder = tmp_path_factory.mktemp("small")
    mounted = slurm_cluster.namespaces_work()
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Iterator[Cluster]:  # mounted before nodes start
    if why := slurm_cluster.missing():
        pytest.skip(why)
    with Cluster(tmp_path_factory.mktemp("slurm"), mode=os.environ.get("DISTFT_SLURM_MODE")) as started:
        yield started


@pytest.fixture
def namespaces(cluster: Cluster) -> Cluster:
    if cluster.mode != "namespaces":
        pytest.skip("nodes have no mounts and names of their own here: root and namespaces are needed")
    return cluster


def make_tokenizer(folder: Path, pad: bool = True, chat: bool = True) -> None:
    """A byte-level BPE of 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<|user|>", "<|system|>", "<|go|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    names = {"pad_token": "<pad>"} if pad else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **names)
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def make_model(folder: Path, **changes: Any) -> None:
    """A Llama of two layers, float32, random weights from a fixed seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=320, num_key_value_heads=2, max_position_embeddings=256, **(sizes | changes))
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def sentence(source: random.Random, shortest: int, longest: int) -> str:
    return " ".join(source.choices(WORDS, k=source.randint(shortest, longest)))


def chat_row(source: random.Random) -> dict[str, Any]:
    """A turn or two, of different lengths, so that ranks differ in how many tokens they train on."""
    turns = []
    for _ in range(source.randint(1, 2)):
        turns.append({"role": "user", "content": sentence(source, 1, 6)})
        turns.append({"role": "assistant", "content": sentence(source, 1, 9)})
    return {"messages": turns}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
