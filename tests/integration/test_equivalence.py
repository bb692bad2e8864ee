"""The same recipe under every strategy: losses and gradient norms of every step equal one process's.

Real processes over gloo. Each job asserts what really wrapped the model.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from jobs import (
    EMBEDDINGS_TOO,
    FP32,
    LORAPLUS,
    PISSA,
    SOME_LAYERS,
    STRATEGIES,
    TUNINGS,
    WHOLE_LAYERS,
    Job,
    alone,
    assert_ran,
)
from rich.console import Console
from running import Result, launch
from tiny import Tiny

from distft.cli import main
from distft.runs.directory import RunDir
from distft.views.progress import Follower

# 8-bit states are rounded in blocks, and sharding moves the blocks' borders.
TOLERANCE = {"adamw_bnb_8bit": 1e-3, "paged_adamw_8bit": 1e-3}
FOUR = ("ddp", "zero2", "zero3", "fsdp")
NO_MASTERS = "no masters full bf16"
KEEPS_GATHERED = {"fsdp__overrides": {"fsdp_reshard_after_forward": False}}
LOSSES = ("dft", "eaft")  # which need not fall where a model learns
JOBS = [
    *(Job(strategy, ranks, tuning, changes) for tuning in ("full", "lora") for strategy, ranks, changes in STRATEGIES),
    *(Job(strategy, 2, "nf4") for strategy in FOUR),
    *(Job(strategy, 2, "lora", {"training__gradient_checkpointing": True}) for strategy in FOUR),
    # Accumulation 4; else it is 1. Micro-batches differ in their trained tokens.
    *(Job(strategy, 2, "lora", {"training__micro_batch_size": 1}) for strategy in FOUR),
    Job("fsdp", 2, "full", {"training__micro_batch_size": 1, **KEEPS_GATHERED}),
    Job("fsdp", 2, "lora", KEEPS_GATHERED),
    Job("fsdp", 2, "full tied"),
    *(Job(strategy, 2, "full", {"training__loss": "full"}) for strategy in ("ddp", "zero3", "fsdp")),
    *(Job(strategy, 2, "lora", {"model__attn_implementation": "varlen"}) for strategy in ("ddp", "zero3")),
    Job("fsdp", 2, "lora", {"model__attn_implementation": "varlen", "training__gradient_checkpointing": True}),
    *(Job(strategy, 2, "unpacked") for strategy in ("ddp", "zero3", "fsdp")),
    *(Job(strategy, 2, tuning) for tuning in ("bf16", "bf16 full") for strategy in FOUR),
    *(Job(strategy, 2, "dft", {"training__micro_batch_size": 1}) for strategy in ("ddp", "zero3", "fsdp")),
    Job("ddp", 2, "eaft"),
    Job("ddp", 2, "dora"),
    Job("fsdp", 2, "dora"),
    Job("zero3", 2, "rslora"),
    *(Job(strategy, 2, "some layers") for strategy in FOUR),
    *(Job(strategy, 2, "whole layers") for strategy in FOUR),
    Job("fsdp", 2, "whole layers nf4"),
    *(Job(strategy, 2, "loraplus") for strategy in FOUR),
    *(Job(strategy, 2, "pissa") for strategy in FOUR),
    *(Job(strategy, 2, "pissa bf16") for strategy in ("zero3", "fsdp")),
    Job("zero3", 2, "olora"),
    Job("fsdp", 2, "orthogonal"),
    *(Job(strategy, 2, "oft") for strategy in FOUR),
    *(Job(strategy, 2, "oft layers") for strategy in FOUR),
    *(Job(strategy, 2, "oft nf4") for strategy in FOUR),
    Job("zero2", 2, "oft int8"),
    *(Job(strategy, 2, "oft bf16") for strategy in ("zero3", "fsdp")),
    Job("fsdp", 2, "oft", {"training__gradient_checkpointing": True, "training__micro_batch_size": 1}),
    Job("ddp", 2, "coft", {"training__micro_batch_size": 1}),
    Job("ddp", 2, "int8"),
    Job("zero2", 2, "int8"),
    Job("fsdp", 2, "adamw_torch"),
    Job("ddp", 2, "adafactor"),
    *(Job(strategy, ranks, "muon full", changes) for strategy, ranks, changes in STRATEGIES if "zero" not in strategy),
    Job("fsdp", 2, "muon full bf16"),
    *(Job(strategy, 2, NO_MASTERS) for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp")),
    Job("hsdp", 4, NO_MASTERS, {"parallelism__hsdp_shard_size": 2}),
    Job("ddp", 2, NO_MASTERS, {"training__micro_batch_size": 1}),
    Job("ddp", 2, "galore full"),
    Job("ddp", 4, "apollo full", {"training__optim_target_modules": ["attn", "mlp"]}),
    Job("ddp", 2, "adamw_bnb_8bit"),
    Job("zero2", 2, "paged_adamw_8bit"),
    Job("zero3", 2, "paged_adamw_32bit"),
]


@pytest.fixture(scope="module")
def runs(trained: Callable[..., Result], tiny: Tiny) -> Callable[[Job], Result]:
    return lambda job: trained(job.recipe(tiny), job.ranks)


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
    if job.tuning not in LOSSES:
        assert losses[-1] < losses[0] - 0.05  # it learns
    assert result.status["eval_loss_after"] < result.status["eval_loss_before"] - 0.05


# Options of peft's LoraConfig.
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
PEFT: dict[str, Any] = {"full": None, "unpacked full": None, "muon full": None}
PEFT |= {"some layers": SOME_LAYERS, "whole layers": PLAIN | WHOLE_LAYERS, "loraplus": EMBEDDINGS_TOO, "pissa": PISSA}
PEFT |= {name: PLAIN | TUNINGS[name]["lora"] for name in ("olora", "gaussian", "orthogonal")}
OF_OFT = {name: TUNINGS[name]["lora"] for name in ("oft", "oft layers", "coft")}
PEFT |= {name: {"target_modules": "all-linear", **lora, **lora["oft"]} for name, lora in OF_OFT.items()}
OTHERS = ["oft nf4", "full", "nf4", "int8", "dora", "rslora", "unpacked", "bf16", "adafactor", *list(PEFT)[2:]]


def test_another_loss_is_named_wherever_it_is_shown(runs: Callable[[Job], Result]) -> None:
    for tuning, name in (("lora", "loss"), ("dft", "loss (dft)")):
        run, lines = RunDir(runs(alone(tuning)).run_dir), io.StringIO()
        with Follower(run, Console(file=lines)):
            pass
        assert f"step 4/4  {name} " in lines.getvalue()
        assert f"| {name}, first and last step |" in (run.final / "README.md").read_text()
        done = CliRunner().invoke(main, ["status", str(run.path)])
        assert ("trained on loss (dft)" in done.output) == (tuning == "dft")


@pytest.mark.parametrize("tuning", [*OTHERS, *LOSSES])
def test_a_tuning_is_really_another(runs: Callable[[Job], Result], tuning: str) -> None:
    found, plain = runs(alone(tuning)), runs(alone("lora"))
    assert found.column("loss") != pytest.approx(plain.column("loss"), abs=FP32)
    if tuning == "unpacked":
        assert found.column("tokens")[-1] < plain.column("tokens")[-1]  # shorter rows


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


def test_a_model_of_its_own_code(
    runs: Callable[[Job], Result], trained: Callable[..., Result], tiny: Tiny, tmp_path: Path
) -> None:
    """Its loss is the mean of a micro-batch, and it takes no token count: accumulation must not change the maths."""
    folder = tmp_path / "own"
    shutil.copytree(tiny.path / "model", folder)
    (folder / "modeling_own.py").write_text(OWN_MODEL)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    trusted = {"model__name_or_path": str(folder), "model__trust_remote_code": True}
    result = trained(tiny.recipe(training__micro_batch_size=1, **trusted), 2)
    assert_same(result, runs(alone("lora")))
    refused = launch(tiny.recipe(**trusted | {"model__trust_remote_code": False}), tmp_path, expect=2)
    assert "model.trust_remote_code" in refused.stderr
    # What the output layer gives is not what it predicts with.
    code = OWN_MODEL.replace("        return super().forward(", "        found = super().forward(").rstrip()
    code += "\n        found.logits = found.logits * 0.5\n        return found\n"
    (folder / "modeling_own.py").write_text(code)
    scaled = trained(tiny.recipe(name="scaled", **trusted))
    assert (scaled.status["ran"]["loss"], result.status["ran"]["loss"]) == ("full", "chunked")
    assert "loss: full (in chunks it would differ by " in (scaled.run_dir / "logs" / "rank-0.log").read_text()
    assert scaled.column("loss")[0] != pytest.approx(result.column("loss")[0], abs=1e-3)


def test_tracker(trained: Callable[..., Result], tiny: Tiny) -> None:
    result = trained(tiny.recipe(training__report_to=["tensorboard"]))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = result.run_dir.rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(events)).Reload().Scalars("train/loss")
    assert [scalar.value for scalar in scalars] == pytest.approx(result.column("loss"))
    assert "logs" in events.relative_to(result.run_dir).parts


@pytest.mark.parametrize("tuning", ["lora", *PEFT, *LOSSES])
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
        lora=PEFT.get(tuning, PLAIN),
        lr=recipe.learning_rate,
        weight_decay=recipe.training.weight_decay,
        warmup=1,
        loraplus=LORAPLUS if tuning == "loraplus" else None,
        loss_type=recipe.training.loss_type,
        muon=recipe.optim == "muon",
    )
    for column in ("loss", "grad_norm", "learning_rate", "tokens"):
        assert result.column(column) == pytest.approx([step[column] for step in history], abs=FP32), column
