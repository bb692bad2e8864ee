"""Cases worked out by hand of what runs compute: comparing two runs cannot find what both get wrong."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import Tiny

from distft.config.recipe import Recipe, Training
from distft.data import few_steps
from distft.runs.directory import RunDir
from distft.train.chat import RowProblem, Tokenization
from distft.train.encoding import Counts, fit
from distft.train.losses import mean_loss, summed_loss
from distft.train.metrics import MetricsLog, token_share, tokens_per_step
from distft.train.sampler import StreamSampler
from distft.train.shards import Share
from distft.train.step_state import set_schedule
from distft.train.tokens import encoder, load_tokenizer
from distft.train.trained_model import dequantized
from distft.train.trainer import RecipeTrainer, training_arguments
from distft.train.watchdog import Watchdog

# ---- the order of the rows


def test_every_epoch_has_every_row_once_in_another_order() -> None:
    stream = list(StreamSampler(rows=5, total=12, seed=7))
    first, second, third = stream[:5], stream[5:10], stream[10:]
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert first != second
    assert len(set(third)) == 2
    assert stream != list(StreamSampler(rows=5, total=12, seed=8))


@pytest.mark.parametrize("start", [0, 3, 5, 7, 12])
def test_a_run_that_continues_gets_the_rest_of_the_stream(start: int) -> None:
    rest = StreamSampler(rows=5, total=12, seed=7, start=start)
    assert len(rest) == 12 - start
    assert list(rest) == list(StreamSampler(rows=5, total=12, seed=7))[start:]


@pytest.mark.parametrize(
    ("rows", "batch", "max_steps", "epochs", "steps"),
    [
        (90, 8, 4, None, 4),
        (90, 8, None, None, 12),
        (88, 8, None, 1.0, 11),
        (90, 8, None, 2.0, 23),
        (90, 8, None, 0.1, 2),
    ],
)
def test_optimizer_steps(rows: int, batch: int, max_steps: int | None, epochs: float | None, steps: int) -> None:
    training = Training(global_batch_size=batch, max_steps=max_steps, num_train_epochs=epochs)
    assert training.optimizer_steps(rows) == steps


def test_tokens_of_every_step() -> None:
    """Rows of 1, 2, 4, 8 and 16 tokens: the sum of a batch says which rows are in it."""
    dataset = Dataset.from_dict({"input_ids": [[0] * 2**n for n in range(5)]})
    stream = StreamSampler(rows=5, total=6, seed=1, start=2)
    order = list(stream)
    assert tokens_per_step(dataset, stream, 2) == [2 ** order[0] + 2 ** order[1], 2 ** order[2] + 2 ** order[3]]


# ---- the learning rate


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"),
    [
        ("auto", 1, 0), ("auto", 9, 0), ("auto", 10, 1), ("auto", 33, 1), ("auto", 34, 2), ("auto", 1000, 30),
        (0.0, 1000, 0), (0.25, 4, 1), (0.03, 1, 1), (0.5, 9, 5), (1.0, 4, 4),
    ],
)  # fmt: skip
def test_warmup_steps(ratio: Any, steps: int, warmup: int) -> None:
    assert Training(warmup_ratio=ratio).warmup(steps) == warmup


def test_a_number_of_warmup_steps() -> None:
    assert [Training(warmup_steps=3).warmup(steps) for steps in (2, 3, 100)] == [2, 3, 3]
    assert Training(warmup_steps=0).warmup(100) == 0


@pytest.mark.parametrize(
    ("changes", "rows", "expected"),
    [
        ({}, 320, None),
        ({"max_steps": 10}, 32, None),
        (
            {"max_steps": 10},
            1,
            "each optimizer step trains rows of data.train more than once: the global batch has 32, the data 1 row; "
            "what helps: more data, a smaller training.global_batch_size",
        ),
        (
            {},
            288,
            "this run makes only 9 optimizer steps: 288 rows, global batch size 32. It will learn little; what helps: "
            "more training.num_train_epochs, a smaller training.global_batch_size",
        ),
        (
            {"num_train_epochs": 0.5},
            40,
            "this run makes only 1 optimizer step: 40 packed rows, global batch size 32. It will learn little; what "
            "helps: more training.num_train_epochs, a smaller training.global_batch_size, data.packing: false",
        ),
        (
            {"max_steps": 4},
            9000,
            "this run makes only 4 optimizer steps: 9,000 rows, global batch size 32, training.max_steps 4. It will "
            "learn little; what helps: a higher training.max_steps",
        ),
    ],
)
def test_few_steps(tiny: Tiny, changes: dict[str, Any], rows: int, expected: str | None) -> None:
    recipe = Recipe.model_validate(tiny.recipe(training=changes))
    documents = 100 if expected and "packed" in expected else rows
    found = few_steps.warnings(recipe, {"train": {"rows": rows, "documents": documents}})
    assert found == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("changes", "training", "row_tokens", "expected"),
    [
        # 90 chats of some 40 bytes each; packed, they are a dozen rows of 64 tokens
        ({"packing": False}, {"global_batch_size": 9}, None, None),
        ({"packing": False}, {"global_batch_size": 10}, None, "this run makes only 9 optimizer steps: 90 rows, "),
        ({"packing": False, "eval": 0.5}, {"global_batch_size": 9}, None, "only 5 optimizer steps: 45 rows, "),
        ({}, {"num_train_epochs": 2, "global_batch_size": 23}, 16.0, "only about 2 optimizer steps: about 23 packed "),
        (
            {},
            {"num_train_epochs": 20},
            16.0,
            "more than once: the global batch has 32, the data about 23 packed rows; ",
        ),
        (
            {"packing": False},
            {"max_steps": 12, "global_batch_size": 91},
            None,
            "the global batch has 91, the data 90 rows",
        ),
        ({"packing": False}, {"max_steps": 12, "global_batch_size": 90}, None, None),
        ({}, {"global_batch_size": 4}, 64.0, None),
        (
            {},
            {"max_steps": 4, "global_batch_size": 8},
            None,
            "only 4 optimizer steps: global batch size 8, training.max_",
        ),
        ({"train": "/gone.jsonl"}, {}, None, None),
        ({"train": "/gone.jsonl"}, {"max_steps": 4}, None, "only 4 optimizer steps: "),
        ({"columns": {"messages": "x"}}, {}, None, None),  # validate and launch say what is wrong
    ],
)
def test_few_steps_are_expected_before_the_data_is_tokenized(
    tiny: Tiny, changes: dict[str, Any], training: dict[str, Any], row_tokens: float | None, expected: str | None
) -> None:
    recipe = tiny.recipe(training=training)
    found = few_steps.expected(Recipe.model_validate(recipe | {"data": recipe["data"] | changes}), row_tokens)
    assert len(found) == bool(expected) and (expected or "") in "".join(found)


def test_few_steps_are_estimated_from_the_text(tiny: Tiny) -> None:
    """Near what a tokenizer makes of it: 4 bytes a token."""
    lines = (tiny.path / "chat.jsonl").read_text().splitlines()
    size = sum(len(m["content"]) + len(m["role"]) + 11 for line in lines for m in json.loads(line)["messages"])
    [found] = few_steps.expected(Recipe.model_validate(tiny.recipe(training={})))
    rows = int(re.search(r"about (\d+) packed rows", found)[1])
    assert rows == pytest.approx(size / 4 / 64, rel=0.1)


COSINE = [1.0, 0.75, 0.25]  # (1 + cos(pi i / 3)) / 2


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("cosine", 0, COSINE),
        ("cosine", 1, [1 / 2, *COSINE]),
        ("cosine", 3, [1 / 4, 2 / 4, 3 / 4, *COSINE]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("constant_with_warmup", 2, [1 / 3, 2 / 3, 1, 1]),
        ("constant_with_warmup", 4, [1 / 5, 2 / 5, 3 / 5, 4 / 5]),
        ("constant", 2, [1, 1, 1, 1]),
    ],
)
def test_learning_rates(tiny: Tiny, tmp_path: Path, schedule: str, warmup: int, expected: list[float]) -> None:
    """Of every step, and of the rest after any of them: a run that continues sets its schedule by the step."""
    check_rates(tiny, tmp_path, expected, training__lr_scheduler_type=schedule, warmup_ratio=warmup / len(expected))
    check_rates(tiny, tmp_path, expected, training__lr_scheduler_type=schedule, warmup_steps=warmup)


def test_another_schedule_of_transformers(tiny: Tiny, tmp_path: Path) -> None:
    """As `distft import` writes axolotl's cosine_min_lr_ratio: the cosine, between half the peak rate and all of it."""
    overrides = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.5}}
    expected = [1 / 2, *(0.5 + 0.5 * part for part in COSINE)]
    check_rates(tiny, tmp_path, expected, warmup_steps=1, trainer={"overrides": overrides})


def check_rates(tiny: Tiny, tmp_path: Path, expected: list[float], **changes: Any) -> None:
    steps = len(expected)
    given = tiny.recipe(training__learning_rate=8.0)
    del given["training"]["warmup_ratio"]
    for name in ("warmup_steps", "warmup_ratio"):
        if name in changes:
            given["training"][name] = changes.pop(name)
    for name, value in changes.items():
        group, _, key = name.partition("__")
        given[group] = given[group] | {key: value} if key else value
    recipe = Recipe.model_validate(given)
    batch = {"micro_batch_size": 1, "gradient_accumulation_steps": 1}
    plan = {"batch": batch, "gradient_checkpointing": False, "strategy": "ddp"}
    arguments = training_arguments(recipe, plan, RunDir(tmp_path), steps)
    for start in range(steps):
        trainer = RecipeTrainer(stream=StreamSampler(1, 1, 0), model=torch.nn.Linear(2, 2), args=arguments)
        trainer.create_optimizer_and_scheduler(steps)
        if start:
            set_schedule(trainer, start)
        rates = []
        for _ in range(start, steps):
            rates.append([group["lr"] for group in trainer.optimizer.param_groups])
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        assert rates == [[pytest.approx(8.0 * part)] * 2 for part in expected[start:]], start


def test_when_fsdp_reduces_gradients(tiny: Tiny, tmp_path: Path) -> None:
    """Those of adapters after the last micro-batch; those of whole layers after each."""
    batch = {"micro_batch_size": 1, "gradient_accumulation_steps": 2}
    plan = {"batch": batch, "gradient_checkpointing": False, "strategy": "fsdp"}
    found = []
    for changes in ({}, {"lora": {"r": 4, "modules_to_save": ["lm_head"]}}, {"lora": None}):
        recipe = Recipe.model_validate(tiny.recipe(**changes))
        arguments = training_arguments(recipe, plan, RunDir(tmp_path), 4)
        found.append(arguments.accelerator_config.gradient_accumulation_kwargs["sync_each_batch"])
    assert found == [False, True, True]


# ---- which tokens are trained on


TURNS = [
    {"role": "user", "content": "read file"},
    {"role": "assistant", "content": "open path"},
    {"role": "user", "content": "node"},
    {"role": "assistant", "content": "rank step"},
]
# That of tests/tiny.py without the marks that say which tokens are the assistant's.
UNMARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content + '<|go|>' }}{% endif %}{% endfor %}"
)
# Leaves out all turns but the last two.
FORGETFUL = UNMARKED.replace("in messages", "in messages[-2:]")


@pytest.mark.parametrize("template", ["its own", UNMARKED])
def test_the_turns_of_the_assistant_are_trained_on(tiny: Tiny, tmp_path: Path, template: str) -> None:
    text, trained = encoded(tiny, tmp_path, "messages", {"messages": TURNS}, template)
    assert text == "<|user|>read file<|go|>open path<eos><|user|>node<|go|>rank step<eos>"
    assert trained == "open path<eos>rank step<eos>"


def test_a_template_that_leaves_out_turns_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RowProblem, match=r"^messages\[0\] \(user\): the chat template leaves out"):
        encoded(tiny, tmp_path, "messages", {"messages": TURNS}, FORGETFUL)


def test_a_text_and_a_completion(tiny: Tiny, tmp_path: Path) -> None:
    assert encoded(tiny, tmp_path, "text", {"text": "read file"}) == ("read file<eos>", "read file<eos>")
    assert encoded(tiny, tmp_path, "text", {"text": "read<eos>"}) == ("read<eos>", "read<eos>")
    row = {"prompt": "read ", "completion": "file"}
    assert encoded(tiny, tmp_path, "prompt_completion", row) == ("read file<eos>", "file<eos>")


def encoded(
    tiny: Tiny, folder: Path, data_format: str, row: dict[str, Any], template: str = "its own"
) -> tuple[str, str]:
    """All of a row's tokens as text, and those that are trained on."""
    changes = {}
    if template != "its own":
        (folder / "template.jinja").write_text(template)
        changes = {"data__chat_template": str(folder / "template.jinja")}
    recipe = Recipe.model_validate(tiny.recipe(**changes))
    tokenizer = load_tokenizer(recipe)
    (document,) = encoder(data_format, Tokenization(tokenizer), recipe).encode(row)
    trained = [i for i, wanted in zip(document.ids, document.trained, strict=True) if wanted]
    return tokenizer.decode(document.ids), tokenizer.decode(trained)


@pytest.mark.parametrize(
    ("how", "documents"),
    [
        ("truncate", [list(range(8))]),
        ("drop", []),
        ("split", [list(range(8)), list(range(8, 16))]),  # the 17th token alone predicts nothing
    ],
)
def test_a_row_of_17_tokens_where_8_are_allowed(tiny: Tiny, how: str, documents: list[list[int]]) -> None:
    recipe = Recipe.model_validate(tiny.recipe(data__max_length=8, data__long_rows=how))
    counts = Counts()
    found = list(fit("rows.jsonl:3", (list(range(17)), [True] * 17), recipe, counts))
    assert [ids for ids, _ in found] == documents
    assert (counts.long_rows, counts.longest, counts.examples) == (1, 17, [("rows.jsonl:3", 17)])


# ---- numbers


def test_summed_loss() -> None:
    """Equal logits for 5 tokens: each prediction costs ln 5. Of 3 targets one does not count."""
    loss, tokens = summed_loss(torch.zeros(1, 4, 5), torch.tensor([[1, 2, -100, 4]]))
    assert (loss.item(), tokens.item()) == (pytest.approx(2 * math.log(5)), 2)
    sure = torch.full((1, 2, 5), -1e4)
    sure[0, 0, 3] = 0.0  # the logits at a token predict the next one
    assert summed_loss(sure, torch.tensor([[0, 3]]))[0].item() == 0
    assert summed_loss(sure, torch.tensor([[0, 2]]))[0].item() == 1e4


def test_losses_by_hand() -> None:
    """Of a token with probability p the gradient at the logits is that of the cross-entropy times p (DFT: the weight
    has none), or times the entropy of the likeliest words over 3 (EAFT)."""
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.125, 0.125], [0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]]]))
    labels, count = torch.tensor([[9, 1, -100]]), torch.tensor(2)  # the first token predicts the second: p = 1/4
    expected = {"nll": 1.0, "dft": 0.25, "eaft": 1.75 * math.log(2) / 3}  # entropy 1/2 + 2/4 + 2 * 3/8 bits
    for loss_type, weight in expected.items():
        leaf = logits.clone().requires_grad_()
        loss = mean_loss(loss_type)(SimpleNamespace(logits=leaf), labels, num_items_in_batch=count)
        assert loss.item() == pytest.approx(weight * math.log(4) / 2), loss_type
        loss.backward()
        gradient = weight / 2 * torch.tensor([0.5, 0.25 - 1, 0.125, 0.125])
        torch.testing.assert_close(leaf.grad[0], torch.stack([gradient, torch.zeros(4), torch.zeros(4)]), msg=loss_type)
    assert mean_loss("nll")(SimpleNamespace(logits=logits), labels, count).item() == pytest.approx(
        (summed_loss(logits, labels)[0] / 2).item()
    )


# QLoRA's 4-bit NormalFloat (arXiv 2305.14314, appendix E).
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def test_nf4_keeps_its_own_values_and_rounds_others_to_the_nearest() -> None:
    """Blocks of 64 with the same largest value, so that their scales are exact, too."""
    table = torch.tensor(NF4_VALUES)
    weight = 0.5 * table.repeat(16).view(4, 64)
    torch.testing.assert_close(dequantized(weight, "nf4"), weight, rtol=1e-6, atol=0)
    moved = weight.clone()
    moved[:, 7] = 0.5 * 0.03  # nearer to 0 than to 0.0796
    moved[:, 9] = 0.5 * 0.21  # nearer to 0.2461 than to 0.1609
    found = dequantized(moved, "nf4")
    assert found[0, 7] == 0
    assert found[0, 9].item() == pytest.approx(0.5 * NF4_VALUES[10], rel=1e-6)


def test_int8_has_a_scale_per_row() -> None:
    weight = torch.tensor([[127.0, -127.0, 1.0, 0.4], [1.27, 0.0, -0.5, 0.014]])
    expected = torch.tensor([[127.0, -127.0, 1.0, 0.0], [1.27, 0.0, -0.5, 0.01]])
    torch.testing.assert_close(dequantized(weight, "int8"), expected, rtol=1e-3, atol=1e-6)


def test_ranks_with_the_same_range_share_its_writing() -> None:
    def share(copy: int) -> Share:
        return Share("weight", (2, 5), 0, torch.zeros(10), {}, {}, copies=3, copy=copy)

    assert [share(copy).own() for copy in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 10)]


def test_speed_counts_the_tokens_since_the_last_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", tokens=700, token_share=1e-4)
    logs = {"loss": 2.5, "grad_norm": 1.0, "learning_rate": 1e-3}
    for step, tokens in ((5, 1700), (6, 1900)):
        log.clock = time.perf_counter() - 5
        log.pause(3)  # an evaluation
        log.write(step, tokens, logs, peak_memory=1, eval_loss=None if step == 5 else 3.0)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["tokens_per_second"] == pytest.approx(1000 / 2, rel=0.05)
    assert second["tokens_per_second"] == pytest.approx(200 / 2, rel=0.05)
    assert ("eval_loss" in first, second["eval_loss"]) == (False, 3.0)
    assert first["mfu"] == pytest.approx(0.05, rel=0.05)


def test_what_a_token_takes_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"time": {"flops_per_token": 48e9}, "topology": {"world_size": 4}, "mixed_precision": "bf16"}
    assert token_share(plan) is None  # on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    # 6 FLOPs for each of 8 billion weights; four A100 of 312 TFLOP/s at 13,000 tokens a second are half used.
    assert 13_000 * token_share(plan) == pytest.approx(0.5)
    assert token_share(plan | {"mixed_precision": "no"}) == pytest.approx(16 * token_share(plan))
    assert token_share(plan | {"time": {"flops_per_token": None}}) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU of next year")
    assert token_share(plan) is None


@pytest.mark.parametrize(
    ("steps", "seconds"), [([], 3600), ([1, 2, 3, 9], 3600), ([1, 1, 2, 9, 9], 300), ([1, 10, 20, 30, 40], 400)]
)
def test_when_a_step_takes_too_long(tmp_path: Path, steps: list[float], seconds: float) -> None:
    """20 times the median, and at least 5 minutes; an hour until there is a median."""
    watchdog = Watchdog(RunDir(tmp_path), 0, ["here"])
    watchdog.rest()  # else it would end this process one day
    watchdog.steps.extend(steps)
    assert watchdog.limit() == seconds
