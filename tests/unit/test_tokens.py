"""Texts and prompts with completions as tokens: the pieces are written by hand, for a byte-level tokenizer and for one
that puts a space before every text."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from chats import assistant, system, tokenizer_for, trl_templates, user
from tiny import CHAT_TEMPLATE, Tiny, write_jsonl
from tokenizers.processors import TemplateProcessing

from distft.config.loading import load_recipe
from distft.config.recipe import Recipe
from distft.errors import DataError
from distft.train.chat import ChatEncoder, Tokenization
from distft.train.data import load_prepared
from distft.train.tokens import _chat_template, encoder
from distft.views.summary import data_lines

RECIPE = Recipe.model_validate({"name": "x", "model": {"name_or_path": "x"}, "data": {"train": "x"}})


def tokenizer(metaspace: bool, ends: str = "<s> $A") -> Any:
    """Adds a BOS before texts, as Llama's do; with `ends` "<s> $A </s>" an EOS after them too."""
    fast = tokenizer_for("", metaspace=metaspace)
    special = [(token, fast.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    fast.backend_tokenizer.post_processor = TemplateProcessing(single=ends, special_tokens=special)
    return fast


def pieces(fast: Any, row: dict[str, str]) -> tuple[list[str], list[str]]:
    """The tokens of a row, and those that are trained."""
    (document,) = encoder("text" if "text" in row else "prompt_completion", Tokenization(fast), RECIPE).encode(row)
    tokens = fast.convert_ids_to_tokens(document.ids)
    return tokens, [token for token, trained in zip(tokens, document.trained, strict=True) if trained]


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


@pytest.mark.parametrize("ends", ["<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(
    ("metaspace", "row", "expected", "trained"),
    [
        (False, pair("hello(", "x)"), "<s> hello ( x ) </s>", "x ) </s>"),
        (True, pair("hello(", "x)"), "<s> ▁ hell o ( x ) </s>", "x ) </s>"),
        # Separately, as at inference; where a tokenizer marks words by the space before them, the space is the word's.
        (False, pair("hello ", "token"), "<s> hello Ġ t oken </s>", "t oken </s>"),
        (True, pair("hello ", "token"), "<s> ▁ hell o ▁token </s>", "▁token </s>"),
        (False, pair("hello", " token"), "<s> hello Ġtoken </s>", "Ġtoken </s>"),
        (True, pair("hello", " token"), "<s> ▁ hell o ▁token </s>", "▁token </s>"),
        # Already there: not doubled.
        (False, pair("<s>hello(", "x)</s>"), "<s> hello ( x ) </s>", "x ) </s>"),
        (True, pair("<s>hello(", "x)</s>"), "<s> ▁ hell o ( x ) </s>", "x ) </s>"),
        (False, {"text": "<s>hello</s>"}, "<s> hello </s>", "<s> hello </s>"),
        (True, {"text": "<s>hello</s>"}, "<s> ▁ hell o </s>", "<s> ▁ hell o </s>"),
        (False, {"text": "hello"}, "<s> hello </s>", "<s> hello </s>"),
        (True, {"text": "hello"}, "<s> ▁ hell o </s>", "<s> ▁ hell o </s>"),
    ],
)
def test_tokens(metaspace: bool, ends: str, row: dict[str, str], expected: str, trained: str) -> None:
    assert pieces(tokenizer(metaspace, ends), row) == (expected.split(), trained.split())


def test_everything_is_trained() -> None:
    """Prompts and questions too; a conversation is rendered as it is otherwise."""
    recipe = RECIPE.model_copy(update={"data": RECIPE.data.model_copy(update={"train_on": "everything"})})
    fast = tokenizer(False)
    (document,) = encoder("prompt_completion", Tokenization(fast), recipe).encode(pair("hello(", "x)"))
    assert fast.convert_ids_to_tokens(document.ids) == ["<s>", "hello", "(", "x", ")", "</s>"]
    assert document.trained == [True] * 6
    assert [span.trained for span in document.spans] == [True, True]
    chat = tokenizer_for(CHAT_TEMPLATE)
    row = {"messages": [user("hello"), assistant("token"), user("x"), assistant("hello")]}
    (usual,) = encoder("messages", Tokenization(chat), RECIPE).encode(row)
    (whole,) = encoder("messages", Tokenization(chat), recipe).encode(row)
    assert whole.ids == usual.ids
    assert not all(usual.trained)
    assert whole.trained == [True] * len(whole.ids)


def test_thoughts_that_are_missing_where_everything_is_trained(tiny: Tiny, tmp_path: Any) -> None:
    template = (
        "{% for m in messages %}{% if m.reasoning_content and loop.last %}{{ m.reasoning_content }}{% endif %}"
        "{{ m.content + eos_token }}{% endfor %}"
    )
    (tmp_path / "thinks.jinja").write_text(template)
    turns = [user("read"), assistant("file", reasoning_content="node")]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns * 2}])
    changes = {"data__train": "rows.jsonl", "data__chat_template": "thinks.jinja", "data__train_on": "everything"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(**changes)))
    counts = load_prepared(load_recipe(tmp_path / "recipe.yaml")).counts
    assert (
        "warning: the chat template removes the thought of 1 earlier answer of train: trained without it; "
        "data.train_on: all_with_reasoning trains answer and thought"
    ) in data_lines(counts)


def test_control_tokens_within_messages_are_counted(tiny: Tiny, tmp_path: Any) -> None:
    rows = [
        [user("read"), assistant("file<eos>")],
        [user("<|go|>"), assistant("<think>a</think>")],
        [user("a"), assistant("b")],
    ]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": row} for row in rows])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(data__train="rows.jsonl")))
    counts = load_prepared(load_recipe(tmp_path / "recipe.yaml")).counts
    assert (
        "warning: data.train: 2 rows with the control token <eos> within a message, which the model reads as one; "
        f"the first: {tmp_path}/rows.jsonl:1"
    ) in data_lines(counts)


@pytest.mark.parametrize("row", [{"text": "list"}, {"prompt": "list", "completion": "file"}], ids=["text", "prompt"])
def test_a_tokenizer_without_an_end_is_refused(tiny: Tiny, tmp_path: Any, row: dict[str, str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny.path / "model", model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    write_jsonl(tmp_path / "rows.jsonl", [row])
    changes = {"data__train": "rows.jsonl", "model__name_or_path": str(model)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(**changes)))
    with pytest.raises(DataError, match=r"model\.eos_token: the tokenizer of .* has none"):
        load_prepared(load_recipe(tmp_path / "recipe.yaml"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(**changes, model__eos_token="<eos>")))
    assert load_prepared(load_recipe(tmp_path / "recipe.yaml")).counts["train"]["documents"] == 1


def test_rows_that_would_train_something_else_are_counted_by_kind(tiny: Tiny, tmp_path: Any) -> None:
    good, dropped = [user("read"), assistant("file")], [user("read"), {"role": "tool", "content": "node"}]
    rows = [good, *[[*dropped, assistant("path")]] * 5, [user("a")], good]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": row} for row in rows])
    (tmp_path / "no_tools.jinja").write_text(
        "{% for m in messages if m.role != 'tool' %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
    )
    files = {"data__train": "rows.jsonl", "data__chat_template": "no_tools.jinja"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(**files)))
    with pytest.raises(DataError) as raised:
        load_prepared(load_recipe(tmp_path / "recipe.yaml"))
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == [f"{tmp_path}/rows.jsonl:{n}" for n in (2, 3, 4)]
    assert "messages[1] (tool): the chat template leaves out messages of this role" in lines[0]
    assert lines[3] == "... and 2 more of this kind (role-dropped)"
    assert (
        lines[4] == f"{tmp_path}/rows.jsonl:7: messages: no assistant turn, so nothing to train on; got the role user"
    )
    assert lines[5:] == ["data.train: 6 of 8 rows do not fit (role-dropped 5, no-assistant-turn 1)"]


def test_a_template_that_ends_no_turn_is_refused(tiny: Tiny, tmp_path: Any) -> None:
    (tmp_path / "endless.jinja").write_text("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}")
    files = {"data__chat_template": "endless.jinja"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(**files)))
    with pytest.raises(DataError, match=r"/endless.jinja: "):
        load_prepared(load_recipe(tmp_path / "recipe.yaml"))


def test_what_truncation_takes_away_is_counted(tiny: Tiny, tmp_path: Any) -> None:
    long = [system("list " * 80), user("read"), assistant("file")]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": row} for row in (long, long[1:])])
    changes = {"data__train": "rows.jsonl", "data__long_rows": "truncate"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(**changes)))
    counts = load_prepared(load_recipe(tmp_path / "recipe.yaml")).counts
    assert (counts["train"]["documents"], counts["train"]["cut_answers"]) == (1, 1)
    expected = f"warning: 1 of them left out, with all that is trained cut off; the first: {tmp_path}/rows.jsonl:1"
    assert expected in data_lines(counts)


def test_split_is_for_text_alone_whatever_auto_took(tiny: Tiny, tmp_path: Any) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(data__long_rows="split")))
    with pytest.raises(DataError, match=r"data\.long_rows: split needs rows of text, and got messages"):
        load_prepared(load_recipe(tmp_path / "recipe.yaml"))


def test_what_the_recipe_trains_and_ignores(tiny: Tiny, tmp_path: Any) -> None:
    """Each is part of the cache's key: the same folder is prepared anew."""
    row = {"messages": [user("a"), assistant("read"), user("b"), assistant("file")], "documents": [{"text": "node"}]}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    trained = {}
    for train_on in ("all", "last"):
        changes = {"data__train": "rows.jsonl", "data__train_on": train_on, "data__ignore_fields": ["documents"]}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(**changes)))
        trained[train_on] = load_prepared(load_recipe(tmp_path / "recipe.yaml")).counts["train"]["trained_tokens"]
    assert trained["all"] > trained["last"] > 0
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(data__train="rows.jsonl")))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: documents: .* data\.ignore_fields: \[documents\]"):
        load_prepared(load_recipe(tmp_path / "recipe.yaml"))


def test_a_template_by_its_name() -> None:
    fast = tokenizer_for("")
    fast.chat_template = {"default": "a", "rag": "b"}
    assert _chat_template(fast, "rag") == "b"
    with pytest.raises(DataError, match="got 'tools', and the tokenizer's chat templates are default, rag"):
        _chat_template(fast, "tools")


@pytest.mark.parametrize("special", [False, True])
def test_trained_tokens_are_those_with_a_character_in_a_range(tiny: Tiny, special: bool) -> None:
    """Against the offsets of all tokens, for characters that are several tokens and edges within a token."""
    from transformers import AutoTokenizer

    tokenizer, source = AutoTokenizer.from_pretrained(tiny.path / "model"), random.Random(0)
    slow, quick = Tokenization(tokenizer), quickened(tokenizer)
    for _ in range(200):
        text = "".join(source.choice(["read", " file", "🦜", "é", "<eos>", "\n", "  ", "ﬁ"]) for _ in range(12))
        edges = sorted(source.sample(range(len(text) + 1), 4))
        ranges = [(edges[0], edges[1]), (edges[2], edges[3])]
        found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        wanted = [
            any(start < right and end > left for left, right in ranges) and end > start
            for start, end in found["offset_mapping"]
        ]
        for tokenization in (slow, quick):
            assert tokenization.marked(text, ranges, special) == (found["input_ids"], wanted), (text, ranges)


def quickened(fast: Any) -> Tokenization:
    """fastokens' tokens, and none of them compared."""
    tokenization = Tokenization(fast)
    tokenization.speed_up()
    assert tokenization._quick is not None
    tokenization._is_compared = lambda: False
    return tokenization


@pytest.mark.parametrize("metaspace", [False, True])
def test_quick_tokens_are_the_same(metaspace: bool) -> None:
    """For texts of many scripts, control tokens and white space, with BOS; on a published template's conversations."""
    fast, source = tokenizer(metaspace, "<s> $A </s>"), random.Random(0)
    fast.add_tokens(["<|im_end|>"], special_tokens=True)
    blocks = [(32, 127), (32, 127), (9, 14), (0xA0, 0x250), (0x300, 0x370), (0x600, 0x700), (0x900, 0xA00)]
    blocks += [(0x2000, 0x2070), (0x3040, 0x3100), (0x4E00, 0x5000), (0xAC00, 0xAD00), (0x1F300, 0x1F700)]
    quick = quickened(fast)
    for _ in range(300):
        letters = (chr(source.randrange(*source.choice(blocks))) for _ in range(40))
        text = "".join(letters) + source.choice(["", "<|im_end|>", " \n\n  x", "</s>"])
        for special in (True, False):
            assert quick.ids(text, special) == fast(text, add_special_tokens=special)["input_ids"], text
    chat = tokenizer_for(trl_templates()["qwen2_5"], metaspace=metaspace)
    row = {
        "messages": [system("Be short"), *(turn for n in range(9) for turn in (user(f"How {n}?"), assistant("é 🦜")))]
    }
    (slow,), (found,) = (
        ChatEncoder(chat, tokenization=one).encode(row) for one in (Tokenization(chat), quickened(chat))
    )
    assert found == slow and any(found.trained)


def test_tokens_that_differ(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fastokens that is wrong about one word is found out: all rows are tokenized without it, and it is said."""
    import fastokens

    class Wrong:
        def __init__(self, text: str):
            self.true = made(text)

        def encode(self, text: str, special: bool) -> Any:
            return self.true.encode(text.replace("mesh", "path"), special)

    made = fastokens.Tokenizer.from_json_str
    rows = [{"prompt": "read ", "completion": f"{n} mesh" if n == 25_000 else f"{n}"} for n in range(30_000)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = tiny.recipe(data__train=str(tmp_path / "rows.jsonl"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    right = load_prepared(load_recipe(tmp_path / "recipe.yaml"))
    assert right.counts["train"]["notes"] == []
    monkeypatch.setattr(fastokens.Tokenizer, "from_json_str", Wrong)
    monkeypatch.setattr("distft.train.chat.tokenize.COMPARED", 1)
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "own"))
    found = load_prepared(load_recipe(tmp_path / "recipe.yaml"))
    assert found.train.data.table.equals(right.train.data.table)
    assert found.counts["train"]["notes"] == [
        "fastokens and tokenizers give different tokens for '25000 mesh'; the slower tokenizers is used"
    ]
