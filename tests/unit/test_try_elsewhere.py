"""tools/try_elsewhere.py with what is installed here; docs/runs.md says what it found of the other programs."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import try_elsewhere
from peft import LoraConfig, OFTConfig
from tiny import Tiny
from try_elsewhere import NEW, PROGRAMS, Answer, compare, last_words

ABSENT = [name for name in PROGRAMS if importlib.util.find_spec(PROGRAMS[name].module) is None]


def test_what_is_here_is_tried_and_what_is_absent_is_named(tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny.path / "model")
    assert try_elsewhere.main([folder, "--python", f"transformers={sys.executable}"]) == 0
    lines = {line.split()[0]: line for line in capfd.readouterr().out.splitlines()}
    assert list(lines) == ["reference", *PROGRAMS]
    assert "same: log-probabilities within 0.0e+00" in lines["transformers"]
    assert all(part in lines["transformers"] for part in ("greedy tokens", "tokens of texts", "tokens of a chat"))
    assert "vllm" in ABSENT
    for name in ABSENT:
        assert f"not installed: {PROGRAMS[name].install}" in lines[name]


EXPECTED = Answer(
    "reference", tokens=[[5, 6]], chat=[7], generated=[[8] * NEW], best=[[-1.0] * NEW], gaps=[[0.5] * NEW]
)
EXPECTED = replace(EXPECTED, logprobs=[[-1.0, -2.0]], sums=[-3.0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"logprobs": [[-1.0, -2.0005]]}, []),
        ({"logprobs": [[-1.0, -2.1]]}, ["log-probabilities within 1.0e-01"]),
        ({"logprobs": [[-1.0, math.nan]]}, ["log-probabilities within inf"]),
        ({"sums": [-3.1]}, ["log-likelihoods within 1.0e-01"]),
        ({"best": [[-1.2] * NEW]}, ["log-probabilities of greedy tokens within 2.0e-01"]),
        ({"generated": [[8] * (NEW - 1) + [9]]}, [f"1 x {NEW} greedy tokens of [0]"]),
        ({"tokens": [[5, 9]]}, ["tokens of texts of [0]"]),
        ({"chat": [1, 7]}, ["tokens of a chat"]),
    ],
)
def test_differences(changes: dict[str, object], said: list[str]) -> None:
    assert compare(replace(EXPECTED, **changes), EXPECTED)[1] == said


def test_two_tokens_that_are_equally_likely() -> None:
    other = replace(EXPECTED, generated=[[9] * NEW], best=[])
    assert compare(other, replace(EXPECTED, gaps=[[1e-4] * NEW]))[1] == []


def test_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*options: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            try_elsewhere.main([str(tmp_path), *options])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "neither a model (config.json) nor an adapter" in refused()
    assert "vlm: got no program" in refused("--only", "vlm")
    adapter = {"base_model_name_or_path": "owner/name", "r": 4, "rank_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert "the base owner/name is not a folder here; name its folder with --base" in refused()


def test_an_adapter_without_ranks(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny.path / "model"
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    for config, rank in ((OFTConfig(oft_block_size=8), 1), (LoraConfig(r=4, rank_pattern={"q_proj": 16}), 16)):
        config.base_model_name_or_path = str(model)
        config.save_pretrained(tmp_path)
        asked = try_elsewhere.question(tmp_path, None, tmp_path, None)
        assert (asked["rank"], asked["base"]) == (rank, str(model))


def test_last_words() -> None:
    log = "INFO: starts\n[rank0]: Traceback (most recent call last):\n[rank0]: ValueError: no DoRA\nit ended"
    assert last_words(log) == "[rank0]: ValueError: no DoRA"
    assert last_words("a file\nAssertionError\nended with status 1\n") == "AssertionError"
    assert last_words("    raise NotImplementedError\nNotImplementedError\n") == "NotImplementedError"
    assert last_words("one\ntwo\n") == "two"
