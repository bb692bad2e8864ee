"""A plain accelerate training loop: it knows nothing of distft, DeepSpeed or FSDP.

python examples/accelerate_loop.py --model quickstart/base --data quickstart/data/train.jsonl
distft launch --gpus-per-node 2 --set parallelism.strategy=zero2 -- examples/accelerate_loop.py --model ... --data ...
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True, help="a .jsonl file with messages or text")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=4, help="rows per process")
parser.add_argument("--max-length", type=int, default=128)
parser.add_argument("--learning-rate", type=float, default=1e-3)
args = parser.parse_args()

accelerator = Accelerator()
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)


def collate(rows):
    texts = [row["text"] if "text" in row else " ".join(turn["content"] for turn in row["messages"]) for row in rows]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=args.max_length, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


rows = load_dataset("json", data_files=args.data, split="train")
loader = DataLoader(rows, batch_size=args.batch_size, shuffle=True, collate_fn=collate, drop_last=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
accelerator.print(f"model: {type(model).__name__}, {accelerator.num_processes} processes")

model.train()
step = 0
while step < args.steps:
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        accelerator.print(f"step {step} loss {accelerator.reduce(loss.detach(), 'mean').item():.4f}", flush=True)
        if step == args.steps:
            break
accelerator.end_training()
