"""An optimizer for matrices, with AdamW for the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch


class MatrixOptimizer(torch.optim.Optimizer, ABC):
    """`step_matrices` for the parameter groups with `of_matrices`, AdamW for the others."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.betas, self.eps, others = betas, eps, self._others()
        self.adamw = torch.optim.AdamW(others, betas=betas, eps=eps, fused=True) if others else None

    @abstractmethod
    def step_matrices(self, parameters: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        """A step of these. Collective."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of all parameters with a gradient. Collective."""
        assert closure is None
        for group in self.param_groups:
            if group["of_matrices"]:
                given = [p for p in group["params"] if p.grad is not None]
                self.step_matrices(given, group["lr"], group["weight_decay"])
        if self.adamw is not None:
            # It has the groups and states of this optimizer, which accelerate replaces (load_state_dict).
            self.adamw.param_groups, self.adamw.state = self._others(), self.state
            self.adamw.step()

    def _others(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if not group["of_matrices"]]


def grouped(
    model: Any, matrices: Iterable[torch.Tensor], decaying: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    """The trained parameters of a model in groups: `of_matrices` or not, decaying or not.

    Args:
        decaying: names of the parameters that weight decay applies to.
    """
    chosen = {id(parameter) for parameter in matrices}
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = id(parameter) in chosen, weight_decay if name in decaying else 0.0
            groups.setdefault(kind, []).append(parameter)
    return [
        {"params": parameters, "of_matrices": of_matrices, "weight_decay": decay}
        for (of_matrices, decay), parameters in groups.items()
    ]
