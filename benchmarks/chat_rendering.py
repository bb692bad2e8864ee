"""Seconds to turn conversations into tokens and masks, beside transformers' apply_chat_template.

    python benchmarks/chat_rendering.py [TEMPLATE…] [--json]

TEMPLATE is the name of a chat template that trl ships; Qwen 3's and Llama 3.1's show what a template without marks
costs. One chat of 400 turns, and 1,000 chats of 6 turns. "marks" is apply_chat_template with the marked version of the
template (one rendering, no checks); "prefixes" renders each beginning of the conversation, as a template without marks
needs elsewhere. CPU seconds of one process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chats import WORDS, assistant, tokenizer_for, trl_templates, user

from distft.train.chat import ChatEncoder

Chat = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("templates", nargs="*", default=["qwen2_5", "qwen3", "llama3_1", "gemma3", "gptoss"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    source = random.Random(0)
    long, short = chat(source, 400), [chat(source, 6) for _ in range(1000)]
    result = {name: measure(name, long, short) for name in arguments.templates}
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{'':12}{'one chat of 400 turns':>36}{'1,000 chats of 6 turns':>36}")
    print(f"{'':12}" + f"{'distft':>12}{'marks':>12}{'prefixes':>12}" * 2)
    for name, (of_long, of_short) in result.items():
        cells = [*of_long.values(), *of_short.values()]
        print(f"{name:12}" + "".join(f"{'' if cell is None else f'{cell:.3f} s':>12}" for cell in cells))


def chat(source: random.Random, turns: int) -> Chat:
    return [
        maker(" ".join(source.choices(WORDS, k=source.randint(8, 80))))
        for _ in range(turns // 2)
        for maker in (user, assistant)
    ]


def measure(name: str, long: Chat, short: list[Chat]) -> list[dict[str, float | None]]:
    templates = trl_templates()
    tokenizer = tokenizer_for(templates[name])
    marked = templates.get(f"{name}_training")
    encoder = ChatEncoder(tokenizer)

    def marks(messages: Chat) -> None:
        tokenizer.apply_chat_template(messages, chat_template=marked, return_assistant_tokens_mask=True)

    def prefixes(messages: Chat) -> None:
        tokenizer.apply_chat_template(messages)
        for index in range(1, len(messages), 2):
            tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True)
            tokenizer.apply_chat_template(messages[: index + 1])

    def ours(messages: Chat) -> None:
        encoder.encode({"messages": messages})

    return [
        {
            "distft": seconds(ours, chats),
            "marks": seconds(marks, chats) if marked else None,
            "prefixes": seconds(prefixes, chats),
        }
        for chats in ([long], short)
    ]


def seconds(work: Callable[[Chat], None], chats: list[Chat]) -> float:
    work(chats[0][:4])
    gc.collect()
    start = time.process_time()
    for messages in chats:
        work(messages)
    return time.process_time() - start


if __name__ == "__main__":
    main()
