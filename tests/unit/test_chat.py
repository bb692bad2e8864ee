"""Conversations as tokens: which are trained, against masks written by hand, and what is refused.

⟦ and ⟧ stand around what must be trained. The mask expected is made from the pieces of the text between them, each
tokenized by itself.
"""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
from chats import ADD, CHATS, assistant, call, system, tokenizer_for, tool, user

from distft.train.chat import ChatEncoder, Document, RowProblem, check_template

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3: the thought of the answers after the last question alone, in its own key or in the content.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set content = m.content %}"
    "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].strip() %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}{% for c in m.tool_calls %}"
    "{{ '<tool_call>' + {'name': c.function.name, 'arguments': c.function.arguments} | tojson + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    "{# <|user|> <|assistant|> #}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
    "{% set content = m.content.split('</think>')[-1] %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}"
    "{{ '<|channel|>final<|message|>' + m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}{{ '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
ZEPHYR = (  # the headers are no tokens of Zephyr's vocabulary; eos_token ends every turn
    "{% for m in messages %}{{ '<-' + m.role + '->\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<-assistant->\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}"
    "{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n### Response:\n' }}"
    "{% else %}{{ m.content + eos_token + '\n\n' }}{% endif %}{% endfor %}"
)
JOINED = (  # the end of a turn is written when the next one begins
    "{% for m in messages %}{% if not loop.first %}{{ '<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}{% if messages[-1].role == 'assistant' %}"
    "{{ '<|im_end|>' }}{% endif %}{% if add_generation_prompt %}{{ '<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}"
)
TAILED = CHATML.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")  # as Command A's
BETWEEN = (  # a line break between turns, which no turn ends with
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LOOKS_BACK = CHATML.replace(  # as Command R's tool results, which say which call they answer
    "+ m.content",
    "}}{% for n in messages[: loop.index0] %}{{ '.' if n.role == 'assistant' else '' }}{% endfor %}{{ m.content",
)
INDEXED = CHATML.replace("{% for m in messages %}", "{% for i in range(messages | length) %}{% set m = messages[i] %}")
NAMELESS = CHATML.replace("{% for m in messages %}", "{% for i in range(messages | length) %}").replace(
    "m.", "messages[i]."
)
MARK = "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
IN_MACRO = (
    "{% macro turn(m) %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    + MARK
    + "{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endmacro %}"
    + "{% for m in messages %}{{ turn(m) }}{% endfor %}"
)
IN_SET = (
    "{% set all %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    + MARK
    + "{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}{% endset %}{{ 'Chat:\n' + all }}"
)
IM_END = {"eos_token": "<|im_end|>"}


def encode(tokenizer: Any, messages: list[dict[str, Any]], fields: dict[str, Any] | None = None, **options: Any) -> Any:
    return ChatEncoder(tokenizer, **options).encode({"messages": messages, **(fields or {})})


def check(tokenizer: Any, document: Document, expected: str) -> None:
    """The document's text, ids and mask are those of `expected`."""
    pieces = re.split("[⟦⟧]", expected)
    text = "".join(pieces)
    assert document.text == text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert document.ids == ids
    parts = [tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else [] for piece in pieces]
    assert [token for part in parts for token in part] == ids, "the pieces are tokens by themselves"
    assert document.trained == [number % 2 == 1 for number, part in enumerate(parts) for _ in part]
    assert "".join(text[span.start : span.end] for span in document.spans) == text
    trained = "".join(text[span.start : span.end] for span in document.spans if span.trained)
    assert trained == "".join(pieces[1::2])


def problem(
    tokenizer: Any, messages: list[dict[str, Any]], fields: dict[str, Any] | None = None, **options: Any
) -> Any:
    with pytest.raises(RowProblem) as caught:
        encode(tokenizer, messages, fields, **options)
    return caught.value


MULTI = [user("What"), assistant("is that"), user("how"), assistant("the answer")]
EXPECTED = {
    "chatml": (
        CHATML,
        "<|im_start|>user\nWhat<|im_end|>\n<|im_start|>assistant\n⟦is that<|im_end|>\n⟧"
        "<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n⟦the answer<|im_end|>\n⟧",
    ),
    "thinking": (
        THINKING,
        "<|im_start|>user\nWhat<|im_end|>\n<|im_start|>assistant\n⟦is that<|im_end|>\n⟧"
        "<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nthe answer<|im_end|>\n⟧",
    ),
    "llama3": (
        LLAMA3,
        "<s><|start_header_id|>user<|end_header_id|>\n\nWhat<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦is that<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nhow<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦the answer<|eot_id|>⟧",
    ),
    "mistral": (MISTRAL, "<s>[INST] What [/INST]⟦ is that</s>⟧[INST] how [/INST]⟦ the answer</s>⟧"),
    "gemma": (
        GEMMA,
        "<s><start_of_turn>user\nWhat<end_of_turn>\n<start_of_turn>model\n⟦is that<end_of_turn>\n⟧"
        "<start_of_turn>user\nhow<end_of_turn>\n<start_of_turn>model\n⟦the answer<end_of_turn>\n⟧",
    ),
    "phi3": (
        PHI3,
        "<|user|>\nWhat<|end|>\n<|assistant|>\n⟦is that<|end|>\n⟧"
        "<|user|>\nhow<|end|>\n<|assistant|>\n⟦the answer<|end|>\n</s>⟧",
    ),
    "r1": (
        R1,
        "<s><｜User｜>What<｜Assistant｜>⟦is that<｜end▁of▁sentence｜>⟧"
        "<｜User｜>how<｜Assistant｜>⟦the answer<｜end▁of▁sentence｜>⟧",
    ),
    "harmony": (
        HARMONY,
        "<|start|>user<|message|>What<|end|><|start|>assistant⟦<|channel|>final<|message|>is that<|end|>⟧"
        "<|start|>user<|message|>how<|end|><|start|>assistant⟦<|channel|>final<|message|>the answer<|return|>⟧",
    ),
    "zephyr": (
        ZEPHYR,
        "<-user->\nWhat</s>\n<-assistant->\n⟦is that</s>\n⟧<-user->\nhow</s>\n<-assistant->\n⟦the answer</s>\n⟧",
    ),
    "vicuna": (VICUNA, "<s>USER: What ASSISTANT:⟦ is that</s>⟧USER: how ASSISTANT:⟦ the answer</s>⟧"),
    "alpaca": (
        ALPACA,
        "### Instruction:\nWhat\n\n### Response:\n⟦is that</s>\n\n⟧"
        "### Instruction:\nhow\n\n### Response:\n⟦the answer</s>\n\n⟧",
    ),
    "joined": (
        JOINED,
        "<|im_start|>user\nWhat<|im_end|>\n<|im_start|>assistant\n⟦is that<|im_end|>⟧\n"
        "<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n⟦the answer<|im_end|>⟧",
    ),
    "in a macro": (
        IN_MACRO,
        "<|im_start|>user\nWhat<|im_end|>\n<|im_start|>assistant\n⟦is that<|im_end|>⟧\n"
        "<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n⟦the answer<|im_end|>⟧\n",
    ),
    "in a set block": (
        IN_SET,
        "Chat:\n<|im_start|>user\nWhat<|im_end|>\n<|im_start|>assistant\n⟦is that<|im_end|>⟧\n"
        "<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n⟦the answer<|im_end|>⟧\n",
    ),
}
EXPECTED["a header after all messages"] = (TAILED, EXPECTED["chatml"][1] + "<|im_start|>assistant\n")
EXPECTED["line breaks between turns"] = (BETWEEN, EXPECTED["joined"][1])
EXPECTED["looks back"] = (
    LOOKS_BACK,
    "<|im_start|>user\nWhat<|im_end|>\n<|im_start|>assistant\n⟦is that<|im_end|>\n⟧"
    "<|im_start|>user\n.how<|im_end|>\n<|im_start|>assistant\n⟦.the answer<|im_end|>\n⟧",
)
EXPECTED["indexed"] = (INDEXED, EXPECTED["chatml"][1])
EXPECTED["nameless"] = (NAMELESS, EXPECTED["chatml"][1])


@pytest.mark.parametrize("style", EXPECTED)
def test_masks_written_by_hand(style: str) -> None:
    template, expected = EXPECTED[style]
    tokenizer = tokenizer_for(template, **({} if "eos_token" in template else IM_END))
    (document,) = encode(tokenizer, MULTI)
    check(tokenizer, document, expected)


@pytest.mark.parametrize(("template", "expected"), [EXPECTED["vicuna"], EXPECTED["mistral"], EXPECTED["chatml"]])
def test_sentencepiece(template: str, expected: str) -> None:
    """Tokens that begin with the space before a word, and a space put before the text: each token is trained that has
    a character of the answer."""
    tokenizer = tokenizer_for(template, metaspace=True)
    (document,) = encode(tokenizer, [user("What"), assistant("is é that"), user("how"), assistant("the answer")])
    expected = expected.replace("is that", "is é that")
    assert document.text == re.sub("[⟦⟧]", "", expected)
    assert document.ids == tokenizer(document.text, add_special_tokens=False)["input_ids"]
    for flag, pattern in ((True, "⟦(.*?)⟧"), (False, "(?:^|⟧)(.*?)(?:⟦|$)")):
        tokens = [token for token, trained in zip(document.ids, document.trained, strict=True) if trained is flag]
        text = "".join(re.findall(pattern, expected, re.DOTALL))
        assert "".join(tokenizer.decode(tokens).split()) == "".join(text.split())


def test_slow_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that tells no positions gives the same ids and mask."""
    tokenizer = tokenizer_for(CHATML, **IM_END)
    (expected,) = encode(tokenizer, MULTI)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    assert encode(tokenizer, MULTI) == [expected]


SPACES = [user("  What\n"), assistant("\n is that  "), user("x"), assistant("x")]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (LLAMA3, SPACES, "…\n\n⟦is that<|eot_id|>⟧…\n\n⟦x<|eot_id|>⟧"),
        (CHATML, SPACES, "…assistant\n⟦\n is that  <|im_end|>\n⟧…assistant\n⟦x<|im_end|>\n⟧"),
        (CHATML, [user("x"), assistant("")], "…assistant\n⟦<|im_end|>\n⟧"),
        (CHATML, [assistant("is"), user("x"), assistant("that")], "…⟦is<|im_end|>\n⟧…⟦that<|im_end|>\n⟧"),
        (LLAMA3, [assistant("is"), user("x"), assistant("that")], "…⟦is<|eot_id|>⟧…⟦that<|eot_id|>⟧"),
        (CHATML, [user("x"), assistant("is"), assistant("that")], "…⟦is<|im_end|>\n⟧…⟦that<|im_end|>\n⟧"),
        (CHATML, [system("x"), user("x"), user("y"), assistant("x")], "…⟦x<|im_end|>\n⟧"),
        (CHATML, [user("x"), assistant("x"), user("x")], "…⟦x<|im_end|>\n⟧…"),
        # Control tokens in contents are what apply_chat_template makes of them; whose they are stays known.
        (
            CHATML,
            [user("<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"), assistant("<|im_end|> yes")],
            "…⟦<|im_end|> yes<|im_end|>\n⟧",
        ),
        (
            CHATML,
            [user("\U000f0f00\U000f0f01"), assistant("a\U000f0f00(\U000f0f00b")],
            "…⟦a\U000f0f00(\U000f0f00b<|im_end|>\n⟧",
        ),
        (CHATML, [user("🤔 東京"), assistant("🗼é")], "…⟦🗼é<|im_end|>\n⟧"),
        (
            CHATML,
            [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), assistant("x")],
            "…ab…⟦x<|im_end|>\n⟧",
        ),
        (
            HARMONY,
            [user("x"), assistant("y", thinking="hm")],
            "…⟦<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>y<|return|>⟧",
        ),
    ],
)
def test_contents(template: str, messages: list[dict[str, Any]], expected: str) -> None:
    tokenizer = tokenizer_for(template, **IM_END)
    (document,) = encode(tokenizer, messages)
    trained = [document.text[span.start : span.end] for span in document.spans if span.trained]
    assert trained == re.findall("⟦(.*?)⟧", expected, re.DOTALL)
    assert tokenizer.decode([t for t, flag in zip(document.ids, document.trained, strict=True) if flag]) == "".join(
        trained
    )


def test_named_templates() -> None:
    """A tokenizer may have a template of its own for rows with tools."""
    tokenizer = tokenizer_for(CHATML + TOOLS, **IM_END)
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOLS}
    encoder = ChatEncoder(tokenizer)
    (plain,), (with_tools,) = encoder.encode({"messages": MULTI}), encoder.encode({"messages": CALLS, "tools": [ADD]})
    check(tokenizer, plain, EXPECTED["chatml"][1])
    assert "<tool_call>" in with_tools.text


def test_encoder_can_be_sent_to_another_process() -> None:
    encoder = ChatEncoder(tokenizer_for(CHATML, **IM_END))
    assert pickle.loads(pickle.dumps(encoder)).encode({"messages": MULTI}) == encoder.encode({"messages": MULTI})
    assert pickle.loads(pickle.dumps(encoder)).encode({"messages": MULTI}) == encoder.encode({"messages": MULTI})


def test_spans_name_roles() -> None:
    (document,) = encode(tokenizer_for(LLAMA3), [system("a"), user("b"), assistant("c")])
    spans = [(s.role, document.text[s.start : s.end], s.trained) for s in document.spans]
    assert [(role, trained) for role, _, trained in spans] == [
        ("", False), ("system", False), ("user", False), ("assistant", False), ("assistant", True),
    ]  # fmt: skip
    assert spans[0][1] == "<s>"


# What is trained.


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"weight": 0.0}]
)
def test_turns_marked_not_to_be_trained(flag: dict[str, Any]) -> None:
    tokenizer = tokenizer_for(CHATML, **IM_END)
    (document,) = encode(tokenizer, [user("x"), assistant("no", **flag), user("y"), assistant("yes", weight=1)])
    assert [document.text[s.start : s.end] for s in document.spans if s.trained] == ["yes<|im_end|>\n"]
    assert "weight" not in document.text
    assert problem(tokenizer, [user("x"), assistant("no", **flag)]).kind == "no-trained-token"


def test_flags_that_would_be_ignored() -> None:
    tokenizer = tokenizer_for(CHATML, **IM_END)
    assert problem(tokenizer, [user("x", train=True), assistant("y")]).kind == "flag-ignored"
    assert problem(tokenizer, [user("x"), assistant("y", weight=0.5)]).kind == "flag-unsupported"
    encode(tokenizer, [user("x", weight=1), assistant("y", weight=1)])  # weights are 1 unless said
    encode(tokenizer, [user("x", train=True), assistant("y")], ignore_fields=["train"])


def test_last_turns() -> None:
    """`last` is what follows the last question: a tool call and the answer after its result too."""
    tokenizer = tokenizer_for(TOOLS, **IM_END)
    messages = [
        user("x"),
        assistant("no"),
        user("1+2?"),
        assistant("", tool_calls=[call("add", a=1)]),
        tool("3"),
        assistant("3"),
    ]
    (document,) = encode(tokenizer, messages, train_on="last")
    assert [document.text[s.start : s.end] for s in document.spans if s.trained] == [
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>\n',
        "3<|im_end|>\n",
    ]


@pytest.mark.parametrize("chat", ["reasoning", "think"])
def test_earlier_turns_without_their_thought(chat: str) -> None:
    tokenizer = tokenizer_for(THINKING, **IM_END)
    last = "<think>\nHm, x.\n</think>\n\nok<|im_end|>\n"
    (document,) = encode(tokenizer, CHATS[chat])
    assert [document.text[s.start : s.end] for s in document.spans if s.trained] == [last]
    assert document.left_out == (1,)
    first, second = encode(tokenizer, CHATS[chat], train_on="all_with_reasoning")
    assert (
        second == Document(document.ids, document.trained, document.text, document.spans, (1,)) or second.left_out == ()
    )
    assert [first.text[s.start : s.end] for s in first.spans if s.trained] == [
        "<think>\nLet me see.\n</think>\n\nThis.<|im_end|>\n"
    ]
    assert first.text.count("<|im_start|>") == 2
    assert (second.ids, second.trained) == (document.ids, document.trained)


def test_all_with_reasoning_trains_every_turn_once() -> None:
    tokenizer = tokenizer_for(THINKING, **IM_END)
    think = lambda n: assistant(f"a{n}", reasoning_content=f"r{n}")  # noqa: E731
    messages = [user("q1"), think(1), think(2), user("q2"), assistant("a3"), user("q4"), think(4)]
    documents = encode(tokenizer, messages, train_on="all_with_reasoning")
    trained = [[d.text[s.start : s.end] for s in d.spans if s.trained] for d in documents]
    assert trained == [
        ["<think>\nr1\n</think>\n\na1<|im_end|>\n", "<think>\nr2\n</think>\n\na2<|im_end|>\n"],
        ["a3<|im_end|>\n", "<think>\nr4\n</think>\n\na4<|im_end|>\n"],
    ]


def test_reasoning_of_the_last_answer_is_never_lost() -> None:
    r1 = tokenizer_for(R1)
    lost = problem(r1, [user("x"), assistant("<think>hm</think>y")])
    assert lost.kind == "reasoning-lost"
    assert "messages[1].content (assistant)" in lost.text
    chatml = tokenizer_for(CHATML, **IM_END)
    for key in ("reasoning_content", "reasoning", "thinking"):
        messages = [user("x"), assistant("y", **{key: "hm"})]
        lost = problem(chatml, messages)
        assert (lost.kind, f"messages[1].{key}" in lost.text) == ("reasoning-lost", True)
        assert f"data.ignore_fields: [{key}]" in lost.text
        encode(chatml, messages, ignore_fields=[key])
        (document,) = encode(tokenizer_for(THINKING, **IM_END), messages)
        assert "<think>\nhm\n</think>" in document.text
    assert (
        problem(r1, [user("x"), assistant("<think>hm</think>y")], train_on="all_with_reasoning").kind
        == "reasoning-lost"
    )
    # Not trained, not missed.
    encode(r1, [user("x"), assistant("y"), user("x"), assistant("<think>hm</think>y", weight=0)])


# As Ministral's: a thought is a part of the content, and has no key.
THOUGHT_PARTS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '[THINK]' + part.thinking + '[/THINK]' if part.type == 'thinking' else part.text }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)


def test_thoughts_that_are_parts_of_the_content() -> None:
    fast = tokenizer_for(
        THOUGHT_PARTS.replace(
            "m.content + '[/INST]'", "(m.content if m.content is string else m.content[0].text) + '[/INST]'"
        )
    )
    (document,) = encode(fast, [user("x"), assistant("y", reasoning_content="hm"), user("z"), assistant("w")])
    assert document.text == "<s>[INST]x[/INST][THINK]hm[/THINK]y</s>[INST]z[/INST]w</s>"
    trained = [document.text[span.start : span.end] for span in document.spans if span.trained]
    assert trained == ["[THINK]hm[/THINK]y</s>", "w</s>"]
    # A template that writes parts as JSON prints the word, and no thought.
    as_json = THOUGHT_PARTS.replace("{% for part in m.content %}", "{{ m.content | tojson }}{% for part in [] %}")
    lost = problem(tokenizer_for(as_json), [user("x"), assistant("y", reasoning_content="hm")])
    assert lost.kind == "reasoning-lost"


# What would be lost.

DROPS_TOOL = CHATML.replace(
    "{{ '<|im_start|>' + m.role", "{% if m.role in ['user', 'assistant'] %}{{ '<|im_start|>' + m.role"
).replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
ALL_ELSE_IS_USER = CHATML.replace("m.role +", "('assistant' if m.role == 'assistant' else 'user') +")
SYSTEM_FIRST = (
    "{% for m in messages if m.role == 'system' %}{{ m.content + '\n' }}{% endfor %}"
    + CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
)  # fmt: skip
QUESTIONS_FIRST = SYSTEM_FIRST.replace("'system'", "'user'")
SHORTENS = CHATML.replace("m.content", "m.content[:20]")
NAMES = CHATML.replace("m.role +", "m.role + (' ' + m.name if m.name else '') +")
ENDLESS = CHATML.replace("<|im_end|>", "")
CALLS_AS_TEXT = TOOLS.replace("{{ m.content }}", "{{ m.content or '' }}").replace(
    "{'name': c.function.name, 'arguments': c.function.arguments} | tojson", "c.function.name + c.function.arguments"
)
NAME_OF_CALL_ALONE = TOOLS.replace(", 'arguments': c.function.arguments", "")
CALLS = [user("1+2?"), assistant(None, tool_calls=[call("add", a=1, b='x "y" é\n')]), tool("3"), assistant("3")]
DEVELOPER = {"role": "developer", "content": "brief"}
SYSTEM_AMID = [user("x"), assistant("y"), system("from now on"), user("x"), assistant("z")]
LONG = "a content that is longer than that"


@pytest.mark.parametrize(
    ("template", "messages", "kind", "words"),
    [
        (DROPS_TOOL, [user("x"), assistant("y"), tool("result"), assistant("z")], "role-dropped", "messages[2] (tool)"),
        (DROPS_TOOL, [system("be brief"), user("x"), assistant("y")], "role-dropped", "messages[0] (system)"),
        (DROPS_TOOL, [system("s"), user("x"), assistant("y")], "role-dropped", "messages[0] (system)"),
        (DROPS_TOOL, [DEVELOPER, user("x"), assistant("y")], "role-dropped", "(developer)"),
        (DROPS_TOOL.replace("['user'", "['system', 'user'"), [DEVELOPER, user("x"), assistant("y")],
         "role-dropped", "set data.roles: {developer: system}"),
        (DROPS_TOOL, [{"role": "guest", "content": "x"}, assistant("y")],
         "role-dropped", "if the user says it, set data.roles: {guest: user}"),
        (ALL_ELSE_IS_USER, [user("x"), assistant("y"), tool("result"), assistant("z")], "role-renamed", "'user'"),
        (ALL_ELSE_IS_USER, SYSTEM_AMID, "role-renamed", "messages[2]"),
        (SYSTEM_FIRST, SYSTEM_AMID, "out-of-order", "messages[2]"),
        (QUESTIONS_FIRST, MULTI, "out-of-order", "messages[2]"),
        (GEMMA, [user("x"), {"role": "model", "content": "y"}], "role-unknown", "'assistant'"),
        (CHATML, [user("x"), {"role": "gpt", "content": "y"}], "role-unknown", "data.roles: {gpt: assistant}"),
        (CHATML, [{"role": "human", "content": "x"}, assistant("y")], "role-unknown", "messages[0].role"),
        (GEMMA, [system("be brief"), user("x"), assistant("y")], "template-refuses", "messages[0] (system)"),
        (GEMMA, [user("x"), assistant("y"), assistant("z")], "template-refuses", "messages[2] (assistant)"),
        (SHORTENS, [user(LONG), assistant("y")], "content-lost", "messages[0] (user)"),
        (SHORTENS, [user("x"), assistant(LONG)], "content-lost", "messages[1].content (assistant)"),
        (CHATML, CALLS, "tool-call-lost", "messages[1].tool_calls"),
        (NAME_OF_CALL_ALONE, CALLS, "tool-call-lost", "messages[1].tool_calls"),
        (CHATML, [user("x", name="Ann"), assistant("y")], "field-ignored", "messages[0].name (user)"),
        (ENDLESS, [user("x"), assistant("y")], "turn-without-end", "messages[1]"),
        ("{{ bos_token }}" + CHATML.replace("'<|im_start|>'", "'<s><|im_start|>'"), MULTI, "bos-doubled", "<s>"),
        (CHATML, [user("x")], "no-trained-token", "no assistant message"),
        (CHATML, [user("x"), assistant("\ud83d")], "lone-surrogate", "surrogate pair"),
        (CHATML, [user([{"type": "image"}]), assistant("y")], "content-lost", "messages[0].content[0] (user)"),
    ],
)  # fmt: skip
def test_refused(template: str, messages: list[dict[str, Any]], kind: str, words: str) -> None:
    found = problem(tokenizer_for(template, **({} if template is ENDLESS else IM_END)), messages)
    assert (found.kind, words in found.text) == (kind, True), found.text


def test_not_refused() -> None:
    """What looks like the above and is printed."""
    encode(tokenizer_for(NAMES, **IM_END), [user("x", name="Ann"), assistant("y")])
    encode(tokenizer_for(SYSTEM_FIRST, **IM_END), [system("be brief"), user("x"), assistant("y")])
    encode(tokenizer_for(CHATML, **IM_END), [DEVELOPER, user("x"), assistant("y")])


def test_tool_calls() -> None:
    tokenizer = tokenizer_for(TOOLS, **IM_END)
    (document,) = encode(tokenizer, CALLS, {"tools": [ADD]})
    check(
        tokenizer,
        document,
        f"<|im_start|>system\n{str(ADD).replace(chr(39), chr(34))}\n<|im_end|>\n<|im_start|>user\n1+2?<|im_end|>\n"
        '<|im_start|>assistant\n⟦<tool_call>{"name": "add", "arguments": {"a": 1, "b": "x \\"y\\" é\\n"}}</tool_call>'
        "<|im_end|>\n⟧<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n⟦3<|im_end|>\n⟧",
    )
    # The same calls with arguments as OpenAI's text: the template would write JSON in JSON.
    text = [
        user("x"),
        assistant(None, tool_calls=[{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]),
    ]
    assert problem(tokenizer, text).kind == "arguments-double-encoded"
    # A template that concatenates them takes text alone.
    (document,) = encode(tokenizer_for(CALLS_AS_TEXT, **IM_END), CALLS)
    assert '<tool_call>add{"a": 1, "b": "x \\"y\\" é\\n"}</tool_call>' in document.text


def test_fields_that_the_template_does_not_print() -> None:
    tokenizer = tokenizer_for(CHATML, **IM_END)
    for field, value in (
        ("tools", [ADD]),
        ("documents", [{"title": "t", "text": "a text"}]),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("enable_thinking", False),
    ):
        found = problem(tokenizer, MULTI, {field: value})
        assert (found.kind, field.removeprefix("chat_template_kwargs") in found.text) == ("field-ignored", True)
        encode(tokenizer, MULTI, {field: value}, ignore_fields=[field])
    (document,) = encode(tokenizer_for(THINKING, **IM_END), MULTI, {"enable_thinking": False})
    assert document.text.count("<think>") == 1


# Marks.

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    + MARK
    + "{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def test_marks_are_transformers_own() -> None:
    tokenizer = tokenizer_for(MARKED, **IM_END)
    for name in ("multi", "space around", "unicode", "same content", "empty answer", "assistant first"):
        (document,) = encode(tokenizer, CHATS[name])
        theirs = tokenizer.apply_chat_template(CHATS[name], return_assistant_tokens_mask=True, return_dict=True)
        assert (document.ids, document.trained) == (theirs["input_ids"], [bool(m) for m in theirs["assistant_masks"]])


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        (MARKED.replace(MARK, "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"), "turn-without-end"),
        (MARKED.replace(MARK, "{{ m.content }}{% generation %}<|im_end|>{% endgeneration %}"), "mask-misaligned"),
        (MARKED.replace("== 'assistant'", "== 'user'"), "mask-misaligned"),
        ("{% generation %}" + CHATML + "{% endgeneration %}", "mask-misaligned"),
    ],
)  # fmt: skip
def test_wrong_marks(template: str, kind: str) -> None:
    assert problem(tokenizer_for(template, **IM_END), MULTI).kind == kind


# The template itself.


def test_template_that_is_right() -> None:
    assert check_template(ChatEncoder(tokenizer_for(CHATML, **IM_END))) == ([], [])


def test_control_tokens_that_are_split() -> None:
    problems, _ = check_template(ChatEncoder(tokenizer_for(CHATML, special=False)))
    assert [found.kind for found in problems] == ["control-tokens-split"]
    assert 'model.add_tokens: ["<|im_start|>", "<|im_end|>"]' in problems[0].text
    assert 'model.eos_token: "<|im_end|>"' in problems[0].text
    # Headers in pieces are how Zephyr was trained; its turns end with eos_token.
    headers = CHATML.replace("'<|im_end|>\n'", "eos_token")
    problems, notes = check_template(ChatEncoder(tokenizer_for(headers, special=False)))
    assert (problems, ["<|im_start|>" in note for note in notes]) == ([], [True])


def test_template_without_end_of_turn() -> None:
    problems, _ = check_template(ChatEncoder(tokenizer_for(ENDLESS)))
    assert [found.kind for found in problems] == ["turn-without-end"]
    tokenizer = tokenizer_for(CHATML)
    tokenizer.chat_template = None
    assert [found.kind for found in check_template(ChatEncoder(tokenizer))[0]] == ["no-template"]
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    ((problem,), _) = check_template(ChatEncoder(tokenizer))
    assert problem.kind == "no-template" and "chat templates are rag, tool_use, and none is the default" in problem.text


def test_options_that_the_template_does_not_read() -> None:
    encoder = ChatEncoder(tokenizer_for(CHATML, **IM_END), options={"enable_thinking": False})
    assert [found.kind for found in check_template(encoder)[0]] == ["field-ignored"]
    encoder = ChatEncoder(tokenizer_for(THINKING, **IM_END), options={"enable_thinking": False})
    assert check_template(encoder) == ([], [])


def test_date_in_the_template() -> None:
    dated = "{{ strftime_now('%Y-%m-%d') + '\n' }}" + CHATML
    problems, notes = check_template(ChatEncoder(tokenizer_for(dated, **IM_END)))
    assert (problems, ["date" in note for note in notes]) == ([], [True])


def test_eos_that_is_never_trained() -> None:
    problems, notes = check_template(ChatEncoder(tokenizer_for(CHATML)))
    assert (problems, ["model.eos_token" in note for note in notes]) == ([], [True])


def test_bos_is_not_added_again() -> None:
    """The tokenizer puts <s> before every text, and the template writes one."""
    from tokenizers import processors

    tokenizer = tokenizer_for(LLAMA3)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    assert tokenizer("x")["input_ids"][0] == bos
    (document,) = encode(tokenizer, MULTI)
    assert document.ids.count(bos) == 1
