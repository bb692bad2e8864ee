"""The same recipe under every strategy: losses and gradient norms of every step equal one process's.

Real processes over gloo. Each job asserts what really wrapped the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from running import Result, launch, ready, train_together
from tiny import Tiny

FP32 = 1e-5
# kind of `ran` → the class that must wrap the model; {} stands for the model's own class.
WRAPPED = {"ddp": "DistributedDataParallel", "zero": "DeepSpeedEngine", "fsdp": "FSDP{}", "hsdp": "FSDP{}"}
ZERO_OPTIMIZER = {1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}

FULL = {"lora": None, "training__learning_rate": 0.003}
BF16 = {"training__mixed_precision": "bf16"}
TUNINGS = {
    "lora": {},
    "full": FULL,
    "nf4": {"model__quantization": "nf4"},
    "int8": {"model__quantization": "int8"},
    "dora": {"lora": {"r": 4, "use_dora": True}},
    "rslora": {"lora": {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}},
    "unpacked": {"data__packing": False},
    "unpacked full": {"data__packing": False, **FULL},
    "bf16": BF16,
    "bf16 full": {**BF16, **FULL},
    "adamw_torch": {"training__optim": "adamw_torch"},
    "adafactor": {"training__optim": "adafactor"},
    "adamw_bnb_8bit": {"training__optim": "adamw_bnb_8bit"},
    "paged_adamw_8bit": {"training__optim": "paged_adamw_8bit"},
    "paged_adamw_32bit": {"training__optim": "paged_adamw_32bit"},
}
# 8-bit states are rounded in blocks, and sharding moves the blocks' borders.
TOLERANCE = {"adamw_bnb_8bit": 1e-3, "paged_adamw_8bit": 1e-3}
OPTIMIZER = {
    "adamw_torch": "torch AdamW",
    "adafactor": "transformers Adafactor",
    "adamw_bnb_8bit": "bitsandbytes AdamW 8-bit",
    "paged_adamw_8bit": "bitsandbytes AdamW 8-bit",
    "paged_adamw_32bit": "bitsandbytes AdamW 32-bit",
}


class Job(NamedTuple):
    """A recipe with a tuning of TUNINGS under a strategy; `changes` must change nothing."""

    strategy: str
    ranks: int
    tuning: str
    changes: Mapping[str, Any] = {}

    def __str__(self) -> str:
        changed = [f"{key.split('__')[1]}={value}" for key, value in self.changes.items()]
        return "-".join([self.tuning.replace(" ", "-"), self.strategy, f"x{self.ranks}", *changed])


STRATEGIES = [
    ("ddp", 2, {}),
    ("ddp", 4, {}),
    ("zero1", 2, {}),
    ("zero2", 2, {}),
    ("zero2", 2, {"parallelism__offload": "optimizer"}),
    ("zero3", 2, {}),
    ("zero3", 2, {"parallelism__offload": "all"}),
    ("fsdp", 2, {}),
    ("fsdp", 4, {}),
    ("hsdp", 4, {"parallelism__hsdp_shard_size": 2}),
]
FOUR = ("ddp", "zero2", "zero3", "fsdp")
JOBS = [
    *(Job(strategy, ranks, tuning, changes) for tuning in ("full", "lora") for strategy, ranks, changes in STRATEGIES),
    *(Job(strategy, 2, "nf4") for strategy in FOUR),
    *(Job(strategy, 2, "lora", {"training__gradient_checkpointing": True}) for strategy in FOUR),
    # Accumulation 4; else it is 1. Micro-batches differ in their trained tokens.
    *(Job(strategy, 2, "lora", {"training__micro_batch_size": 1}) for strategy in FOUR),
    *(Job(strategy, 2, "unpacked") for strategy in ("ddp", "zero3", "fsdp")),
    *(Job(strategy, 2, tuning) for tuning in ("bf16", "bf16 full") for strategy in FOUR),
    Job("ddp", 2, "dora"),
    Job("fsdp", 2, "dora"),
    Job("zero3", 2, "rslora"),
    Job("ddp", 2, "int8"),
    Job("zero2", 2, "int8"),
    Job("fsdp", 2, "adamw_torch"),
    Job("ddp", 2, "adafactor"),
    Job("ddp", 2, "adamw_bnb_8bit"),
    Job("zero2", 2, "paged_adamw_8bit"),
    Job("zero3", 2, "paged_adamw_32bit"),
]


def alone(tuning: str) -> Job:
    """The same in one process."""
    return Job("ddp", 1, tuning)


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], Result]:
    """Trains a job, and in the same ranks all others of its strategy and width."""
    done: dict[str, Result] = {}
    folder = tmp_path_factory.mktemp("runs")

    def run(job: Job) -> Result:
        if str(job) not in done:
            together = [j for j in (*JOBS, *map(alone, TUNINGS)) if j[:2] == job[:2]]
            made = {}
            for j in together:
                heldout = {"data__eval": str(tiny.path / "heldout.jsonl")}  # evaluation leaves the training alone
                changes = {"parallelism__strategy": j.strategy, **heldout, **TUNINGS[j.tuning], **j.changes}
                made[str(j)] = ready(tiny.recipe(**changes), folder, j.ranks, str(j))
            train_together([*made.values()], job.ranks)
            done.update({name: Result(0, "", "", run.path) for name, run in made.items()})
        return done[str(job)]

    return run


def assert_ran(result: Result, job: Job) -> None:
    ran, strategy = result.status["ran"], job.strategy
    assert ran["kind"] == strategy
    model_class = "LlamaForCausalLM" if "full" in job.tuning else "PeftModelForCausalLM"
    assert ran["wrapped"] == WRAPPED[strategy.rstrip("123")].format(model_class)
    assert (ran["world_size"], ran["backend"]) == (job.ranks, "gloo")
    assert ran["gradient_checkpointing"] is job.changes.get("training__gradient_checkpointing", False)
    if job.tuning in OPTIMIZER:
        assert ran["optimizer"] == OPTIMIZER[job.tuning]
    if strategy.startswith("zero"):
        assert ran["zero_optimizer"] == ZERO_OPTIMIZER[int(strategy[-1])]
    if strategy == "fsdp":
        assert ran["mesh"] == [job.ranks]
    if strategy == "hsdp":
        assert ran["mesh"] == [2, 2]
    if strategy in ("fsdp", "hsdp"):
        assert ran["units"]["FSDPLlamaDecoderLayer"] == 2


def assert_same(result: Result, reference: Result, tolerance: float = FP32) -> None:
    assert result.column("step") == reference.column("step") == [1, 2, 3, 4]
    for column in ("loss", "grad_norm"):
        assert result.column(column) == pytest.approx(reference.column(column), abs=tolerance), column
    assert result.column("tokens") == reference.column("tokens")
    assert result.column("learning_rate") == pytest.approx(reference.column("learning_rate"))


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_as_one_process_does(runs: Callable[[Job], Result], job: Job) -> None:
    result, reference = runs(job), runs(alone(job.tuning))
    assert_ran(result, job)
    if "bf16" in job.tuning:
        assert result.column("loss") == pytest.approx(reference.column("loss"), abs=2e-2)
    else:
        assert_same(result, reference, TOLERANCE.get(job.tuning, FP32))
        for name in ("eval_loss_before", "eval_loss_after"):
            same = pytest.approx(reference.status[name], abs=TOLERANCE.get(job.tuning, FP32))
            assert result.status[name] == same, name
    losses = result.column("loss")
    assert losses[-1] < losses[0] - 0.05  # it learns
    assert result.status["eval_loss_after"] < result.status["eval_loss_before"] - 0.05


@pytest.mark.parametrize("tuning", ["full", "nf4", "int8", "dora", "rslora", "unpacked", "bf16", "adafactor"])
def test_a_tuning_is_really_another(runs: Callable[[Job], Result], tuning: str) -> None:
    found, plain = runs(alone(tuning)), runs(alone("lora"))
    assert found.column("loss") != pytest.approx(plain.column("loss"), abs=FP32)
    if tuning == "unpacked":
        assert found.column("tokens")[-1] < plain.column("tokens")[-1]  # shorter rows


def test_through_the_command_line(runs: Callable[[Job], Result], tiny: Tiny, tmp_path: Path) -> None:
    """The jobs here share their ranks; a launch of its own does the same."""
    job = Job("zero2", 2, "lora")
    result = launch(tiny.recipe(parallelism__strategy="zero2"), tmp_path, ranks=2)
    assert_ran(result, job)
    assert_same(result, runs(job))


OWN_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, use_cache=None,
                inputs_embeds=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        return super().forward(input_ids, attention_mask, position_ids, labels=labels, use_cache=use_cache)
"""


def test_a_model_of_its_own_code(runs: Callable[[Job], Result], tiny: Tiny, tmp_path: Path) -> None:
    """Its loss is the mean of a micro-batch, and it takes no token count: accumulation must not change the maths."""
    folder = tmp_path / "own"
    shutil.copytree(tiny.path / "model", folder)
    (folder / "modeling_own.py").write_text(OWN_MODEL)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    trusted = {"model__name_or_path": str(folder), "model__trust_remote_code": True}
    result = launch(tiny.recipe(training__micro_batch_size=1, **trusted), tmp_path, ranks=2)
    assert_same(result, runs(alone("lora")))
    refused = launch(tiny.recipe(**trusted | {"model__trust_remote_code": False}), tmp_path, expect=2)
    assert "model.trust_remote_code" in refused.stderr


def test_tracker(tiny: Tiny, tmp_path: Path) -> None:
    result = launch(tiny.recipe(training__report_to=["tensorboard"]), tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = result.run_dir.rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(events)).Reload().Scalars("train/loss")
    assert [scalar.value for scalar in scalars] == pytest.approx(result.column("loss"))
    assert "logs" in events.relative_to(result.run_dir).parts


@pytest.mark.parametrize("tuning", ["lora", "full", "unpacked", "unpacked full"])
def test_independent_reference(runs: Callable[[Job], Result], tuning: str) -> None:
    """A hand-written loop without Trainer, padding or packed attention gives the same numbers."""
    import reference_loop

    from distft.config.loading import load_recipe
    from distft.train.data import load_prepared
    from distft.train.sampler import StreamSampler

    result = runs(alone(tuning))
    recipe = load_recipe(result.run_dir / "recipe.yaml")
    rows = load_prepared(recipe).train
    batch, steps = recipe.training.global_batch_size, recipe.training.max_steps
    history = reference_loop.train(
        rows,
        list(StreamSampler(len(rows), batch * steps, recipe.training.seed)),
        recipe.model.name_or_path,
        batch=batch,
        steps=steps,
        lora={"r": recipe.lora.r, "lora_alpha": recipe.lora.lora_alpha} if recipe.lora else None,
        lr=recipe.learning_rate,
        weight_decay=recipe.training.weight_decay,
        warmup=1,
    )
    assert result.column("loss") == pytest.approx([loss for loss, _ in history], abs=FP32)
    assert result.column("grad_norm") == pytest.approx([norm for _, norm in history], abs=FP32)
