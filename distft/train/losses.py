"""Losses of training.loss_type, from logits (b, s, vocabulary) and labels (b, s): sums over the trained tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from distft.data.formats import IGNORE

TOP = 20  # words whose entropy EAFT takes
ENTROPY_SCALE = 3.0  # about log(TOP), the largest entropy of as many words


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the next-token losses (cross-entropy, nats), and the number of trained tokens."""
    losses, targets, _ = _each(logits, labels)
    return losses.sum(), (targets != IGNORE).sum()


def _dft(losses: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The token's probability, of which there is no gradient: Dynamic Fine-Tuning (arXiv 2508.05629; TRL's loss_type:
    dft)."""
    return torch.exp(-losses)


def _eaft(losses: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the likeliest words over 3: Entropy-Adaptive Fine-Tuning (arXiv 2601.02151), as LLaMA-Factory's
    use_eaft_loss with eaft_alpha 1."""
    top = torch.log_softmax(torch.topk(logits, min(TOP, logits.shape[-1])).values, dim=-1)
    return -(top.exp() * top).sum(dim=-1) / ENTROPY_SCALE


WEIGHTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "nll": lambda losses, logits: torch.ones_like(losses),
    "dft": _dft,
    "eaft": _eaft,
}


def mean_loss(loss_type: str) -> Callable[..., torch.Tensor]:
    """Trainer's compute_loss_func: the weighted losses over the number of trained tokens of the whole global batch."""
    weight = WEIGHTS[loss_type]

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        losses, _, predictions = _each(outputs.logits, labels)
        with torch.no_grad():
            weights = weight(losses, predictions)
        return (losses * weights).sum() / num_items_in_batch

    return loss


def _each(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss (0 where it is not trained) and target of each token, and the float32 logits (tokens, vocabulary) for it."""
    targets = F.pad(labels, (0, 1), value=IGNORE)[..., 1:].reshape(-1)
    predictions = logits.reshape(targets.numel(), -1).float()
    return F.cross_entropy(predictions, targets, ignore_index=IGNORE, reduction="none"), targets, predictions
