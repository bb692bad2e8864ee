"""model.add_tokens and model.eos_token before any training: tokenizer, rows of the embeddings, plan, errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Tiny, make_model, write_jsonl

from distft.config.recipe import Recipe
from distft.data.cache import content_digest
from distft.errors import DataError
from distft.models.shapes import read_model_shape
from distft.models.vocabulary import rows_needed
from distft.runs.checkpoints import differences, model_identity
from distft.train.chat import Tokenization
from distft.train.data import load_prepared
from distft.train.show_rows import show
from distft.train.special_tokens import new_tokens
from distft.train.tokens import encoder, load_tokenizer

IM = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture
def recipe(tiny: Tiny) -> Callable[..., Recipe]:
    def make(**model: Any) -> Recipe:
        tree = tiny.recipe()
        tree["model"] |= model
        return Recipe.model_validate(tree)

    return make


def copied(tiny: Tiny, folder: Path, **sizes: Any) -> str:
    """The tiny model with other sizes."""
    shutil.copytree(tiny.path / "model", folder)
    if sizes:
        make_model(folder, **sizes)
    return str(folder)


def test_tokenizer(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    changed = recipe(add_tokens=[*IM, "<|go|>", IM[0]], eos_token=IM[1], pad_token=IM[0])
    tokenizer = load_tokenizer(changed)
    assert len(tokenizer) == 322
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (321, 320)
    assert tokenizer("list<|im_end|> dict")["input_ids"] == load_tokenizer(recipe())("list")["input_ids"] + [
        321,
        *load_tokenizer(recipe())(" dict")["input_ids"],
    ]
    assert tokenizer.decode([320, 4, 321], skip_special_tokens=True) == ""
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(again), again.eos_token, again.pad_token) == (322, IM[1], IM[0])


def test_rows(recipe: Callable[..., Recipe], tiny: Tiny, tmp_path: Path) -> None:
    """The planner, which has no transformers, counts what transformers counts."""
    spare = copied(tiny, tmp_path / "spare", vocab_size=384)
    few = copied(tiny, tmp_path / "few", vocab_size=318)
    cases = [
        ({"add_tokens": IM}, 320, (320, 321), 322),
        ({"add_tokens": ["<|go|>"]}, 320, (4,), 320),
        ({"add_tokens": [*IM, "<|go|>"], "name_or_path": spare}, 384, (4, 320, 321), 384),
        ({"add_tokens": IM, "name_or_path": few}, 318, (320, 321), 322),
    ]
    for model, have, ids, rows in cases:
        found = new_tokens(recipe(**model))
        assert (found.ids, found.rows) == (ids, rows)
        assert rows_needed(recipe(**model), have) == rows
        assert set(found.pieces or {}) == {token for token in ids if token > 4}
        assert all(len(pieces) > 2 and max(pieces) < have for pieces in (found.pieces or {}).values())
        shape = read_model_shape(recipe(**model))
        assert shape.vocab_size == rows
        adapters = read_model_shape(recipe()).trainable_parameters
        assert shape.trainable_parameters == adapters + 2 * 64 * len(ids)
        assert shape.parameters == read_model_shape(recipe()).parameters + 2 * 64 * (rows - 320)
    (Path(few) / "tokenizer.json").unlink()  # as large as the embeddings, for all that is known
    assert rows_needed(recipe(add_tokens=IM, name_or_path=few), 318) == 320


def test_what_the_simulation_counts(recipe: Callable[..., Recipe]) -> None:
    from distft.planner import memory
    from distft.simulation.fake_model import build, sizes_of

    changed = recipe(add_tokens=IM)
    counted = sizes_of(changed, build(changed, "autocast", "sdpa"))
    planned = memory.sizes_of(changed, read_model_shape(changed))
    for name in ("parameters", "trained", "frozen_bytes", "largest_trained"):
        assert getattr(counted, name) == getattr(planned, name), name


def test_what_is_said(recipe: Callable[..., Recipe], tiny: Tiny, tmp_path: Path) -> None:
    changed = recipe(add_tokens=["<|go|>", IM[1]])
    notes = encoder("text", Tokenization(load_tokenizer(changed)), changed).notes
    assert notes == ["model.add_tokens: <|go|> is in the vocabulary already, and is not added: its row is trained"]
    with pytest.raises(
        DataError, match=r"model.eos_token: '<\|im_end\|>' is not in the tokenizer's vocabulary"
    ) as error:
        load_tokenizer(recipe(eos_token=IM[1], add_tokens=IM[:1]))
    assert str(error.value).endswith(f"add it: model.add_tokens: {json.dumps(IM)}")
    assert load_tokenizer(recipe(eos_token="<|go|>")).eos_token_id == 4


def test_tokens_of_no_row(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Their rows of the embeddings would stay as they are drawn: it is said, where rows are shown and prepared."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "list<|im_start|> dict"}) + "\n")
    changed = recipe(add_tokens=IM)
    changed = changed.model_copy(
        update={"data": changed.data.model_copy(update={"train": str(rows), "format": "text"})}
    )
    note = "model.add_tokens: no row of data.train has <|im_end|>: nothing is learned of it"
    assert load_prepared(changed).counts["train"]["notes"] == [note]
    assert show(changed, ["train"], None, 10)["train"]["counts"]["notes"] == [note]
    rows.write_text(json.dumps({"text": "".join(IM)}) + "\n")
    assert load_prepared(changed).counts["train"]["notes"] == []


def test_a_tokenizer_larger_than_the_embeddings(recipe: Callable[..., Recipe], tiny: Tiny, tmp_path: Path) -> None:
    """One error, with the row; rows without such a token are trained (Gemma 3's text models have such tokenizers)."""
    from distft.train.data import load_prepared

    folder = copied(tiny, tmp_path / "large")
    load_tokenizer(recipe(add_tokens=["<new>"])).save_pretrained(folder)
    data = tmp_path / "data.jsonl"
    write_jsonl(data, [{"text": "list dict"}, {"text": "list <new> dict"}])

    def prepared(**model: Any) -> Any:
        tree = recipe(name_or_path=folder, **model).model_dump()
        return load_prepared(Recipe.model_validate(tree | {"data": tree["data"] | {"train": str(data)}}))

    with pytest.raises(DataError) as error:
        prepared()
    assert f"{data}:2: the tokenizer's token <new> has id 320, and the model's embeddings have 320 rows" in str(
        error.value
    )
    assert 'model.add_tokens: ["<new>"]' in str(error.value)
    assert 320 in prepared(add_tokens=["<new>"]).train[0]["input_ids"]
    with pytest.raises(DataError, match=r"model.pad_token: the tokenizer's token <new> has id 320"):
        prepared(pad_token="<new>")
    write_jsonl(data, [{"text": "list dict"}])
    assert len(prepared().train) == 1


def test_another_run(recipe: Callable[..., Recipe]) -> None:
    """Prepared data and checkpoints are those of these tokens, in this order."""
    plain, changed, turned = recipe(), recipe(add_tokens=IM), recipe(add_tokens=IM[::-1])
    ended = recipe(eos_token="<|go|>")
    assert len({content_digest(each) for each in (plain, changed, turned, ended)}) == 4
    found = differences(model_identity(plain), model_identity(changed))
    assert found == {"model.add_tokens": f"was None, is {IM}"}
    assert [*differences(model_identity(plain), model_identity(ended))] == ["model.eos_token"]
