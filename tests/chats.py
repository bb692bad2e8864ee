"""Conversations, and tokenizers for any chat template, for the tests and the benchmark of rendering."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

Message = dict[str, Any]

# What is one token in the vocabularies that come with public templates.
_SPECIAL = re.compile(
    r"<\|[^\s|<>{}']{1,40}\|>|<｜[^\s｜<>]{1,40}｜>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_[a-z]+>|<bos>|<eos>|\[\|[a-z]+\|\]"
    r"|\[gMASK\]|<sop>"
)
_PLAIN = re.compile(r"</?(?:think|tool_call|tool_response)>|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]")
WORDS = ["hello", "world", "the", "token", "and", "answer", "is", "that", "assistant", "user", "system", "What", "how"]


def tokenizer_for(template: str, *, special: bool = True, metaspace: bool = False, **names: str) -> Any:
    """A small BPE tokenizer that has the template's control tokens, unless `special` is false.

    Byte-level as Qwen's and Llama 3's, or with `metaspace` as Llama 2's: spaces are ▁, one is put before the text, and
    characters outside the vocabulary are bytes.
    """
    import tokenizers
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer.from_str(_trained(metaspace))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | names
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if special:
        found = set(_SPECIAL.findall(template)) - set(names.values())
        fast.add_tokens([AddedToken(t, special=True, normalized=False) for t in sorted(found)], special_tokens=True)
        fast.add_tokens([AddedToken(t, normalized=False) for t in sorted(set(_PLAIN.findall(template)))])
    fast.chat_template = template
    return fast


@lru_cache
def _trained(metaspace: bool) -> str:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if metaspace:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet = [chr(code) for code in range(33, 127)] + ["▁"]
        texts = ["▁" + "▁".join(WORDS)]
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special, texts = [], [" ".join(WORDS)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts * 3, trainer)
    return str(tokenizer.to_str())


def trl_templates() -> dict[str, str]:
    """The chat templates that the installed trl ships, by their file's stem."""
    import trl.chat_template_utils

    folder = Path(trl.chat_template_utils.__file__).parent / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


def system(content: Any, **keys: Any) -> Message:
    return {"role": "system", "content": content, **keys}


def user(content: Any, **keys: Any) -> Message:
    return {"role": "user", "content": content, **keys}


def assistant(content: Any, **keys: Any) -> Message:
    return {"role": "assistant", "content": content, **keys}


def tool(content: Any, name: str = "add", **keys: Any) -> Message:
    return {"role": "tool", "name": name, "tool_call_id": "call00001", "content": content, **keys}


def call(function: str, **arguments: Any) -> Message:
    return {"type": "function", "id": "call00001", "function": {"name": function, "arguments": arguments}}


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "the first"},
                "b": {"type": "integer", "description": "the second"},
            },
            "required": ["a", "b"],
        },
    },
}

CHATS: dict[str, list[Message]] = {
    "single": [user("What is it?"), assistant("It is that.")],
    "multi": [user("What is it?"), assistant("It is that."), user("And\nnow?"), assistant("Now, this.")],
    "system": [system("Be brief."), user("What is it?"), assistant("It is that.")],
    "space around": [user("  What?\n"), assistant("  It is that.\n\n"), user("x"), assistant("\nok ")],
    "unicode": [user("¿Qué es 東京? 🤔"), assistant("🗼 東京 ist groß.")],
    "same content": [user("ok"), assistant("ok"), user("ok"), assistant("ok")],
    "empty answer": [user("q"), assistant(""), user("r"), assistant("s")],
    "private use": [user("\U000f0f00 1 \U000f0f01"), assistant("a\U000f0f00b")],
    "reasoning": [
        user("What?"),
        assistant("This.", reasoning_content="Let me see."),
        user("x"),
        assistant("ok", reasoning_content="Hm, x."),
    ],
    "think": [
        user("What?"),
        assistant("<think>\nLet me see.\n</think>\n\nThis."),
        user("x"),
        assistant("<think>\nHm, x.\n</think>\n\nok"),
    ],
    "tools": [user("1+2?"), assistant(None, tool_calls=[call("add", a=1, b=2)]), tool("3"), assistant("It is 3.")],
    "tools and text": [
        user("1+2?"),
        assistant("I add.", tool_calls=[call("add", a=1, b=2)]),
        tool("3"),
        assistant("It is 3."),
        user("more"),
        assistant(None, tool_calls=[call("add", a=4, b=5)]),
    ],
    "two answers": [user("q"), assistant("first"), assistant("second")],
    "assistant first": [assistant("hello there"), user("q"), assistant("second")],
}
