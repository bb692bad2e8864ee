"""An independent reference: plain torch in float64, a document at a time; no padding, packing, Trainer, accelerate."""

from __future__ import annotations

import math

import torch
from datasets import Dataset
from peft import LoraConfig, OFTConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM, set_seed


def loss_of(logits: torch.Tensor, labels: torch.Tensor, loss_type: str) -> torch.Tensor:
    """The sum over tokens, written out from the definitions: probabilities, and the entropy of the 20 largest."""
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    of_label = probabilities[torch.arange(len(labels)), labels]
    if loss_type == "dft":
        return -(of_label.detach() * of_label.log()).sum()
    if loss_type == "eaft":
        largest = probabilities.detach().sort(-1, descending=True).values[:, :20]
        largest = largest / largest.sum(-1, keepdim=True)
        return (largest * largest.log()).sum(-1) @ of_label.log() / 3
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """What Muon's five iterations do to the singular values, in float64 (https://kellerjordan.github.io/posts/muon)."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (u * values @ v).float()


def train(
    rows: Dataset,
    order: list[int],
    model_dir: str,
    *,
    batch: int,
    steps: int,
    lora: dict | None,
    lr: float,
    weight_decay: float,
    warmup: int,
    max_grad_norm: float = 1.0,
    loraplus: dict | None = None,
    loss_type: str = "nll",
    muon: bool = False,
    seed: int = 42,
) -> list[dict[str, float]]:
    """What metrics.jsonl has of every step. The loss is the mean over the trained tokens of `batch` rows."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if lora is not None:
        set_seed(seed)
        settings = {name: value for name, value in lora.items() if name != "oft"}
        if "oft" in lora:
            settings = {"oft_block_size": 0, **settings}
        model = get_peft_model(model, (OFTConfig if "oft" in lora else LoraConfig)(task_type="CAUSAL_LM", **settings))
    model.double()  # so that rounding is the run's alone
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name] if muon else []
    momentum = [torch.zeros_like(p) for p in hidden]
    decay = [p for p in trained if p.ndim > 1 and not any(p is other for other in hidden)]
    groups = [{"params": decay}, {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    if loraplus:
        given = {"lr": lr, "loraplus_weight_decay": weight_decay, "weight_decay": weight_decay, **loraplus}
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **given)
    rates = [group["lr"] for group in optimizer.param_groups]
    history: list[dict[str, float]] = []
    seen = 0
    for step in range(steps):
        scale = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        if step < warmup:
            scale = (step + 1) / (warmup + 1)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        documents = []
        for index in order[step * batch : (step + 1) * batch]:
            row, start = rows[index], 0
            for length in row["seq_lengths"]:
                ids, labels = row["input_ids"][start : start + length], row["labels"][start : start + length]
                documents.append((torch.tensor([ids]), torch.tensor(labels[1:])))
                start += length
        total, tokens = 0.0, sum(int((labels != -100).sum()) for _, labels in documents)
        for ids, labels in documents:
            logits = model(input_ids=ids).logits[0, :-1]
            loss = loss_of(logits[labels != -100], labels[labels != -100], loss_type) / tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, max_grad_norm).item()
        optimizer.step()
        for parameter, buffer in zip(hidden, momentum, strict=True):
            buffer.mul_(0.95).add_(parameter.grad)
            update = orthogonal(parameter.grad + 0.95 * buffer)
            parameter.data.mul_(1 - lr * scale * weight_decay)
            parameter.data.sub_(lr * scale * 0.2 * max(parameter.shape) ** 0.5 * update)
        model.zero_grad()
        seen += sum(ids.numel() for ids, _ in documents)
        history.append({"loss": total, "grad_norm": norm, "learning_rate": lr * scale, "tokens": seen})
    return history
