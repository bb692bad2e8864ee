"""Rows of every format → what they are trained as, or what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distft.config.recipe import Data, Recipe
from distft.data.formats import Example, Formatter
from distft.data.layouts import Layout, find_layout
from distft.data.mixing import drawn, mixed_counts
from distft.data.problems import Problems, RowProblem, Untrained
from distft.data.reading import Tally, check_files, read_examples
from distft.data.sources import find_data
from distft.errors import DataError

Row = dict[str, Any]
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def example(row: Row, chat: bool = True, **data: Any) -> Example:
    """What a row of a file with only this row becomes."""
    settings = Data(train="x", **data)
    layout = find_layout([row], settings.format, settings.columns)
    return Formatter.of(settings, chat).example(row, layout)


def messages(row: Row, **data: Any) -> Any:
    found = example(row, **data)
    assert found.kind == "messages"
    return found.fields["messages"]


def problem(row: Row, **data: Any) -> str:
    with pytest.raises(RowProblem) as caught:
        example(row, **data)
    return f"{caught.value.kind}: {caught.value.text}"


# ---- conversations


def test_messages() -> None:
    assert example({"messages": [USER, ANSWER], "id": 7}) == Example("messages", {"messages": [USER, ANSWER]})
    for name in ("conversations", "conversation", "dialogue", "chat"):
        assert messages({name: [USER, ANSWER]}) == [USER, ANSWER]
    assert messages({"messages": json.dumps([USER, ANSWER])}) == [USER, ANSWER]
    assert messages({"messages": [json.dumps(USER), ANSWER]}) == [USER, ANSWER]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *[(name, "user") for name in ("human", "user", "Human")],
        *[(name, "assistant") for name in ("gpt", "assistant", "chatgpt", "bot", "model", "bing", "bard", "GPT")],
        *[(name, "tool") for name in ("function", "observation", "tool", "function_response", "tool_response")],
        ("system", "system"),
    ],
)
def test_role_names_of_sharegpt(name: str, role: str) -> None:
    row = {"conversations": [{"from": name, "value": "x"}, {"from": "gpt", "value": "a"}]}
    assert messages(row) == [{"role": role, "content": "x"}, ANSWER]
    row = {"conversations": [{"role": name, "content": "x"}, ANSWER]}  # these keys do not have those names
    assert messages(row)[0]["role"] == ("tool" if name == "function" else name)
    assert messages(row, format="sharegpt")[0]["role"] == role


def test_calls_of_sharegpt() -> None:
    call = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": '{"sun": true}'},
            {"from": "gpt", "value": "a", "weight": 1},
        ],
        "system": "S",
        "tools": json.dumps([{"name": "weather", "description": "d", "parameters": {"type": "object"}}]),
    }
    found = example(row)
    assert found.fields["messages"] == [
        {"role": "system", "content": "S"},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [wrapped("weather", {"city": "Rome"})]},
        {"role": "tool", "content": '{"sun": true}'},
        ANSWER,
    ]
    assert found.fields["tools"] == [{"type": "function", "function": json.loads(row["tools"])[0]}]


def wrapped(name: str, arguments: Any) -> Row:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    "calls",
    [
        [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1, "b": null}'}}],
        [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}],
        [{"id": "1", "name": "f", "arguments": {"a": 1, "b": None}}],
        [{"id": "1", "name": "f", "parameters": {"a": 1, "b": None}}],
        [{"id": "1", "function": {"name": "f", "arguments": json.dumps('{"a": 1, "b": null}')}}],
        '[{"id": "1", "function": {"name": "f", "arguments": {"a": 1, "b": null}}}]',
        ['{"id": "1", "function": {"name": "f", "arguments": {"a": 1, "b": null}}}'],
    ],
)
def test_forms_of_tool_calls(calls: Any) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}]}
    assert messages(row)[1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", **wrapped("f", {"a": 1, "b": None})}],
    }


def test_other_forms_of_calls() -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    row = {"messages": [USER, old, {"role": "function", "name": "f", "content": "r"}, ANSWER]}
    assert messages(row)[1:3] == [
        {"role": "assistant", "content": None, "tool_calls": [wrapped("f", {})]},
        {"role": "tool", "content": "r", "name": "f"},
    ]
    for arguments in (None, "", {}):
        call = {"function": {"name": "f", "arguments": arguments}}
        row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        assert messages(row)[1]["tool_calls"] == [wrapped("f", {})]
    for empty in ([], None, "[]", ""):
        assert messages({"messages": [USER, ANSWER | {"tool_calls": empty}]}) == [USER, ANSWER]
    for result in ({"sun": True}, [1, "ü"]):
        row = {"messages": [USER, {"role": "tool", "content": result}, ANSWER]}
        assert messages(row)[1]["content"] == json.dumps(result, ensure_ascii=False)


def test_nulls_that_arrow_added_before_rows_were_json() -> None:
    """Arguments that the tool does not have. (In Arrow's own files the reader removes them.)"""
    parameters = {"type": "object", "properties": {"city": {"type": "string", "default": None}, "unit": {"enum": None}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters | {"x": None}}}
    call = wrapped("weather", {"city": None, "other": None, "a": 1})
    row = {"tools": [tool], "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    found = example(row).fields
    assert found["messages"][1]["tool_calls"] == [wrapped("weather", {"city": None, "a": 1})]
    properties = {"city": {"type": "string", "default": None}, "unit": {}}
    assert found["tools"][0]["function"]["parameters"] == {"type": "object", "properties": properties}
    without = {"messages": row["messages"]}
    assert example(without).fields["messages"][1]["tool_calls"] == [call]


def test_nulls_of_arrow(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    calls = [wrapped("f", {"city": "Rome"}), wrapped("g", {"a": 1, "list": [None, 2]})]
    rows = [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]} for call in calls]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = [one.fields["messages"][1]["tool_calls"] for _, one in read(path)]
    assert found == [[call] for call in calls]


def read(path: Path, **data: Any) -> list[tuple[str, Example]]:
    settings = Data(train=str(path), **data)
    return list(read_examples(find_data(settings)["train"], settings, "data.train"))


def test_what_stands_beside_the_messages() -> None:
    row = {
        "messages": [USER, ANSWER],
        "system_prompt": "S",
        "functions": [{"name": "f"}],
        "documents": '[{"title": "t", "text": "x"}]',
        "chat_template_kwargs": {"custom": 1},
        "enable_thinking": False,
    }
    assert example(row).fields == {
        "messages": [{"role": "system", "content": "S"}, USER, ANSWER],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "documents": [{"title": "t", "text": "x"}],
        "chat_template_kwargs": {"enable_thinking": False, "custom": 1},
    }
    names = ["system_prompt", "functions", "documents", "chat_template_kwargs", "enable_thinking"]
    assert example(row, ignore_fields=names).fields == {"messages": [USER, ANSWER]}
    for empty in (None, "", "[]", []):
        assert example({"messages": [USER, ANSWER], "tools": empty, "system": ""}).fields == {
            "messages": [USER, ANSWER]
        }


def test_a_system_prompt_twice() -> None:
    system = {"role": "system", "content": "S"}
    assert messages({"messages": [system, USER, ANSWER], "system": "S"}) == [system, USER, ANSWER]
    assert problem({"messages": [system, USER, ANSWER], "system": "T"}).startswith(
        "system-twice: system: messages[0] is another system prompt"
    )


def test_contents_of_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"}, "c"]
    found = messages({"messages": [USER, {"role": "assistant", "content": parts}]})
    assert found[1] == {"role": "assistant", "content": "abc", "reasoning_content": "hm"}
    for kind, word in (
        ("image_url", "an image"),
        ("image", "an image"),
        ("input_audio", "an audio"),
        ("video", "a video"),
    ):
        row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": kind}]}, ANSWER]}
        text = problem(row)
        assert text.endswith(f"messages[0].content[1]: got {word}; only text is trained")
    row = {"messages": [USER, {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]}
    assert problem(row).endswith("need text; calls belong into tool_calls, results into messages of role tool")


def test_images_beside_the_messages() -> None:
    row = {"messages": [USER, ANSWER], "images": ["a.png"]}
    assert problem(row).startswith("image: images: got an image; only text is trained.")
    assert messages(row, ignore_fields=["images"]) == [USER, ANSWER]
    assert messages(row | {"images": []}) == [USER, ANSWER]


@pytest.mark.parametrize(
    "flag",
    [
        *({"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"weight": 0.0}),
        *({"loss_weight": 0.0}, {"masked": True}),  # LLaMA-Factory's v1 trainer, torchtune
    ],
)
def test_turns_that_are_not_to_be_trained(flag: Row) -> None:
    row = {"messages": [USER, ANSWER | flag, USER, ANSWER]}
    assert messages(row) == [USER, ANSWER | {"train": False}, USER, ANSWER]
    with pytest.raises(Untrained, match="all assistant turns are marked"):
        example({"messages": [USER | {"weight": 0}, ANSWER | flag]})
    assert messages(row, ignore_fields=list(flag)) == [USER, ANSWER, USER, ANSWER]


def test_flags() -> None:
    assert messages({"messages": [USER | {"weight": 1}, ANSWER | {"weight": 1, "train": True}]}) == [USER, ANSWER]
    assert messages({"messages": [USER | {"masked": False}, ANSWER | {"masked": False}]}) == [USER, ANSWER]
    assert messages({"messages": [USER | {"loss_weight": 1}, ANSWER | {"loss_weight": 1.0}]}) == [USER, ANSWER]
    assert messages({"messages": [USER | {"loss": False}, ANSWER]}) == [USER | {"train": False}, ANSWER]
    text = problem({"messages": [USER, ANSWER | {"weight": 0.5}]})
    assert text == "flag-unsupported: messages[1].weight: got 0.5, need 0 or 1; a turn is trained or not"
    assert problem({"messages": [USER | {"train": True}, ANSWER]}).startswith("flag-ignored: messages[0].train: only")
    row = {"messages": [USER, ANSWER | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}]}
    assert problem(row).startswith("flag-unsupported: messages[1].train_detail")


WHOLE_ROWS: list[Row] = [
    {"messages": [USER, ANSWER]},
    {"instruction": "q", "output": "a"},
    {"prompt": "q", "completion": "a"},
    {"text": "x"},
    {"input_ids": [1, 2]},
]


@pytest.mark.parametrize("row", WHOLE_ROWS, ids=lambda row: next(iter(row)))
def test_flags_of_a_whole_row(row: Row) -> None:
    for flag in ({"weight": 0}, {"train": False}, {"training": "false"}, {"loss": False}, {"masked": True}):
        (name,) = flag
        with pytest.raises(Untrained, match=rf"{name}: got .*, so it is not trained; .*\[{name}\] trains it") as caught:
            example(row | flag)
        assert caught.value.kind == "marked"
        assert example(row | flag, ignore_fields=[name]) == example(row)
    for no_flag in (
        {"weight": 0.5},
        {"weight": 72},
        {"loss": 0.0},
        {"loss": 2.31},
        {"train": "ICE 5"},
        {"train": True},
    ):
        assert example(row | no_flag) == example(row)


@pytest.mark.parametrize("row", WHOLE_ROWS, ids=lambda row: next(iter(row)))
def test_images_beside_rows_of_any_format(row: Row) -> None:
    assert problem(row | {"image": "a.png"}).startswith("image: image: got an image; only text is trained.")
    assert example(row | {"image": "a.png"}, ignore_fields=["image"]) == example(row | {"videos": []}) == example(row)


def test_marks_where_everything_is_trained() -> None:
    row = {"messages": [USER, ANSWER | {"train": False}, USER, ANSWER]}
    assert problem(row, train_on="everything").startswith("flag-ignored: messages[1]: is marked not to be trained")
    assert len(messages(row, train_on="everything", ignore_fields=["train"])) == 4
    assert len(messages({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, train_on="everything")) == 4


def test_kto() -> None:
    wanted = {"prompt": [USER], "completion": [ANSWER], "label": True}
    assert messages(wanted) == [USER, ANSWER]
    for value in (False, "False", "false"):
        for row in (wanted | {"label": value}, {"prompt": "q", "completion": "a", "label": value}):
            with pytest.raises(Untrained, match="label: false marks an answer that is not wanted"):
                example(row)
    assert messages(wanted | {"label": False}, ignore_fields=["label"]) == [USER, ANSWER]
    for row in ({"prompt": "q", "completion": "a"}, {"messages": [USER, ANSWER]}, {"instruction": "q", "output": "a"}):
        assert problem(row | {"label": 0}).startswith("label-unclear: label: got 0; write true")
    assert example({"text": "x", "label": False}).kind == "text"
    assert example({"prompt": "q", "completion": "a", "label": "sport"}).fields == {"prompt": "q", "completion": "a"}


# ---- instructions, prompts, texts, tokens


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a", "text": "a prompt that holds both"},
        {"instruction": "q", "response": "a"},
        {"question": "q", "answer": "a"},
        {"question": "q", "response": "a"},
        {"query": "q", "response": "a"},
        {"prompt": "q", "response": "a"},
        {"input": "q", "output": "a"},
        {"problem": "q", "solution": "a"},
        {"inputs": "q", "targets": "a"},
    ],
)
def test_instructions(row: Row) -> None:
    assert example(row) == Example("messages", {"messages": [USER, ANSWER]})
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nq\n\n### Response:\n"
    )
    assert example(row, chat=False) == Example("prompt_completion", {"prompt": prompt, "completion": "a"})


def test_instructions_with_more() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "S", "history": [["q", "a"]]}
    assert messages(row) == [
        {"role": "system", "content": "S"},
        USER,
        ANSWER,
        {"role": "user", "content": "Add.\n1 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert messages({"instruction": "Sum?", "context": "1 2", "response": "3"})[0]["content"] == "Sum?\n1 2"
    assert problem(row, chat=False).startswith("no-chat-template: history: needs a chat template")
    del row["history"]
    prompt = "S\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert example(row, chat=False).fields == {"prompt": prompt, "completion": "3"}
    del row["system"]
    assert example(row, chat=False).fields["prompt"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n"
    )


def test_instructions_as_stanfords_prompt() -> None:
    """As a text, or as the question of a conversation, whatever the tokenizer has."""
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    expected = example(row, chat=False)
    assert expected.kind == "prompt_completion"
    for chat in (True, False):
        assert example(row, chat, format="alpaca_prompt") == expected
        prompt = {"role": "user", "content": expected.fields["prompt"]}
        answer = {"role": "assistant", "content": "3"}
        assert example(row, chat, format="alpaca_chat").fields["messages"] == [prompt, answer]
    row["system"] = "S"
    system = {"role": "system", "content": "S"}
    assert messages(row, format="alpaca_chat") == [system, prompt, answer]
    assert example(row, format="alpaca_prompt").fields["prompt"].startswith("S\n\n### Instruction:")
    renamed = {"q": "Add.", "a": "3"}
    columns = {"instruction": "q", "output": "a"}
    assert example(renamed, format="alpaca_prompt", columns=columns).fields["completion"] == "3"
    assert problem(row | {"history": [["q", "a"]]}, format="alpaca_prompt").endswith("use data.format: alpaca")


def test_prompt_and_completion() -> None:
    row = {"prompt": "q", "completion": " a"}
    assert example(row) == Example("prompt_completion", row)
    assert example(row, chat=False) == Example("prompt_completion", row)
    earlier = [USER, ANSWER, USER]
    found = messages({"prompt": earlier, "completion": [ANSWER], "tools": [{"name": "f"}]})
    assert found == [USER, ANSWER | {"train": False}, USER, ANSWER]
    assert messages({"prompt": [USER], "completion": "a"}) == [USER, ANSWER]
    assert messages({"prompt": "q", "completion": [ANSWER]}) == [USER, ANSWER]
    assert problem({"prompt": [USER, ANSWER], "completion": [USER]}).startswith("no-assistant-turn: completion")
    assert problem(row | {"system": "S"}).startswith("field-ignored: system: a prompt that is text has no place for it")
    assert example(row | {"system": "S"}, ignore_fields=["system"]).fields == row


def test_text() -> None:
    assert example({"text": "x", "url": "y"}) == Example("text", {"text": "x"})
    assert problem({"text": " "}) == "empty: text: empty"


def test_tokens() -> None:
    ids = [5, 6, 7, 8]
    assert example({"input_ids": ids}) == Example("tokens", {"input_ids": ids, "labels": ids})
    row = {"input_ids": ids, "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]}
    assert example(row).fields == {"input_ids": ids, "labels": row["labels"]}
    padded = {"input_ids": [0, *ids, 0], "labels": [-100, -100, -100, 7, 8, -100], "attention_mask": [0, 1, 1, 1, 1, 0]}
    assert example(padded).fields == {"input_ids": ids, "labels": row["labels"]}
    assert example({"input_ids": "[5, 6]"}).fields["input_ids"] == [5, 6]  # of CSV
    assert example({"input_ids": ids, "completion_mask": [0, 0, 1, 1]}).fields["labels"] == row["labels"]
    for wrong, text in (
        ({"input_ids": []}, "tokens: input_ids: got 0 tokens, need at least 2"),
        ({"input_ids": [1, "2"]}, 'tokens: input_ids: got [1, "2"], need a list of integers'),
        ({"input_ids": [1, -5]}, "tokens: input_ids[1]: got -5, need >= 0"),
        ({"input_ids": [-1, 5]}, "tokens: input_ids[0]: got -1, need >= 0"),
        ({"input_ids": ids, "labels": [5, 6]}, "tokens: labels: got 2 values, need 4 as in input_ids"),
        (
            {"input_ids": ids, "labels": [6, 7, 8, -100]},
            "labels: labels[0]: got 6, need 5, which is the token there, or",
        ),
        ({"input_ids": ids, "labels": [-100] * 4}, "no-trained-token: labels: no token to train on"),
    ):
        assert problem(wrong).startswith(text)


# ---- what is told, what is found out


def test_columns() -> None:
    assert example({"q": "x", "a": "y"}, columns={"prompt": "q", "completion": "a"}).fields == {
        "prompt": "x",
        "completion": "y",
    }
    assert messages({"q": "q", "a": "a", "text": "z"}, columns={"instruction": "q", "output": "a"}) == [USER, ANSWER]
    assert example({"content": "x"}, columns={"text": "content"}) == Example("text", {"text": "x"})
    row = {"turns": [{"speaker": "User", "said": "q"}, {"speaker": "Bot", "said": "a"}], "persona": "S"}
    columns = {"messages": "turns", "role": "speaker", "content": "said", "system": "persona"}
    found = messages(row, columns=columns, roles={"User": "user", "Bot": "assistant"})
    assert found == [{"role": "system", "content": "S"}, USER, ANSWER]
    chosen = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert example(chosen, columns={"completion": "chosen"}).fields == {"prompt": "q", "completion": "a"}
    dialog = {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}
    assert messages(dialog, columns={"messages": "chosen"}) == [USER, ANSWER]
    assert example({"ids": [1, 2]}, columns={"input_ids": "ids"}).kind == "tokens"


def test_roles() -> None:
    row = {"messages": [{"role": "developer", "content": "S"}, USER, {"role": "model", "content": "a"}]}
    found = messages(row, roles={"developer": "system", "model": "assistant"})
    assert found == [{"role": "system", "content": "S"}, USER, ANSWER]
    row = {"conversations": [{"from": "npc", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert messages(row, roles={"npc": "user"}) == [USER, ANSWER]
    row = {"conversations": [{"from": name, "value": "q"} for name in ("npc", "gpt", "boss")]}
    said = problem(row, roles={"boss": "user"})
    assert said.startswith('role-unknown: conversations: got the role "npc", need some of human, user, gpt')
    assert said.endswith("; if that is who they are, set data.roles: {boss: user, npc: user}")
    assert problem(row).endswith("data.roles: {npc: user, boss: user}")


def test_the_most_specific_format_is_taken() -> None:
    """Where rows have the fields of several."""
    chat = {"messages": [USER, ANSWER]}
    for row, expected in (
        (chat | {"prompt": "q", "prompt_id": "7", "chosen": [USER], "rejected": [USER]}, "messages"),
        (chat | {"problem": "q", "solution": "a"}, "messages"),
        ({"prompt": "q", "completion": "a", "text": "t"}, "prompt_completion (prompt, completion)"),
        ({"text": "t", "instruction": "q", "input": "", "output": "a"}, "alpaca (instruction, output, input)"),
        (
            {"question": "q", "answer": "a", "context": "c"},
            "alpaca (instruction: question, output: answer, input: context)",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}]},
            "messages (messages: conversations, role: from, content: value)",
        ),
        ({"input_ids": [1], "text": "t"}, "tokens (input_ids)"),
        ({"text": "t", "conversation": "an id"}, "text (text)"),
    ):
        if row.get("conversation"):
            with pytest.raises(RowProblem):
                example(row)
        else:
            assert str(find_layout([row], "auto", {})).startswith(expected)


def test_rows_may_lack_what_others_have() -> None:
    rows = [{"id": 1, "messages": None}, {"id": 2, "messages": [USER, ANSWER]}]
    assert find_layout(rows, "auto", {}) == find_layout(rows[1:], "auto", {})
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "q", "context": "c", "output": "a"}]
    assert find_layout(rows, "auto", {}).column("input") == "context"


@pytest.mark.parametrize(
    ("row", "data", "expected"),
    [
        ({"chosen": "a", "rejected": "b", "prompt": "q"}, {}, "preference: got preference data (chosen, rejected)"),
        ({"chosen": "a", "rejected": "b", "prompt": "q"}, {}, "data.columns: {completion: chosen}"),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, {}, "data.columns: {messages: chosen}"),
        ({"chosen": "\n\nHuman: q", "rejected": "b"}, {}, "data.columns: {text: chosen}"),
        ({"chosen": "a", "rejected": "b", "prompt": "q"}, {"format": "prompt_completion"}, "preference: "),
        ({"chosen": "a", "rejected": "b"}, {"format": "messages"}, "preference: "),
        ({"a": 1, "b": 2}, {}, "format-unknown: got the fields a, b; need messages, prompt + completion, instruction"),
        ({}, {}, "format-unknown: got the fields (none)"),
        (
            {"prompt": "x", "completion": None},
            {},
            "missing: completion: got nothing, need a string; the row has prompt",
        ),
        (
            {"text": "x"},
            {"format": "messages"},
            "missing: data.format: messages: no row has messages; they have text, which is text; set data.format: text",
        ),
        ({"text": "x"}, {"format": "sharegpt"}, "missing: data.format: sharegpt: no row has messages; they have text"),
        ({"text": "x"}, {"format": "alpaca"}, "missing: data.format: alpaca: no row has instruction or output; they"),
        ({"text": "x"}, {"format": "prompt_completion"}, "no row has prompt or completion; they have text, which is"),
        ({"prompt": "x"}, {"format": "text"}, "missing: data.format: text: no row has text; they have prompt"),
        ({"text": "x"}, {"format": "tokens"}, "missing: data.format: tokens: no row has input_ids; they have text"),
        (
            {"instruction": "x", "output": "y"},
            {"columns": {"prompt": "question", "completion": "answer"}},
            "missing: data.columns: no row has question or answer; they have instruction, output, which is alpaca; "
            "remove data.columns, or name columns that the rows have",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": " "}]},
            {},
            "empty: messages: the assistant's turn is empty; write its answer, mark the turn",
        ),
        (
            {"prompt": [USER, {"role": "assistant", "content": ""}, USER], "completion": [ANSWER | {"content": ""}]},
            {},
            "empty: prompt: assistant turn 2 of 2 is empty",
        ),
        (
            {"messages": [{"speaker": "user", "text": "x"}, {"speaker": "assistant", "text": "y"}]},
            {},
            "role: messages: no message has role; they have speaker, text; set data.columns: {role: speaker, content: "
            "text}",
        ),
        (
            {"messages": [{"role": "user", "body": "x"}, {"role": "assistant", "body": "y"}]},
            {},
            "content: messages: no message has content; they have role, body; set data.columns: {role: role, content: "
            "body}",
        ),
        (
            {"messages": [{"rol": "user", "content": "x"}, ANSWER]},
            {},
            "role: messages[0].role: got nothing, need a string; the message has rol, content; rename rol to role",
        ),
        (
            {"prompt": "q", "completion": "a", "enable_thinking": True},
            {},
            "field-ignored: enable_thinking: a prompt that is text has no place for it",
        ),
        ({"text": 5}, {}, "not-a-string: text: got 5, need a string"),
        ({"prompt": "x", "completion": ""}, {}, "empty: completion: empty"),
        ({"instruction": " ", "output": "a"}, {}, "empty: instruction: empty"),
        ({"question": "q", "answer": 4}, {}, "not-a-string: answer: got 4, need a string"),
        ({"messages": "hello"}, {}, 'not-json: messages: got "hello", need a list of {role, content} or its JSON'),
        ({"messages": "[{'role': 'user'}]"}, {}, "it looks like Python, write it with json.dumps"),
        ({"messages": []}, {}, "no-messages: messages: got [], need a list of {role, content}"),
        ({"messages": [USER]}, {}, "no-assistant-turn: messages: no assistant turn, so nothing to train on"),
        ({"messages": [{"content": "x"}]}, {}, "role: messages[0].role: got nothing, need a string"),
        ({"messages": [USER, {"role": "assistant"}]}, {}, "content: messages[1].content: got nothing, need a string"),
        (
            {"messages": [{"role": "user", "content": 5}, ANSWER]},
            {},
            "content: messages[0].content: got 5, need a string",
        ),
        ({"messages": [7, ANSWER]}, {}, "no-message: messages[0]: got 7, need {role, content}"),
        (
            {"messages": [USER, ANSWER | {"tool_calls": [{"f": 1}]}]},
            {},
            "tool-calls: messages[1].tool_calls[0]: got",
        ),
        (
            {"messages": [USER, ANSWER | {"tool_calls": [wrapped("f", "no")]}]},
            {},
            "not-json: messages[1].tool_calls[0]",
        ),
        (
            {"messages": [USER, ANSWER | {"tool_calls": [wrapped("f", "[1]")]}]},
            {},
            "arguments: messages[1].tool_calls[0]",
        ),
        ({"messages": [USER, ANSWER], "tools": "search()"}, {}, "not-json: tools: got"),
        ({"messages": [USER, ANSWER], "tools": [5]}, {}, "tools: tools[0]: got 5, need {function: {name, …}}"),
        ({"messages": [USER, ANSWER], "documents": ["x"]}, {}, "documents: documents: got"),
        ({"messages": [USER, ANSWER], "system": ["x"]}, {}, "system: system: got"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, {}, "history: history[0]: got"),
        (
            {"messages": [USER, {"role": "assistant", "content": "a\ud83d"}]},
            {},
            "lone-surrogate: messages[1]: got half of",
        ),
        ({"text": "\ud83d"}, {}, "lone-surrogate: text: got half of a surrogate pair"),
    ],
)
def test_rows_that_do_not_fit(row: Row, data: Row, expected: str) -> None:
    assert expected in problem(row, **data)


def test_values_that_are_nested_deeply() -> None:
    deep: Any = "x"
    for _ in range(950):
        deep = [deep]
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [wrapped("f", {"a": deep})]}]}
    assert problem(row) == "nested-too-deeply: nested too deeply"


def test_all_problems_of_a_row_at_once() -> None:
    row = {"messages": [{"role": "user", "content": 5}, {"content": "x"}, ANSWER]}
    expected = "messages[0].content: got 5, need a string; messages[1].role: got nothing, need a string"
    expected += "; the message has content"
    assert problem(row) == f"content: {expected}"


# ---- all rows of a recipe


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def recipe(**data: Any) -> Recipe:
    return Recipe.model_validate({"name": "r", "model": {"name_or_path": "m"}, "data": data})


def test_problems_are_counted_by_kind(tmp_path: Path) -> None:
    good = {"messages": [USER, ANSWER]}
    bad = {"messages": [USER]}
    path = write(tmp_path / "rows.jsonl", [good, bad, bad, '{"messages": [}', good, bad, bad, bad, {"x": 1}])
    with pytest.raises(DataError) as caught:
        check_files(recipe(train=str(path)))
    assert str(caught.value).splitlines() == [
        *[
            f"{path}:{line}: messages: no assistant turn, so nothing to train on; got the role user"
            for line in (2, 3, 6)
        ],
        "... and 2 more of this kind (no-assistant-turn)",
        f"{path}:4: not JSON (Expecting value, column 15)",
        f"{path}:9: messages: got nothing, need a list of {{role, content}}; the row has x",
        "data.train: 7 of 9 rows do not fit (no-assistant-turn 5, not-json 1, missing 1)",
    ]


def test_what_is_read_is_told(tmp_path: Path) -> None:
    kto = {"prompt": "q", "completion": "a", "label": True}
    write(tmp_path / "a.jsonl", [{"text": "x"}] * 3)
    write(tmp_path / "b.jsonl", [kto, kto | {"label": False}])
    write(tmp_path / "c.txt", [])
    assert check_files(recipe(train=str(tmp_path), eval=0.1)) == [
        f"data.train: {tmp_path}: 2 files of split train (no split in the names): a.jsonl, b.jsonl",
        "data.train:   left out, not a data file (.txt): c.txt",
        "data.train: 3 rows of text (text)",
        "data.train: 1 row of prompt_completion (prompt, completion)",
        f"data.train: 1 row left out (label-false); the first: {tmp_path}/b.jsonl:2: label: false marks an answer "
        "that is not wanted; data.ignore_fields: [label] trains it",
    ]
    assert check_files(recipe(train="/nowhere/x.jsonl", eval=["owner/name", "hf://datasets/owner/name"])) == [
        "data.eval: owner/name: a data set of the hub, as nothing of that name is here"
    ]


def test_long_rows_of_text_alone_are_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}])
    with pytest.raises(DataError, match=r"long_rows: split needs rows of text, and data.train has messages"):
        check_files(recipe(train=str(path), long_rows="split"))


def test_a_file_without_rows(tmp_path: Path) -> None:
    empty = write(tmp_path / "a.jsonl", ["", " "])
    with pytest.raises(DataError, match=rf"^data.train: no rows in {empty}$"):
        check_files(recipe(train=str(empty)))
    header = tmp_path / "d.csv"
    header.write_text("text\n")
    with pytest.raises(DataError, match=rf"^data.train: no rows in {empty}, {header}$"):
        check_files(recipe(train=[str(empty), str(header)]))
    some = write(tmp_path / "e.jsonl", [{"text": "x"}])
    assert check_files(recipe(train=[str(empty), str(some), str(header)]))[-1] == (
        f"warning: data.train: no rows in {empty}, {header}"
    )
    nothing = write(tmp_path / "b.jsonl", ["x", "[1]"])
    with pytest.raises(DataError, match="2 of 2 rows do not fit"):
        check_files(recipe(train=str(nothing)))
    strange = write(tmp_path / "c.jsonl", ["x", {"a": 1}])
    with pytest.raises(DataError, match=r"c.jsonl:2: got the fields a; need messages"):
        check_files(recipe(train=str(strange)))


def refusal(path: Path, **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        check_files(recipe(train=str(path), **data))
    return str(caught.value).replace(f"{path.parent}/", "")


def test_names_and_lines_that_are_nearly_right(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "a.jsonl", [{"Question": "q", " answer": "a"}])).endswith(
        '; rename "Question" to question, " answer" to answer'
    )
    path = tmp_path / "b.csv"
    path.write_text("read,file\nlist,dict\n")
    assert refusal(path).endswith("; the first line of a CSV file must name the fields")
    comma = refusal(write(tmp_path / "c.jsonl", ['{"text": "a"},', '{"text": "b"}']))
    assert comma.startswith("c.jsonl:1: not JSON (Extra data, column 14); remove the comma after the object\n")


def test_rows_of_another_format_in_a_file(tmp_path: Path) -> None:
    """The row's fields are named, and a row that is of the file's format."""
    chat, pair, text = {"messages": [USER, ANSWER]}, {"prompt": "q", "completion": "a"}, {"text": "t"}
    said = refusal(write(tmp_path / "a.jsonl", [pair, chat]))
    assert said.startswith(
        "a.jsonl:1: messages: got nothing, need a list of {role, content}; the row has prompt, completion, which is "
        "prompt_completion, and a.jsonl:2 is messages; a file is read in one format"
    )
    assert said.endswith("data.train: 1 of 2 rows do not fit (other-format 1)")
    for rows, line in (
        ([pair, text], "a.jsonl:2: prompt: got nothing, need a string; the row has text, which is text, and a.jsonl:1"),
        ([{"input_ids": [1, 2]}, chat], "a.jsonl:2: input_ids: got nothing, need a list of integers; the row has mess"),
        ([chat, {"chosen": "a", "rejected": "b"}], "a.jsonl:2: got preference data (chosen, rejected)"),
        ([pair, {"prompt": [USER]}], "a.jsonl:2: completion: got nothing, need a list of messages; the row has prompt"),
        (
            [chat, {"id": 7, "messages": None}],
            "a.jsonl:2: messages: got nothing, need a list of {role, content}; the row has id",
        ),
    ):
        assert refusal(write(tmp_path / "a.jsonl", rows)).startswith(line)


def test_names_that_are_mistyped_in_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", [{"dialog": [{"speaker": "user", "says": "q"}, {"speaker": "bot", "says": "a"}]}]
    )
    names = {"messages": "dialog", "role": "speaker", "content": "says"}
    for name, column, said in (
        ("messages", "dialogg", "a.jsonl:1: data.columns: no row has dialogg; they have dialog; did you mean dialog?"),
        ("role", "speakr", "a.jsonl:1: dialog: no message has speakr; they have speaker, says; set data.columns: "),
        ("content", "say", "a.jsonl:1: dialog: no message has say; they have speaker, says; set data.columns: "),
    ):
        changed = {"columns": names | {name: column}, "roles": {"bot": "assistant"}}
        found = refusal(path, **changed)
        assert said in found and (name == "messages" or "{role: speaker, content: says}" in found)
    more = {"columns": names | {"system": "dialogs"}, "roles": {"bot": "assistant"}}  # one that a row need not have
    assert check_files(recipe(train=str(path), **more))[-1] == (
        "warning: data.columns: system: no row of data.train has dialogs; did you mean dialog?"
    )


def test_fields_that_are_not_used_are_told(tmp_path: Path) -> None:
    chat = {"messages": [USER | {"id": 1}, ANSWER | {"learn": False, "weight": 1}], "source": "x", "tools": [], "n": 1}
    assert check_files(recipe(train=str(write(tmp_path / "a.jsonl", [chat])), ignore_fields=["n"]))[-1] == (
        "data.train: not used: source; in messages, unless the chat template prints them: id, learn"
    )
    row = {"question": "q", "answer": "a", "cot": "c", "context": "d", "label": True}
    assert check_files(recipe(train=str(write(tmp_path / "b.jsonl", [row]))))[-1] == "data.train: not used: cot"
    row = {"text": "x", "label": 1, "enable_thinking": True, "assistant_masks": [1], "loss": 0.3, "train": True}
    assert check_files(recipe(train=str(write(tmp_path / "d.jsonl", [row]))))[-1] == (
        "data.train: not used: assistant_masks, enable_thinking, label, loss"
    )
    row = {"q": "q", "a": "a", "prompt": "p"}
    columns = {"prompt": "q", "completion": "a"}
    lines = check_files(recipe(train=str(write(tmp_path / "c.jsonl", [row])), columns=columns))
    assert lines[-1] == "data.train: not used: prompt"


def test_settings_that_change_nothing_are_told(tmp_path: Path) -> None:
    turns = {"roles": {"bot": "assistant"}, "train_on": "last"}
    pairs = write(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a", "tools": None}])
    assert check_files(recipe(train=str(pairs), ignore_fields=["tools", "tolls"], **turns))[-3:] == [
        "warning: data.ignore_fields: no row has tolls; did you mean tools?",
        "warning: data.train_on: changes nothing: no row is trained as a conversation",
        "warning: data.roles: changes nothing: no row is trained as a conversation",
    ]
    rows = [{"messages": [USER, ANSWER | {"name": "x"}]}, {"messages": json.dumps([USER | {"id": 1}, ANSWER])}]
    chats = write(tmp_path / "b.jsonl", rows)
    lines = check_files(recipe(train=str(chats), ignore_fields=["name", "id"], **turns))
    assert not [line for line in lines if line.startswith("warning")]
    both = write(tmp_path / "c.jsonl", [{"prompt": [USER], "completion": [ANSWER]}])
    assert not [line for line in check_files(recipe(train=str(both), **turns)) if line.startswith("warning")]


def test_conversations_without_the_user_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}, *[{"messages": [ANSWER]}] * 2])
    assert check_files(recipe(train=str(path)))[-1] == (
        f"warning: data.train: 2 rows without a user turn; the first: {path}:2"
    )


def test_rows_that_are_in_a_list_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": [{"prompt": "q", "completion": "a"}]}))
    assert refusal(path).startswith(
        "a.json:1: got the fields version, data; data holds the rows: save that list as a file"
    )


def test_roles_that_are_unknown(tmp_path: Path) -> None:
    """Without a turn of the assistant's: whose turns there are, and how the assistant's name is given."""
    rows = [{"messages": [{"role": "customer", "content": "q"}, {"role": "assistant_bot", "content": "a"}]}]
    path = write(tmp_path / "a.jsonl", rows)
    nothing = "a.jsonl:1: messages: no assistant turn, so nothing to train on; got the roles customer, "
    whole = "if that is who they are, set data.roles: {customer: user, assistant_bot: assistant}\n"
    assert refusal(path).startswith(f"{nothing}assistant_bot; {whole}")
    assert "customer: user" in (said := refusal(path, roles={"assistant_bot": "assitant"}))
    assert said.startswith(f"{nothing}assitant; ") and "assistant_bot: assistant" in said
    others = [{"role": role, "content": "x"} for role in ("developer", "human", "bot")]
    said = refusal(write(path, [{"messages": others}]))
    assert "; if that is who they are, set data.roles: {human: user, bot: assistant}\n" in said
    others = [{"role": role, "content": "x"} for role in ("User", "Assistant")]
    assert "set data.roles: {User: user, Assistant: assistant}\n" in refusal(write(path, [{"messages": others}]))
    said = refusal(write(path, [{"messages": [USER]}]))
    assert said.startswith("a.jsonl:1: messages: no assistant turn, so nothing to train on; got the role user\n")
    said = refusal(write(path, [{"prompt": "q", "completion": [{"role": "agent", "content": "a"}]}]))
    assert "completion: no assistant turn" in said and "data.roles: {agent: assistant}" in said


def test_tallies_are_merged_in_order() -> None:
    parts = []
    for start in (0, 4):
        tally = Tally(rows=4)
        for n in range(start, start + 4):
            tally.problems.add("kind", f"row {n}", "text")
        parts.append(tally)
    parts[0].merge(parts[1])
    assert (parts[0].rows, parts[0].problems.counts["kind"]) == (8, 8)
    assert parts[0].problems.first["kind"] == [(f"row {n}", "text") for n in range(3)]
    assert Problems().lines("data.train", 0) == ["data.train: 0 of 0 rows do not fit ()"]


def test_problems_can_be_sent_to_another_process() -> None:
    import pickle

    for kind in (RowProblem, Untrained):
        sent = pickle.loads(pickle.dumps(kind("slug", "text")))
        assert (type(sent), sent.kind, sent.text, str(sent)) == (kind, "slug", "text", "text")
    for value in (Formatter.of(Data(train="x", roles={"a": "b"})), Layout("text", {"text": "x"}), Tally()):
        assert pickle.loads(pickle.dumps(value)) == value


# ---- held out, mixed


def test_held_out_rows_depend_on_their_content_alone() -> None:
    rows = [example({"text": f"row {n}"}) for n in range(2000)]
    held = {row.fields["text"] for row in rows if row.is_held_out(0.1)}
    assert 150 < len(held) < 250
    assert {row.fields["text"] for row in reversed(rows[:1000]) if row.is_held_out(0.1)} == {
        text for text in held if int(text[4:]) < 1000
    }
    assert held < {row.fields["text"] for row in rows if row.is_held_out(0.2)}
    for other in ({"id": 7, "text": "row 1"}, {"text": "row 1", "label": 3}):
        assert example(other).key() == rows[1].key()
    sharegpt = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert example(sharegpt).key() == example({"messages": [USER, ANSWER]}).key()
    assert rows[0].key() == 0xAE3463478A67DEB1  # another digest would hold out other rows


@pytest.mark.parametrize(
    ("counts", "shares", "expected"),
    [
        ([100, 50], [{}, {}], [100, 50]),
        ([100, 50], [{"epochs": 0.5}, {"epochs": 2}], [50, 100]),
        ([100, 50], [{"rows": 30}, {}], [30, 50]),
        ([100, 50], [{"rows": 500}, {}], [500, 50]),
        ([100, 50], [{"weight": 1}, {"weight": 1}], [50, 50]),
        ([100, 50], [{"weight": 3}, {"weight": 1}], [100, 33]),
        ([100, 50], [{"weight": 0.2}, {"weight": 0.1}], [100, 50]),
        ([90, 30, 60], [{"weight": 3}, {"weight": 1}, {"weight": 2}], [90, 30, 60]),
        ([0, 50], [{"rows": 10}, {}], [0, 50]),
    ],
)
def test_shares_of_a_mix(counts: list[int], shares: list[Row], expected: list[int]) -> None:
    sources = Data(train=[{"path": f"p{n}"} | share for n, share in enumerate(shares)]).train
    assert mixed_counts(counts, sources) == expected  # type: ignore[arg-type] (all are groups here)


def test_rows_that_are_drawn() -> None:
    assert drawn(5, 5, 1) == [0, 1, 2, 3, 4]
    assert drawn(5, 10, 1) == sorted([*range(5), *range(5)])
    half = drawn(100, 50, 1)
    assert len(set(half)) == 50 and half == drawn(100, 50, 1) != drawn(100, 50, 2)
    more = drawn(10, 25, 3)
    assert len(more) == 25 and set(map(more.count, range(10))) == {2, 3}
    assert drawn(0, 0, 1) == []
