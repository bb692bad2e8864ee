"""The transformers.Trainer job that benchmarks/checkpoint.py compares with; a script for `distft launch --`.

    checkpoint_peer.py FOLDER TUNING STEPS SAVE_STEPS OUTPUT [CHECKPOINT]

Rank 0 writes OUTPUT/timings.json: seconds for which each save held up training, and from train() to the first step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

folder, tuning, steps, save_steps, output, *checkpoint = sys.argv[1:]
arguments = TrainingArguments(
    output_dir=output,
    per_device_train_batch_size=4,
    max_steps=int(steps),
    save_strategy="steps",
    save_steps=int(save_steps),
    learning_rate=1e-3,
    report_to=[],
    disable_tqdm=True,
)
model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
if tuning == "lora":
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
row = {"input_ids": list(range(5, 69)), "labels": list(range(5, 69))}


class Timed(Trainer):
    stalls: list[float] = []

    def _save_checkpoint(self, *args, **kwargs):
        began = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        self.stalls.append(time.perf_counter() - began)


class FirstStep(TrainerCallback):
    seconds = None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.seconds is None:
            self.seconds = time.perf_counter() - began


first = FirstStep()
trainer = Timed(model=model, args=arguments, train_dataset=[row] * 400, callbacks=[first])
began = time.perf_counter()
trainer.train(resume_from_checkpoint=checkpoint[0] if checkpoint else None)
if trainer.is_world_process_zero():
    Path(output, "timings.json").write_text(json.dumps({"stalls": Timed.stalls, "first_step": first.seconds}))
