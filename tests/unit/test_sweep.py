"""Some of transformers' model types, planned with the sizes of their config classes, held against what transformers and
peft count: benchmarks/plan_sweep.py does so for all of them."""

from __future__ import annotations

import pytest

from benchmarks.plan_sweep import Found, look_at

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
