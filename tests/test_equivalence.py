"""The same recipe under every strategy: losses and gradient norms of every step equal one process's.

Real processes over gloo. Each job asserts what really wrapped the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, Tiny, launch

FP32 = 1e-5
# kind of `ran` → the class that must wrap the model; {} stands for the model's own class.
WRAPPED = {"ddp": "DistributedDataParallel", "zero": "DeepSpeedEngine", "fsdp": "FSDP{}", "hsdp": "FSDP{}"}
ZERO_OPTIMIZER = {1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}

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
FULL = {"lora": None, "training__learning_rate": 0.003}
NF4 = {"model__quantization": "nf4"}


def name(case: tuple[str, int, dict[str, Any]]) -> str:
    return f"{case[0]}-x{case[1]}" + ("-offload" if "parallelism__offload" in case[2] else "")


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """Launches a recipe once for all tests that ask for it."""
    done: dict[str, Result] = {}

    def run(ranks: int = 1, **changes: Any) -> Result:
        key = repr((ranks, sorted(changes.items())))
        if key not in done:
            done[key] = launch(tiny.recipe(**changes), tmp_path_factory.mktemp("run"), ranks=ranks)
        return done[key]

    return run


def assert_ran(result: Result, strategy: str, ranks: int, model_class: str) -> None:
    ran = result.status["ran"]
    assert ran["kind"] == strategy
    assert ran["wrapped"] == WRAPPED[strategy.rstrip("123")].format(model_class)
    assert (ran["world_size"], ran["backend"]) == (ranks, "gloo")
    if strategy.startswith("zero"):
        assert ran["zero_optimizer"] == ZERO_OPTIMIZER[int(strategy[-1])]
    if strategy == "fsdp":
        assert ran["mesh"] == [ranks]
    if strategy == "hsdp":
        assert ran["mesh"] == [2, 2]
    if "fsdp" in strategy or strategy == "hsdp":
        assert ran["units"]["FSDPLlamaDecoderLayer"] == 2


def assert_same(result: Result, reference: Result, tolerance: float = FP32) -> None:
    assert result.column("step") == reference.column("step") == [1, 2, 3, 4]
    for column in ("loss", "grad_norm"):
        assert result.column(column) == pytest.approx(reference.column(column), abs=tolerance), column
    assert result.column("tokens") == reference.column("tokens")
    assert result.column("learning_rate") == pytest.approx(reference.column("learning_rate"))


@pytest.mark.parametrize("case", STRATEGIES, ids=name)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_strategy(runs: Callable[..., Result], tuning: str, case: tuple[str, int, dict[str, Any]]) -> None:
    strategy, ranks, changes = case
    base = FULL if tuning == "full" else {}
    result = runs(ranks, parallelism__strategy=strategy, **base, **changes)
    assert_ran(result, strategy, ranks, "LlamaForCausalLM" if tuning == "full" else "PeftModelForCausalLM")
    assert_same(result, runs(1, **base))
    losses = result.column("loss")
    assert losses[-1] < losses[0] - 0.05  # it learns


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
def test_qlora(runs: Callable[..., Result], strategy: str) -> None:
    result = runs(2, parallelism__strategy=strategy, **NF4)
    assert_ran(result, strategy, 2, "PeftModelForCausalLM")
    reference = runs(1, **NF4)
    assert_same(result, reference)
    assert reference.column("loss")[0] != pytest.approx(runs(1).column("loss")[0], abs=1e-4)  # really quantised


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
def test_gradient_checkpointing_changes_nothing(runs: Callable[..., Result], strategy: str) -> None:
    result = runs(2, parallelism__strategy=strategy, training__gradient_checkpointing=True)
    assert_ran(result, strategy, 2, "PeftModelForCausalLM")
    assert result.status["ran"]["gradient_checkpointing"] is True
    assert runs(2, parallelism__strategy=strategy).status["ran"]["gradient_checkpointing"] is False
    assert_same(result, runs(1))


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
def test_accumulation_changes_nothing(runs: Callable[..., Result], strategy: str) -> None:
    """Accumulation 4 on 2 ranks; test_strategy has accumulation 1. Micro-batches differ in their trained tokens."""
    result = runs(2, parallelism__strategy=strategy, training__micro_batch_size=1)
    assert_ran(result, strategy, 2, "PeftModelForCausalLM")
    assert_same(result, runs(1))


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp"])
def test_without_packing(runs: Callable[..., Result], strategy: str) -> None:
    result = runs(2, parallelism__strategy=strategy, data__packing=False)
    assert_ran(result, strategy, 2, "PeftModelForCausalLM")
    reference = runs(1, data__packing=False)
    assert_same(result, reference)
    assert reference.column("tokens")[-1] < runs(1).column("tokens")[-1]  # shorter rows: it really was off


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_bf16_is_near(runs: Callable[..., Result], tuning: str, strategy: str) -> None:
    base = (FULL if tuning == "full" else {}) | {"training__mixed_precision": "bf16"}
    result = runs(2, parallelism__strategy=strategy, **base)
    assert result.status["ran"]["kind"] == strategy
    reference = runs(1, **base)
    assert result.column("loss") == pytest.approx(reference.column("loss"), abs=2e-2)
    assert reference.column("loss") != runs(1, **(FULL if tuning == "full" else {})).column("loss")  # really bf16


ADAPTERS = {
    "dora": {"lora": {"r": 4, "use_dora": True}},
    "rslora": {"lora": {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}},
    "int8": {"model__quantization": "int8"},
}


@pytest.mark.parametrize(
    ("adapter", "strategy"),
    [("dora", "ddp"), ("dora", "fsdp"), ("rslora", "zero3"), ("int8", "ddp"), ("int8", "zero2")],
)
def test_other_adapters(runs: Callable[..., Result], adapter: str, strategy: str) -> None:
    result = runs(2, parallelism__strategy=strategy, **ADAPTERS[adapter])
    assert_ran(result, strategy, 2, "PeftModelForCausalLM")
    reference = runs(1, **ADAPTERS[adapter])
    assert_same(result, reference)
    assert reference.column("loss") != runs(1).column("loss")  # not plain LoRA


@pytest.mark.parametrize(
    ("optim", "ran", "strategy"),
    [
        ("adamw_torch", "torch AdamW", "fsdp"),
        ("adafactor", "transformers Adafactor", "ddp"),
        ("adamw_bnb_8bit", "bitsandbytes AdamW 8-bit", "ddp"),
        ("paged_adamw_8bit", "bitsandbytes AdamW 8-bit", "zero2"),
        ("paged_adamw_32bit", "bitsandbytes AdamW 32-bit", "zero3"),
    ],
)
def test_other_optimizers(runs: Callable[..., Result], optim: str, ran: str, strategy: str) -> None:
    result = runs(2, parallelism__strategy=strategy, training__optim=optim)
    assert_ran(result, strategy, 2, "PeftModelForCausalLM")
    assert result.status["ran"]["optimizer"] == ran
    # 8-bit states are rounded in blocks, and sharding moves the blocks' borders.
    assert_same(result, runs(1, training__optim=optim), 1e-3 if "8bit" in optim else FP32)


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


def test_a_model_of_its_own_code(runs: Callable[..., Result], tiny: Tiny, tmp_path: Path) -> None:
    """Its loss is the mean of a micro-batch, and it takes no token count: accumulation must not change the maths."""
    folder = tmp_path / "own"
    shutil.copytree(tiny.path / "model", folder)
    (folder / "modeling_own.py").write_text(OWN_MODEL)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    trusted = {"model__name_or_path": str(folder), "model__trust_remote_code": True}
    assert_same(runs(2, training__micro_batch_size=1, **trusted), runs(1))
    refused = launch(tiny.recipe(**trusted | {"model__trust_remote_code": False}), tmp_path, expect=2)
    assert "model.trust_remote_code" in refused.stderr


def test_tracker(tiny: Tiny, tmp_path: Path) -> None:
    result = launch(tiny.recipe(training__report_to=["tensorboard"]), tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = result.run_dir.rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(events)).Reload().Scalars("train/loss")
    assert [scalar.value for scalar in scalars] == pytest.approx(result.column("loss"))
    assert "logs" in events.relative_to(result.run_dir).parts


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("packing", [True, False])
def test_independent_reference(runs: Callable[..., Result], tiny: Tiny, tuning: str, packing: bool) -> None:
    """A hand-written loop without Trainer, padding or packed attention gives the same numbers."""
    import reference_loop

    from distft.loading import load_recipe
    from distft.train.data import load_prepared
    from distft.train.sampler import StreamSampler

    result = runs(1, data__packing=packing, **(FULL if tuning == "full" else {}))
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
