"""Some of transformers' model types, planned with the sizes of their config classes, held against what transformers and
peft count: benchmarks/plan_sweep.py does so for all of them."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from benchmarks.plan_sweep import NAMES, Found, look_at
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


def test_all_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without counting, which takes some seconds a type: by formula, refused, or to be counted."""

    def count(*_: object) -> None:
        raise SimulationError("not here")

    monkeypatch.setattr(planned, "_count", count)
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
