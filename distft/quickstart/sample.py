"""`python -m distft.quickstart.sample DIR ADAPTER`: what base and fine-tuned model write for a held-out signature."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

MAX_NEW_TOKENS = 40


def main(folder: Path, adapter: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(adapter)  # Any: what its methods return depends on their options
    rows = [json.loads(line) for line in (folder / "data" / "heldout.jsonl").read_text().splitlines()]
    turns = rows[len(rows) // 2]["messages"]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True, return_tensors="pt")

    def answer(model: Any) -> str:
        output = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    before = answer(model)  # before peft, which puts the adapter into this model in place
    after = answer(PeftModel.from_pretrained(model, adapter))
    for label, text in zip(
        ("signature", "written by people", "base model", "fine-tuned"),
        (turns[0]["content"], turns[1]["content"], before, after),
        strict=True,
    ):
        print(f"  {label + ':':<19}{' '.join(text.split())[:100]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
