"""The chat templates that the installed trl ships: ids as apply_chat_template's, masks as its marked versions'."""

from __future__ import annotations

from typing import Any

import pytest
from chats import ADD, CHATS, Message, assistant, call, system, tokenizer_for, tool, trl_templates, user

from distft.train.chat import ChatEncoder, Document, RowProblem

TEMPLATES = trl_templates()
BASES = [name for name in TEMPLATES if not name.endswith("_training")]
# trl trains a part of the header, which the generation prompt gives, for these.
HEADER = {
    "deepseek_r1_distill": "<｜Assistant｜>",
    "deepseekv3": "<｜Assistant｜>",
    "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant",
    "qwen2_5": "\n",
}


def row_of(chat: str) -> dict[str, Any]:
    return {"messages": CHATS[chat], **({"tools": [ADD]} if chat.startswith("tools") else {})}


def encode(encoder: ChatEncoder, row: dict[str, Any]) -> Document | None:
    try:
        (document,) = encoder.encode(row)
    except RowProblem:
        return None
    return document


def trained_text(document: Document) -> list[str]:
    texts: list[str] = []
    end = -1
    for span in document.spans:
        if span.trained:
            text = document.text[span.start : span.end]
            texts = [*texts[:-1], texts[-1] + text] if span.start == end else [*texts, text]
            end = span.end
    return texts


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_ends(name: str) -> None:
    """Whatever is not refused has apply_chat_template's ids, and every trained turn ends with a token of its own."""
    tokenizer = tokenizer_for(TEMPLATES[name])
    encoder = ChatEncoder(tokenizer)
    habits = encoder.habits()
    encoded = 0
    for chat in CHATS:
        row = row_of(chat)
        document = encode(encoder, row)
        if document is None:
            continue
        encoded += 1
        tools = {"tools": row["tools"]} if "tools" in row else {}
        assert document.ids == tokenizer.apply_chat_template(habits.prepare(row["messages"]), **tools)["input_ids"]
        assert "".join(document.text[span.start : span.end] for span in document.spans) == document.text
    assert encoded >= 8 or name == "glm4moe"  # whose last turn has no end


@pytest.mark.parametrize("name", [name for name in BASES if f"{name}_training" in TEMPLATES])
def test_masks_are_trl_s(name: str) -> None:
    """With trl's marks, and without them by what is learned of the template."""
    tokenizer, marked = tokenizer_for(TEMPLATES[name]), TEMPLATES[f"{name}_training"]
    by_marks, learned = ChatEncoder(tokenizer), ChatEncoder(tokenizer)
    learned.habits().twin = None
    learned.habits(None, [ADD]).twin = None
    compared = 0
    for chat in CHATS:
        row = row_of(chat)
        document, other = encode(by_marks, row), encode(learned, row)
        assert (document is None) == (other is None)
        if document is None or other is None:
            continue
        tools = {"tools": row["tools"]} if "tools" in row else {}
        theirs = tokenizer.apply_chat_template(
            by_marks.habits().prepare(row["messages"]),
            chat_template=marked,
            return_assistant_tokens_mask=True,
            return_dict=True,
            **tools,
        )
        if theirs["input_ids"] != document.ids or document.left_out:
            continue  # trl's version renders another text, or trains an answer without its thought
        compared += 1
        assert document.trained == [bool(flag) for flag in theirs["assistant_masks"]]
        header = HEADER.get(name, "")
        if header and chat == "two answers":
            continue  # they touch, with a header between them
        # <|tool_response> ends a turn of Gemma's: the model produces it, and trl does not train it.
        learned_text = [text.removesuffix("<|tool_response>") for text in trained_text(other)]
        assert [text.removeprefix(header) for text in trained_text(document)] == learned_text
        if not header and "<|tool_response>" not in document.text:
            assert other.trained == document.trained
    assert compared >= (0 if name == "glm4moe" else 2)


@pytest.mark.parametrize("name", [name for name in BASES if f"{name}_training" not in TEMPLATES])
def test_masks_without_a_marked_version(name: str) -> None:
    """What the text gains from the generation prompt on, where each beginning of the conversation begins its text."""
    tokenizer = tokenizer_for(TEMPLATES[name])
    encoder = ChatEncoder(tokenizer)
    compared = 0
    for chat in CHATS:
        row = row_of(chat)
        document, ready = encode(encoder, row), encoder.habits().prepare(row["messages"])
        if document is None or document.left_out:
            continue
        ranges = gains(tokenizer, ready, {"tools": row["tools"]} if "tools" in row else {}, document.text)
        if ranges is None:
            continue
        compared += 1
        assert trained_text(document) == [document.text[start:end] for start, end in ranges]
    assert compared >= 6


def gains(tokenizer: Any, messages: list[Message], fields: Any, text: str) -> list[tuple[int, int]] | None:
    ranges = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            if index == 0:
                return None
            options = {"tokenize": False, **fields}
            before = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True, **options)
            until = tokenizer.apply_chat_template(messages[: index + 1], **options)
            if not (text.startswith(until) and until.startswith(before)):
                return None
            ranges.append((len(before), len(until)))
    return ranges


DEVELOPER = {"role": "developer", "content": "brief"}
CALL_WITH_TEXT = [user("1+2?"), assistant("I add.", tool_calls=[call("add", a=1)]), tool("3"), assistant("3")]
CALL = [user("1+2?"), assistant("", tool_calls=[call("add", a=1)]), tool("3"), assistant("3")]


@pytest.mark.parametrize(
    ("name", "messages", "kind", "words"),
    [
        # Found by checking that every message is in the text: what these public templates leave out.
        ("llama3_1", CALL_WITH_TEXT, "content-lost", "'I add.'"),
        ("gemma4_v5", CALL_WITH_TEXT, "out-of-order", "messages[1].content"),
        ("qwen2_5_vl", CALL, "tool-call-lost", "messages[1]"),
        ("lfm2", CALL, "tool-call-lost", "messages[1]"),
        ("qwen2_5", [DEVELOPER, user("x"), assistant("y")], "role-dropped", "developer"),
        ("deepseek_r1_distill", [user("x"), assistant("<think>hm</think>y")], "reasoning-lost", "_training.jinja"),
        ("glm4moe", [user("x"), assistant("y")], "turn-without-end", "glm4moe_training.jinja"),
        ("gemma", [system("brief"), user("x"), assistant("y")], "template-refuses", "System"),
        ("deepseekv3", [user("x"), assistant("y"), system("from now on"), *CALL], "out-of-order", "[2]"),
        ("gemma4", [user("x"), assistant("y", reasoning_content="hm")], "reasoning-lost", "reasoning_content"),
    ],
)  # fmt: skip
def test_refused(name: str, messages: list[Message], kind: str, words: str) -> None:
    with pytest.raises(RowProblem) as caught:
        ChatEncoder(tokenizer_for(TEMPLATES[name])).encode({"messages": messages})
    assert (caught.value.kind, words in caught.value.text) == (kind, True), caught.value.text
