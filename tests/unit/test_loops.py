"""Blocks that loop over the tokens of a row: their memory is drawn from short rows, and compared with that of whole
ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distft.config.loading import load_recipe
from distft.planner.counting import Step
from distft.simulation import loops
from distft.simulation.simulate import Traced

LENGTH = 128
SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 480, "pad_token_id": 0, "num_attention_heads": 4}
MIXERS = {"mamba_d_state": 8, "mamba_dt_rank": 8, "num_key_value_heads": 2, "intermediate_size": 96}
MODELS = {
    # Mamba blocks with and without experts, and one of attention; a residual stream in float32.
    "jamba": {**MIXERS, "attn_layer_period": 4, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1},
    "mamba": {"state_size": 8, "residual_in_fp32": True, "time_step_rank": 8, "intermediate_size": 128},
}


@pytest.mark.parametrize(
    ("model", "regime", "checkpointing"),
    [("jamba", "zero", True), ("mamba", "autocast", False)],
)
def test_the_line_is_what_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, regime: str, checkpointing: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model, **SIZES, **MODELS[model]}))
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "recipe.yaml").write_text(
        f"name: t\nmodel: {{name_or_path: {tmp_path}}}\ndata: {{train: {tmp_path}/data.jsonl, max_length: {LENGTH}}}\n"
        "training: {global_batch_size: 2}\n"
    )
    traced, step = Traced(load_recipe(tmp_path / "recipe.yaml")), Step(regime, checkpointing, False, 1)
    lengths: list[int] = []
    put_together = loops._put_together
    monkeypatch.setattr(loops, "MOST_OPERATORS", 1000)
    monkeypatch.setattr(loops, "_put_together", lambda *given: (lengths.append(1), put_together(*given))[1])
    drawn = traced._trace(step)
    assert lengths == [1]
    assert traced.has_loops
    monkeypatch.setattr(loops, "MOST_OPERATORS", None)
    traced.has_loops = False
    whole = traced._trace(step)
    assert lengths == [1]
    assert list(drawn) == list(whole)
    hidden = 4 * LENGTH * SIZES["hidden_size"]  # in float32
    for segment, live in whole.items():
        difference = abs(sum(drawn[segment].values()) - sum(live.values()))
        assert difference <= 2 * hidden + 0.001 * sum(live.values()), segment
