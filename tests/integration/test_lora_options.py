"""What of LoRA is more than two matrices on a layer: layers that are trained whole, learning rates of their own.

test_equivalence.py compares their losses under every strategy; here: checkpoints, final/, `distft merge`, start_from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import FP32, SAVED, STEPS, Job, alone, assert_ran
from running import Result, create
from safetensors.torch import load_file
from tiny import Tiny
from warm import WarmRanks

from distft.config.loading import load_recipe
from distft.errors import RecipeError
from distft.runs.directory import RunDir
from distft.train.merge import merge

# The ids of new tokens too, where there are some.
ROWS = torch.tensor([[5, 6, 7, 4, 60, 20, 70, 80], [81, 82, 4, 31, 30, 90, 91, 300]])
NEW_ROWS = torch.tensor([[320, 5, 321, 4, 60, 320, 70, 80], [81, 82, 4, 321, 320, 90, 91, 321]])


@pytest.fixture(scope="module")
def runs(trained: Callable[..., Result], tiny: Tiny) -> Callable[[Job], Result]:
    return lambda job: trained(job.recipe(tiny), job.ranks)


def metrics(run: RunDir) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in map(json.loads, run.metrics.read_text().splitlines())}


JOBS = [
    *(Job(strategy, 2, "whole layers new tokens") for strategy in ("zero3", "fsdp")),
    *(Job(strategy, 2, "whole layers tied") for strategy in ("ddp", "zero2", "zero3", "fsdp")),
]


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_as_one_process_does(runs: Callable[[Job], Result], job: Job) -> None:
    result, reference = runs(job), runs(alone(job.tuning))
    assert_ran(result, job)
    for column in ("loss", "grad_norm"):
        assert result.column(column) == pytest.approx(reference.column(column), abs=FP32), column
    assert result.status["eval_loss_after"] == pytest.approx(reference.status["eval_loss_after"], abs=FP32)
    assert result.status["eval_loss_after"] < result.status["eval_loss_before"] - 0.05


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Job("fsdp", 2, "whole layers"), Job("zero2", 2, "whole layers")),
        (Job("zero3", 2, "whole layers"), Job("fsdp", 4, "whole layers")),
        (Job("zero2", 2, "whole layers"), Job("ddp", 1, "whole layers")),
        (Job("ddp", 1, "loraplus"), Job("zero2", 2, "loraplus")),
        (Job("zero2", 2, "loraplus"), Job("zero3", 2, "loraplus")),
        (Job("zero3", 2, "loraplus"), Job("fsdp", 4, "loraplus")),
        (Job("fsdp", 2, "oft layers"), Job("zero2", 2, "oft layers")),
        (Job("zero3", 2, "oft layers"), Job("fsdp", 4, "oft layers")),
        (Job("zero2", 2, "oft layers"), Job("ddp", 1, "oft layers")),
        (Job("fsdp", 2, "pissa"), Job("zero3", 2, "pissa")),
        (Job("zero3", 2, "pissa"), Job("ddp", 1, "pissa")),
        (Job("ddp", 1, "pissa"), Job("fsdp", 4, "pissa")),
    ],
    ids=str,
)
def test_goes_on_from_another(
    runs: Callable[[Job], Result], warm: WarmRanks, tiny: Tiny, tmp_path: Path, target: Job, source: Job
) -> None:
    before, reference = RunDir(runs(source).run_dir), RunDir(runs(alone(target.tuning)).run_dir)
    run = create(target.recipe(tiny), tmp_path, target.ranks)
    shutil.copytree(before.checkpoint(SAVED), run.checkpoint(SAVED))
    shutil.copy(before.metrics, run.metrics)
    if before.initial_adapter.exists():
        shutil.copy(before.initial_adapter, run.initial_adapter)
    warm.train(run)
    found, wanted = metrics(run), metrics(reference)
    for step in range(SAVED + 1, STEPS + 1):
        for name in ("loss", "grad_norm", "tokens", "learning_rate"):
            assert found[step][name] == pytest.approx(wanted[step][name], abs=FP32), (step, name)
    final = load_file(run.final / "adapter_model.safetensors")
    for name, value in load_file(reference.final / "adapter_model.safetensors").items():
        torch.testing.assert_close(final[name], value, atol=1e-4, rtol=0)


@torch.no_grad()
def logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    return model.eval()(rows).logits.float()


@pytest.mark.parametrize("tuning", ["whole layers", "whole layers new tokens", "whole layers tied"])
def test_final_and_merge(runs: Callable[[Job], Result], tmp_path: Path, tuning: str) -> None:
    """final/ as plain peft loads it onto the base as it was, and the merged model, have the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = RunDir(runs(alone(tuning)).run_dir)
    recipe = load_recipe(run.recipe)
    rows = NEW_ROWS if "new" in tuning else ROWS
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path)
    before = None if "new" in tuning else logits(base, rows)
    if "new" in tuning:
        base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(run.final)))
    adapter = PeftModel.from_pretrained(base, run.final)
    trained = logits(adapter, rows)
    assert before is None or (trained - before).abs().max() > 0.1
    assert "lm_head trained whole" in (run.final / "README.md").read_text()
    names = set(load_file(run.final / "adapter_model.safetensors"))
    assert {f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens")} <= names
    if "tied" in tuning:
        with pytest.raises(RecipeError, match="is tied to another weight"):
            merge(run, tmp_path / "merged")
        assert any("will not be able to merge" in text for text in json.loads(run.status.read_text())["warnings"])
        return
    answer = merge(run, tmp_path / "merged")
    assert answer.logits.difference < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, rows), trained, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dora", [False, True])
def test_the_rates_of_lora_plus_are_those_of_peft(tiny: Tiny, tmp_path: Path, dora: bool) -> None:
    from peft.optimizers import create_loraplus_optimizer

    from distft.train.loraplus import set_rates
    from distft.train.model import build_model

    lora = {"r": 4, "use_dora": dora, "loraplus_lr_ratio": 8, "target_modules": ["q_proj", "embed_tokens"]}
    recipe = load_recipe(create(tiny.recipe(lora=lora | {"modules_to_save": ["lm_head"]}), tmp_path, 1).recipe)
    model = build_model(recipe, "ddp")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5)
    assert recipe.lora is not None
    set_rates(ours, model, recipe.lora)
    assert ours.param_groups[0]["lr"] == 0.5
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=8)
    rates = [
        {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]} for optimizer in (ours, theirs)
    ]
    assert rates[0] == rates[1]
    assert set(rates[0].values()) == {0.5, 4.0, 1e-6}


def test_a_checkpoint_without_the_part_of_its_base(
    runs: Callable[[Job], Result], warm: WarmRanks, tiny: Tiny, tmp_path: Path
) -> None:
    run = create(alone("pissa").recipe(tiny), tmp_path, 1)
    shutil.copytree(RunDir(runs(alone("pissa")).run_dir).checkpoint(SAVED), run.checkpoint(SAVED))
    with pytest.raises(AssertionError, match=r"initial_adapter.safetensors: the adapter's first weights, which"):
        warm.train(run)
    assert not run.initial_adapter.exists()


@pytest.mark.parametrize("tuning", ["pissa", "olora"])
def test_an_adapter_that_was_a_part_of_the_base(
    runs: Callable[[Job], Result], trained: Callable[..., Result], tiny: Tiny, tmp_path: Path, tuning: str
) -> None:
    """final/ is plain LoRA of twice the rank on the base as it is, with the losses of what was trained."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = runs(alone(tuning))
    run, lora = RunDir(result.run_dir), alone(tuning).recipe(tiny)["lora"]
    config = json.loads((run.final / "adapter_config.json").read_text())
    factor = 2**0.5 if lora.get("use_rslora") else 2
    assert (config["init_lora_weights"], config["r"]) == (True, 8)
    assert config["lora_alpha"] == pytest.approx(8 * factor)
    assert config["rank_pattern"] == {"up_proj": 4}
    assert config["alpha_pattern"] == {"down_proj": pytest.approx(3 * factor)}
    assert (
        f"(r 8: trained from {tuning} with r 4, saved for the base as it is)" in (run.final / "README.md").read_text()
    )
    base = AutoModelForCausalLM.from_pretrained(tiny.path / "model")
    before = logits(base, ROWS)
    plain = logits(PeftModel.from_pretrained(base, run.final), ROWS)
    assert (plain - before).abs().max() > 0.1
    for step in (None, STEPS):
        merge(run, tmp_path / f"merged-{step}", step=None if step is None else SAVED)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged-None")
    torch.testing.assert_close(logits(merged, ROWS), plain, atol=1e-4, rtol=0)
    # The merged model, and a new run from final/, have the eval loss that was measured at the end.
    whole = tiny.recipe(
        model__name_or_path=str(tmp_path / "merged-None"),
        data__eval=str(tiny.path / "heldout.jsonl"),
        training__max_steps=1,
    )
    assert trained(whole).status["eval_loss_before"] == pytest.approx(result.status["eval_loss_after"], abs=1e-4)
    again = alone(tuning).recipe(tiny) | {"lora": {**lora, "init_lora_weights": True}}
    again["lora"] |= {name: config[name] for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
    again["lora"]["start_from"] = str(run.final)
    assert trained(again).status["eval_loss_before"] == pytest.approx(result.status["eval_loss_after"], abs=FP32)


@pytest.mark.parametrize("tuning", ["oft", "oft layers", "oft nf4", "coft"])
def test_rotations(
    runs: Callable[[Job], Result], trained: Callable[..., Result], tiny: Tiny, tmp_path: Path, tuning: str
) -> None:
    """final/ as plain peft loads it, the merged model, and a run that starts from final/ compute the same."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    before = runs(alone(tuning))
    run, recipe = RunDir(before.run_dir), alone(tuning).recipe(tiny)
    card = (run.final / "README.md").read_text()
    assert {
        "oft": "# tiny\n\nOFT adapter (blocks of 8) of `model`.",
        "oft layers": "OFT adapter (4 blocks) of `model`, with embed_tokens trained whole.",
        "oft nf4": "OFT adapter (blocks of 32) of `model`, trained on nf4 weights.",
        "coft": "constrained OFT adapter (blocks of 16) of `model`.",
    }[tuning] in card
    assert ("- oft\n" in card, "- lora\n" in card, "lora_alpha" in card) == (True, False, False)
    answer = merge(run, tmp_path / "merged")
    assert answer.logits.difference < 1e-4
    recipe["lora"] = {**recipe["lora"], "start_from": str(run.final)}
    again = trained(recipe)
    assert again.status["eval_loss_before"] == pytest.approx(before.status["eval_loss_after"], abs=FP32)
    if "nf4" in tuning:
        return
    base = AutoModelForCausalLM.from_pretrained(recipe["model"]["name_or_path"])
    untrained = logits(base, ROWS)
    adapter = logits(PeftModel.from_pretrained(base, run.final), ROWS)
    assert (adapter - untrained).abs().max() > 0.1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, ROWS), adapter, atol=1e-4, rtol=0)


def test_starts_from_layers_that_were_trained_whole(
    runs: Callable[[Job], Result], trained: Callable[..., Result], tiny: Tiny
) -> None:
    before = runs(alone("whole layers"))
    recipe = alone("whole layers").recipe(tiny)
    recipe["lora"] = {**recipe["lora"], "start_from": str(before.run_dir / "final")}
    after = trained(recipe)
    assert after.status["eval_loss_before"] == pytest.approx(before.status["eval_loss_after"], abs=FP32)


def test_16_bit_keeps_the_dtype_of_what_is_around_a_whole_layer(tiny: Tiny, tmp_path: Path) -> None:
    """The copy is float32, and hidden states are not."""
    from distft.train.model import build_model

    changes = {"training__mixed_precision": "bf16", "lora__modules_to_save": ["embed_tokens", "model.norm"]}
    run = create(tiny.recipe(**changes), tmp_path, 1)
    model = build_model(load_recipe(run.recipe), "ddp", 1)
    dtypes: list[torch.dtype] = []
    for layer in (model.get_input_embeddings(), model.get_base_model().model.norm):
        assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
        layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(ROWS)
    assert dtypes == [torch.bfloat16] * 2
