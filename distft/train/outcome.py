"""Whether a training has a result: its loss is a number, and its weights are other ones than before.

Every function and method but LossGuard's is collective, and answers or raises the same on all ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from distft.errors import RunError
from distft.train.ranks import largest
from distft.train.shards import Shares

BROKEN_STEPS = 3  # with a loss that is no number, one after another, end a run: fp16 recovers from one or two
# A run that continues may have only the end of its schedule left, whose tiny rates may change nothing.
SURE_STEPS = 10
CHUNK = 2**20  # elements that are summed at a time: 8 MB each for three temporary tensors
ODD = 2654435761  # 2**32 / golden ratio (Knuth's multiplicative hash)


class LossGuard:
    """Counts the steps whose loss is nan or infinite. It is the global batch's: a nan on one rank is everyone's."""

    def __init__(self) -> None:
        self.kind, self.since, self.steps = "", 0, 0

    @staticmethod
    def grade(loss: float) -> int:
        """0 for a number, 1 for infinity, 2 for nan."""
        return 0 if math.isfinite(loss) else 2 if math.isnan(loss) else 1

    def step(self, step: int, grade: int) -> None:
        """Note the worst grade of any rank's loss."""
        kind = ("", "inf", "nan")[grade]
        if kind and not self.kind:
            self.since = step
        self.kind, self.steps = kind, self.steps + 1 if kind else 0

    def check(self, at_the_end: bool = False) -> None:
        """Raises RunError where BROKEN_STEPS steps in a row had no loss, or the last one before the end."""
        if self.steps >= (1 if at_the_end else BROKEN_STEPS):
            raise RunError(
                f"the loss is {self.kind} since step {self.since}\n"
                "Try a lower training.learning_rate, a higher training.warmup_ratio, a lower training.max_grad_norm, "
                "or bf16 instead of fp16,\nand look at the data. No checkpoint was written since then; earlier ones "
                "are kept."
            )


class WeightsGuard:
    """Compares the trained weights with those at the start of this attempt. Each rank reads its own part of them."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.before: int | None = None

    def start(self) -> None:
        """Remember the weights as they are now."""
        self.before = self._digest()

    def finite(self) -> bool:
        """Whether all weights are numbers."""
        broken = [not bool(torch.isfinite(weights.sum(dtype=torch.float32))) for weights in self._weights()]
        return not largest(int(any(broken)), self.trainer.args.device)

    def check(self, steps: int, resumed: bool) -> None:
        """Raises RunError where the `steps` of this attempt changed nothing, or left weights that are no numbers."""
        if not self.finite():
            raise RunError(
                "the trained weights are nan or inf after the last step\n"
                "Try a lower training.learning_rate or a lower training.max_grad_norm."
            )
        if steps < (SURE_STEPS if resumed else 1):
            return
        if not largest(int(self._digest() != self.before), self.trainer.args.device):
            raise RunError(
                f"nothing was trained: {steps} steps changed no weight\n"
                "The learning rate is too low for any change (training.learning_rate, and the column learning_rate of "
                "metrics.jsonl),\nor no gradient reaches the weights (trainer.overrides, the loss mask of the data)."
            )

    def _weights(self) -> list[torch.Tensor]:
        return list(Shares(self.trainer.model_wrapped, self.trainer.optimizer).weights())

    def _digest(self) -> int:
        """A number that changes with any bit of this rank's weights, but for one chance in 2**64."""
        return sum(_digest(weights) * (number * ODD + 1) for number, weights in enumerate(self._weights())) % 2**64


def _digest(weights: torch.Tensor) -> int:
    """Sum of the bits of each element times a number for its position, modulo 2**64."""
    bits = weights.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), CHUNK):
        chunk = bits[start : start + CHUNK].long()
        total += (chunk * torch.arange(start, start + len(chunk), device=bits.device).mul_(ODD).add_(1)).sum()
    return int(total)
