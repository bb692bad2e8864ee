"""model.add_tokens and model.eos_token: a ChatML template on a tokenizer that lacks its tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import FP32, SAVED, STEPS, STRATEGIES, Job, alone, assert_ran
from running import Result, create
from safetensors.torch import load_file
from test_equivalence import assert_same
from test_resume import metrics, whole
from tiny import Tiny
from warm import WarmRanks

from distft.runs.directory import RunDir

HIDDEN, OLD, NEW = 64, 320, 322  # <|im_start|> is 320, <|im_end|> 321; <|go|> is 4, and was there
TUNINGS = ("new tokens", "new tokens tied", "new tokens full")
JOBS = [
    *(Job(strategy, ranks, tuning, changes) for tuning in TUNINGS for strategy, ranks, changes in STRATEGIES),
    *(Job(strategy, 2, "new tokens nf4") for strategy in ("ddp", "zero2", "zero3", "fsdp")),
    *(
        Job(strategy, 2, "new tokens", {"training__gradient_checkpointing": True})
        for strategy in ("ddp", "zero3", "fsdp")
    ),
]


@pytest.fixture(scope="module")
def runs(trained: Callable[..., Result], tiny: Tiny) -> Callable[[Job], Result]:
    return lambda job: trained(job.recipe(tiny), job.ranks)


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_as_one_process_does(runs: Callable[[Job], Result], job: Job) -> None:
    result, reference = runs(job), runs(alone(job.tuning))
    assert_ran(result, job)
    assert_same(result, reference)
    found, wanted = (whole(RunDir(run.run_dir).checkpoint(SAVED)) for run in (result, reference))
    weights = {name: len(value) for name, value in wanted.items() if "/" not in name}
    assert weights == {name: len(value) for name, value in found.items() if "/" not in name}
    plan = json.loads(RunDir(result.run_dir).plan.read_text())
    assert sum(weights.values()) == plan["model"]["trainable_parameters"]


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (Job("fsdp", 4, "new tokens"), Job("zero3", 2, "new tokens")),
        (Job("zero3", 2, "new tokens"), Job("ddp", 4, "new tokens")),
        (Job("ddp", 1, "new tokens tied"), Job("fsdp", 4, "new tokens tied")),
        (Job("zero2", 2, "new tokens full"), Job("fsdp", 4, "new tokens full")),
        (Job("zero3", 2, "new tokens full"), Job("ddp", 1, "new tokens full")),
    ],
    ids=lambda job: str(job),
)
def test_goes_on_from_another(
    runs: Callable[[Job], Result], warm: WarmRanks, tiny: Tiny, tmp_path: Path, target: Job, source: Job
) -> None:
    before, reference = RunDir(runs(source).run_dir), RunDir(runs(alone(target.tuning)).run_dir)
    run = create(target.recipe(tiny), tmp_path, target.ranks)
    shutil.copytree(before.checkpoint(SAVED), run.checkpoint(SAVED))
    shutil.copy(before.metrics, run.metrics)
    warm.train(run)
    found, wanted = metrics(run), metrics(reference)
    for step in range(SAVED + 1, STEPS + 1):
        for name in ("loss", "grad_norm", "tokens"):
            assert found[step][name] == pytest.approx(wanted[step][name], abs=FP32), (step, name)
    final = load_file(next(run.final.glob("*.safetensors")))
    for name, value in load_file(next(reference.final.glob("*.safetensors"))).items():
        torch.testing.assert_close(final[name], value, atol=1e-4, rtol=0)


def test_starts_from_an_adapter_with_new_tokens(
    runs: Callable[[Job], Result], trained: Callable[..., Result], tiny: Tiny, tmp_path: Path
) -> None:
    before = runs(alone("new tokens"))
    recipe = alone("new tokens").recipe(tiny)
    recipe["lora"] = {**recipe["lora"], "start_from": str(before.run_dir / "final")}
    after = trained(recipe)
    assert after.status["eval_loss_before"] == pytest.approx(before.status["eval_loss_after"], abs=FP32)
    recipe["model"]["add_tokens"] = ["<|im_start|>", "<|im_end|>", "<|user|>"]
    other = create(recipe, tmp_path, 1)
    from distft.config.loading import load_recipe
    from distft.errors import DataError
    from distft.train.model import build_model

    with pytest.raises(DataError, match=r"lora.start_from: .* other model.add_tokens"):
        build_model(load_recipe(other.recipe), "ddp", 321)


ROWS = torch.tensor([[320, 5, 321, 4, 60, 320, 70, 80], [81, 82, 4, 321, 320, 90, 91, 321]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(ROWS).logits.float()


@pytest.mark.parametrize("tuning", ["new tokens", "new tokens tied"])
def test_final_and_merge(runs: Callable[[Job], Result], tmp_path: Path, tuning: str) -> None:
    """The trained model in memory, final/ as plain peft loads it, and the merged model have the same logits."""
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from distft.config.loading import load_recipe
    from distft.train.merge import merge

    run = RunDir(runs(alone(tuning)).run_dir)
    recipe = load_recipe(run.recipe)
    tied = "tied" in tuning
    rows = [name for name in load_file(run.final / "adapter_model.safetensors") if "delta" in name]
    prefix, delta = "base_model.model.", ".token_adapter.trainable_tokens_delta"
    layers = ["model.embed_tokens", *([] if tied else ["lm_head"])]
    assert sorted(rows) == sorted(f"{prefix}{layer}{delta}" for layer in layers)
    config = json.loads((run.final / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {layer: [4, 320, 321] for layer in layers}

    auto = AutoPeftModelForCausalLM.from_pretrained(run.final)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path)
    old = base.get_input_embeddings().weight.detach().clone()
    base.resize_token_embeddings(NEW)
    plain = logits(PeftModel.from_pretrained(base, run.final))
    assert torch.equal(logits(auto), plain)
    assert plain.shape[-1] == NEW
    trained = auto.get_input_embeddings().weight
    assert torch.equal(trained[[5, 60, 70]], old[[5, 60, 70]])  # the others are frozen
    for token in (4, 320, 321):
        assert not torch.equal(trained[token], old[min(token, OLD - 1)])

    for source, step in (("final", None), ("step", STEPS)):
        out = tmp_path / source
        answer = merge(run, out, step=None if step is None else SAVED)
        assert answer.logits.difference < 1e-4
        merged = AutoModelForCausalLM.from_pretrained(out)
        assert merged.get_input_embeddings().weight.shape == (NEW, HIDDEN)
        assert merged.get_output_embeddings().weight.shape == (NEW, HIDDEN)
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert (len(tokenizer), tokenizer.eos_token, tokenizer.eos_token_id) == (NEW, "<|im_end|>", 321)
        assert (merged.config.vocab_size, merged.config.eos_token_id, merged.generation_config.eos_token_id) == (
            NEW,
            321,
            321,
        )
        if step is None:
            torch.testing.assert_close(logits(merged), plain, atol=1e-5, rtol=1e-5)
    assert GenerationConfig.from_pretrained(run.final).eos_token_id == 321


def test_all_weights(runs: Callable[[Job], Result]) -> None:
    """final/ of a full fine-tuning loads with the rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = RunDir(runs(alone("new tokens full")).run_dir).final
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert model.get_output_embeddings().weight.shape == (NEW, HIDDEN)
    assert len(tokenizer) == model.config.vocab_size == NEW
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == 321
    text = tokenizer.apply_chat_template([{"role": "user", "content": "list"}], tokenize=False)
    assert text == "<|im_start|>user\nlist<|im_end|>\n"
    assert tokenizer(text)["input_ids"][0] == 320
    config = json.loads((final / "config.json").read_text())
    assert config["use_cache"]  # as in the base's; training turns it off
    assert json.loads((final / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_new_row_is_the_mean_of_its_pieces(tiny: Tiny, tmp_path: Path, tuning: str) -> None:
    """Before the first step, in the embeddings and at the output; a token that was there keeps its row."""
    import yaml
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distft.config.loading import load_recipe
    from distft.train.model import build_model

    recipe = alone(tuning).recipe(tiny)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    base = recipe["model"]["name_or_path"]
    pieces = AutoTokenizer.from_pretrained(base)("<|im_end|>")["input_ids"]
    assert len(pieces) > 2
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = build_model(load_recipe(tmp_path / "recipe.yaml"), "ddp", 321)
    for found, old in (
        (model.get_input_embeddings(), plain.get_input_embeddings()),
        (model.get_output_embeddings(), plain.get_output_embeddings()),
    ):
        torch.testing.assert_close(found.weight[321], old.weight[pieces].mean(0))
        assert torch.equal(found.weight[:OLD], old.weight)
    if recipe["lora"]:
        embedded = model.get_input_embeddings()(torch.tensor([[4, 321]]))
        torch.testing.assert_close(embedded[0, 1], plain.get_input_embeddings().weight[pieces].mean(0))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        plan = json.loads(create(recipe, tmp_path / "planned", 1).plan.read_text())
        assert plan["model"]["trainable_parameters"] == trained
        assert plan["model"]["parameters"] == sum(p.numel() for p in model.parameters()) - trained


def test_merge_of_a_quantized_base(runs: Callable[[Job], Result], tmp_path: Path) -> None:
    """Into the weights that were quantized, with the rows as they were trained."""
    from transformers import AutoModelForCausalLM

    from distft.train.merge import merge

    run = RunDir(runs(alone("new tokens nf4")).run_dir)
    assert merge(run, tmp_path / "merged").logits.difference < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    rows = load_file(run.final / "adapter_model.safetensors")
    for layer, weight in (
        ("model.embed_tokens", merged.get_input_embeddings().weight),
        ("lm_head", merged.get_output_embeddings().weight),
    ):
        trained = rows[f"base_model.model.{layer}.token_adapter.trainable_tokens_delta"]
        assert weight.shape == (NEW, HIDDEN)
        torch.testing.assert_close(weight[[4, 320, 321]], trained, atol=0, rtol=0)


@torch.no_grad()
def test_embeddings_that_are_scaled() -> None:
    """Gemma's: rows beside the frozen layers give what a model with these rows in its layers gives."""
    from transformers import GemmaConfig, GemmaForCausalLM

    from distft.train.new_rows import NewRows

    config = GemmaConfig(
        vocab_size=NEW,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    models = [GemmaForCausalLM(config).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    rows = NewRows(models[0], [320, 321])
    changed = torch.randn(2, HIDDEN)
    rows.input.rows.copy_(changed)
    models[1].get_input_embeddings().weight[[320, 321]] = changed
    torch.testing.assert_close(logits(models[0]), logits(models[1]))
