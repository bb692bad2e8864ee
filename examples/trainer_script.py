"""A plain transformers.Trainer script: it knows nothing of distft, DeepSpeed or FSDP.

python examples/trainer_script.py --model quickstart/base --data quickstart/data/train.jsonl --output out
distft launch --gpus-per-node 2 --set parallelism.strategy=fsdp -- examples/trainer_script.py --model ... --data ...
"""

import argparse

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True, help="a .jsonl file with messages or text")
parser.add_argument("--output", required=True)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=4, help="rows per process")
parser.add_argument("--max-length", type=int, default=128)
parser.add_argument("--learning-rate", type=float, default=1e-3)
args = parser.parse_args()

training_args = TrainingArguments(
    output_dir=args.output,
    per_device_train_batch_size=args.batch_size,
    max_steps=args.steps,
    learning_rate=args.learning_rate,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    seed=0,
)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)


def tokenize(row):
    text = row["text"] if row.get("text") else " ".join(turn["content"] for turn in row["messages"])
    return {"input_ids": tokenizer(text, truncation=True, max_length=args.max_length)["input_ids"]}


class PrintModel(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            print(f"model: {type(trainer.model_wrapped).__name__}, {args.world_size} processes", flush=True)


rows = load_dataset("json", data_files=args.data, split="train")
rows = rows.map(tokenize, remove_columns=rows.column_names)
trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[PrintModel()],
)
trainer.train()
