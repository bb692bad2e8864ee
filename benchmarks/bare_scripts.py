"""What train_overhead.py compares with: `bare_scripts.py FOLDER STEPS sft|loop` prints [time, tokens] of every step."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH, MAX_LENGTH, LEARNING_RATE = 8, 128, 0.001
LORA = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")


def sft(folder: Path, steps: int) -> list[tuple[float, int]]:
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    history = []

    class Clock(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                history.append((time.time(), int(logs["num_tokens"])))

    config = SFTConfig(
        output_dir=str(folder / "sft"),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        max_length=MAX_LENGTH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    rows = load_dataset("json", data_files=str(folder / "data.jsonl"), split="train", cache_dir=str(folder / "hf"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=LORA, callbacks=[Clock()]
    )
    trainer.train()
    return history


def loop(folder: Path, steps: int) -> list[tuple[float, int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), LORA)
    texts = [json.loads(line)["text"] + "<eos>" for line in (folder / "data.jsonl").read_text().splitlines()]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(42)).tolist()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE, fused=True)
    history, tokens = [], 0
    for step in range(steps):
        chosen = [texts[order[(step * BATCH + i) % len(order)]] for i in range(BATCH)]
        batch = tokenizer(chosen, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(batch["attention_mask"].sum())
        loss.item()
        history.append((time.time(), tokens))
    return history


if __name__ == "__main__":
    print(json.dumps({"sft": sft, "loop": loop}[sys.argv[3]](Path(sys.argv[1]), int(sys.argv[2]))))
