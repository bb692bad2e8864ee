"""What wraps the model of a user's script is compared with the plan, and a script trains the same under each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from running import distft
from tiny import Tiny

CLIPS = """
import torch
from accelerate import Accelerator
for clip in (None, 0.5, 0.25):
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rows = [(10 * torch.ones(4) * n, torch.tensor([100.0])) for n in range(1, 17)]
    loader = torch.utils.data.DataLoader(rows, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for x, y in loader:
        loss = (model(x) - y).abs().mean()
        accelerator.backward(loss)
        if clip == 0.25:  # not by accelerate's own
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
        else:
            norm = float(accelerator.clip_grad_norm_(model.parameters(), clip)) if clip else 0
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print("at", clip, round(accelerator.reduce(loss.detach(), "mean").item(), 3), round(norm, 3))
"""
OWN_PLUGIN = """
import torch
from accelerate import Accelerator, DeepSpeedPlugin
config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 2}
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
model = torch.nn.Linear(4, 1)
loader = torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2)
print("before", flush=True)
model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
print("after", flush=True)
"""
PLAIN_DDP = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
model(torch.ones(2, 4)).sum().backward()
print("rank", dist.get_rank(), "of", dist.get_world_size(), "ärgert", flush=True)
dist.destroy_process_group()
"""
PLAIN_FSDP = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo")
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
for part in model:
    fully_shard(part)
fully_shard(model)
model(torch.ones(2, 4)).sum().backward()
dist.destroy_process_group()
"""
NESTED = """
from accelerate.commands.launch import launch_command
launch_command(None)
"""
BERT = """
import torch
from accelerate import Accelerator
from transformers import BertConfig, BertForMaskedLM
accelerator = Accelerator()
torch.manual_seed(0)
config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
model = BertForMaskedLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
ids = torch.arange(64).view(8, 8)
loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=1)
if accelerator.num_processes == 1:
    loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batch in loader:
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print("at", accelerator.reduce(loss.detach(), "mean").item(), flush=True)
"""


def script(folder: Path, text: str, strategy: str, *options: str, ranks: int = 2, expect: int = 0) -> tuple[str, Any]:
    """Launch it; what was printed, and status.json."""
    (folder / "own.py").write_text(text)
    options = ("--gpus-per-node", str(ranks), "--set", f"parallelism.strategy={strategy}", *options)
    done = distft("launch", *options, "--", "own.py", cwd=folder)
    assert done.returncode == expect, done.stdout + done.stderr
    newest = max((folder / "runs").iterdir(), key=lambda path: path.stat().st_ctime)
    return done.stdout + done.stderr, json.loads((newest / "status.json").read_text())


def lines(printed: str) -> list[list[float]]:
    found = re.findall(r"^at (.*)$", printed, re.MULTILINE)
    return [[float(word) for word in line.replace("None", "0").split()] for line in found]


def test_a_script_is_clipped_as_it_asks(tmp_path: Path) -> None:
    """accelerate would clip to 1.0 under ZeRO, whatever the script says."""
    printed, status = script(tmp_path, CLIPS, "zero2")
    assert (status["ran"]["kind"], status["ran"]["world_size"]) == ("zero2", 2)
    assert "warnings" not in status
    under_ddp, status = script(tmp_path, CLIPS, "ddp")
    assert (status["ran"]["kind"], status["ran"]["world_size"]) == ("ddp", 2)
    assert len(lines(printed)) == 12  # shown while it ran
    for zero, ddp in zip(lines(printed), lines(under_ddp), strict=True):
        assert zero == pytest.approx(ddp, rel=1e-3)
    assert lines(printed)[-1][2] > 10  # norms that 0.5 cuts


def test_a_script_with_a_strategy_of_its_own(tmp_path: Path) -> None:
    printed, status = script(tmp_path, OWN_PLUGIN, "zero2", expect=1)
    assert status["state"] == "failed" and status["ran"]["kind"] == "zero3"
    assert "the plan is zero2 on 2 ranks, but zero3 (DeepSpeedEngine) runs on 2" in printed
    assert "--set parallelism.strategy=zero3" in printed and "Traceback" not in printed
    assert "before" in printed and "after" not in printed.splitlines()


def test_a_script_without_an_accelerator(tmp_path: Path) -> None:
    printed, status = script(tmp_path, PLAIN_DDP, "fsdp")
    assert "rank 0 of 2 ärgert" in printed and "rank 1 of 2" not in printed
    said = "the plan is fsdp on 2 ranks, but ddp (DistributedDataParallel) runs on 2: the script made no Accelerator"
    assert status["state"] == "completed" and status["ran"]["kind"] == "ddp" and said in status["warnings"][0]
    assert printed.count(said) == 1


@pytest.mark.parametrize(
    ("text", "ranks", "group", "said"),
    [
        ("from accelerate import Accelerator\nAccelerator()", 2, (2, "gloo"), "gave its Accelerator no model to train"),
        ("print('no torch')", 1, (1, None), "made no Accelerator"),
    ],
)
def test_a_script_that_wraps_nothing(
    text: str, ranks: int, group: tuple[int, str | None], said: str, tmp_path: Path
) -> None:
    """status.json says that each rank ran alone, and in what."""
    _, status = script(tmp_path, text, "fsdp", ranks=ranks)
    ran = {"wrapped": None, "kind": "single", "world_size": group[0], "backend": group[1]}
    assert status["ran"] == ran and said in status["warnings"][0]


def test_a_script_that_shards_by_itself(tmp_path: Path) -> None:
    printed, status = script(tmp_path, PLAIN_FSDP, "fsdp")
    assert "warning" not in printed and "warnings" not in status
    ran = status["ran"]
    assert (ran["kind"], ran["world_size"], ran["units"]) == ("fsdp", 2, {"FSDPSequential": 1, "FSDPLinear": 2})


def test_a_script_that_starts_processes(tmp_path: Path) -> None:
    printed, _ = script(tmp_path, NESTED, "ddp", ranks=1, expect=1)
    assert "the script calls accelerate launch, which starts processes for each of the ranks" in printed
    assert "Traceback" not in printed


def test_blocks_of_bert(tmp_path: Path) -> None:
    """Its `_no_split_modules` has the embeddings, and its head shares a bias: both failed inside accelerate."""
    printed, status = script(tmp_path, BERT, "fsdp")
    assert status["ran"]["kind"] == "fsdp" and status["ran"]["units"]["FSDPBertLayer"] == 2
    single, _ = script(tmp_path, BERT, "ddp", ranks=1)
    assert len(lines(printed)) == 4
    for two, one in zip(lines(printed), lines(single), strict=True):
        assert two == pytest.approx(one, abs=1e-5)


def test_trl_by_its_name(tiny: Tiny, tmp_path: Path) -> None:
    """`trl sft` starts accelerate's launcher, which trained a lone copy in each rank."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "def f(x): return x"}\n' * 8)
    training = ["--max_steps", "3", "--per_device_train_batch_size", "1", "--report_to", "none", "--bf16", "false"]
    arguments = ["--model_name_or_path", str(tiny.path / "model"), "--dataset_name", "data", *training]
    options = ["--gpus-per-node", "2", "--set", "parallelism.strategy=fsdp"]
    words = ["trl", "sft", *arguments, "--output_dir", "out", "--save_strategy", "no"]
    done = distft("launch", *options, "--", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    status = json.loads((tmp_path / "runs" / "trl-sft" / "status.json").read_text())
    assert (status["ran"]["kind"], status["ran"]["world_size"]) == ("fsdp", 2)
    assert (status["step"], status["max_steps"]) == (3, 3)
    assert "warnings" not in status
