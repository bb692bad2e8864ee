"""Some of transformers' model types, planned with the sizes of their config classes, held against what transformers and
peft count: benchmarks/plan_sweep.py does so for all of them. And published models, all of them without counting.

Another published model is a line in published_configs.jsonl, in the order of names: `name`, `kind` and `config`, which
is its config.json without what changes nothing here (ids of tokens, versions, the class's own defaults; of lists of
layers that are stored otherwise the first). `python benchmarks/plan_sweep.py --published NAME` says what else the line
must have.
"""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version

import pytest

from benchmarks.plan_sweep import NAMES, Found, Published, look_at, look_at_published, published
from distft.errors import SimulationError
from distft.jobs import planned

GAPS = ("blt",)  # and qwen4_exp, qwen4_exp_text: docs/plan.md says why
COUNTED = (
    "dbrx",
    "jetmoe",
    "arcee",
    "ernie4_5_moe",
    "deepseek_v3",
    "glm4_moe",
    "minimax_m2",
    "qwen3_5_text",
    "xglm",
    "zamba2",
)
FORMULA = ("llama", "qwen3_moe", "gpt_oss")
REFUSED = {"bert": "an encoder", "whisper": "a speech model", "trocr": "it reads images", "bart": "an encoder-decoder"}
REFUSED |= {"gemma3n": "timm", "gemma4_assistant": "it drafts tokens"}


PUBLISHED = published()
QUICKLY_COUNTED = ("ERNIE-4.5-0.3B-PT", "codegen-2B-mono", "falcon-mamba-7b-instruct-4bit", "openai-gpt")
# What is refused only where the model is built to count it.
NOT_BUILT = ("Llama-4-Scout-unsloth", "Zamba2-7B", "gemma-3n-E4B-it")

# What benchmarks/plan_sweep.py found of the types of AutoModelForCausalLM of transformers 5.23; others are counted.
KNOWN = (
    *("bloom", "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt-sw3", "gpt2"),
    *("gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "llama", "ministral3", "mistral"),
    *("mixtral", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe"),
    *("qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2"),
)
NONE = (
    *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small"),
    *("camembert", "cpmant", "data2vec-text", "electra", "ernie", "fuyu", "gemma4_assistant"),
    *("gemma4_unified_assistant", "git", "got_ocr2", "marian", "mbart", "megatron-bert", "moshi"),
    *("moss_transcribe_diarize", "musicgen", "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet"),
    *("reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper"),
    *("xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod"),
)


def count_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(*_: object) -> None:
        raise SimulationError("not here")

    monkeypatch.setattr(planned, "_count", count)


def test_all_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without counting, which takes some seconds a type: by formula, refused, or to be counted."""

    count_nothing(monkeypatch)
    kinds: dict[str, list[str]] = {"formula": [], "refused": [], "counted": []}
    for model_type in sorted(NAMES):
        found = look_at(model_type, compare=False)
        kinds["counted" if found.why.endswith("not here") or found.kind == "gap" else found.kind].append(model_type)
    assert kinds["formula"] == [*KNOWN]
    assert kinds["refused"] == [*NONE]
    if version("transformers").startswith("5.23."):
        assert len(kinds["counted"]) == len(NAMES) - len(KNOWN) - len(NONE) == 112


@pytest.mark.parametrize("model_type", [*FORMULA, *COUNTED])
def test_is_planned_rightly(model_type: str) -> None:
    assert look_at(model_type) == Found("formula" if model_type in FORMULA else "counted")


@pytest.mark.parametrize("model_type", GAPS)
def test_is_a_guess_that_says_so(model_type: str) -> None:
    found = look_at(model_type)
    assert found.kind == "gap" and "the memory could not be counted" in found.why


@pytest.mark.parametrize("model_type", REFUSED)
def test_is_refused_for_what_it_is(model_type: str) -> None:
    found = look_at(model_type)
    assert found.kind == "refused"
    assert REFUSED[model_type] in found.why


@pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED)
def test_published(model: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without counting; what has a formula has the parameters that transformers and peft counted."""
    if model.kind != "formula" and not version("transformers").startswith("5.23."):
        pytest.skip("another transformers has other types")
    count_nothing(monkeypatch)
    found = look_at_published(model, compare=False)
    if model.kind == "counted" or model.name in NOT_BUILT:
        assert found == Found("gap", f"{found.why.removesuffix('not here')}not here")
    else:
        assert found.kind == model.kind
        assert model.why in found.why


def test_what_is_published() -> None:
    kinds = Counter(model.kind for model in PUBLISHED.values())
    assert dict(kinds) == {"formula": 75, "counted": 91, "refused": 44}
    assert list(PUBLISHED) == sorted(PUBLISHED)
    for model in PUBLISHED.values():
        planned_rightly = model.kind in ("formula", "counted")
        assert bool(model.why) != planned_rightly
        assert (model.parameters > model.trained > 0) == planned_rightly


@pytest.mark.parametrize("name", QUICKLY_COUNTED)
def test_published_is_counted_rightly(name: str) -> None:
    assert look_at_published(PUBLISHED[name]) == Found("counted")


@pytest.mark.parametrize("name", NOT_BUILT)
def test_published_cannot_be_built(name: str) -> None:
    found = look_at_published(PUBLISHED[name])
    assert found.kind == "refused"
    assert PUBLISHED[name].why in found.why
