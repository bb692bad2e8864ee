"""training.optim: galore_adamw and apollo_adamw. AdamW's moments of a gradient in a few directions.

The steps are those of galore_torch 1.0 (adamw.py; arXiv 2403.03507) and apollo_torch 1.0.3 (apollo.py; arXiv
2412.05270) with proj_type `std`. These keep a whole matrix of singular vectors for the few that they use, let every
rank decompose every matrix, and have states that no checkpoint can divide; here the ranks share the decompositions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist

from distft.config.recipe import OptimArgs, Recipe
from distft.train.matrix_optimizer import MatrixOptimizer, grouped

# apollo_torch/apollo.py: the norm of an update grows by at most 1% a step (arXiv 2410.01623), and what is added to the
# norms that it divides by.
MOST_GROWTH = 1.01
SMALL = 1e-8
GALORE_SCALE, APOLLO_SCALE = 0.25, 1.0  # transformers 5.23 trainer_optimizer.py


class LowRank(MatrixOptimizer):
    """A matrix of M x n elements (n the shorter side) has its projection (rank x n) and two moments (M x rank)."""

    def __init__(self, groups: Iterable[dict[str, Any]], arguments: OptimArgs, is_apollo: bool, **options: Any):
        super().__init__(groups, **options)
        self.arguments, self.is_apollo = arguments, is_apollo
        self.scale = arguments.scale or (APOLLO_SCALE if is_apollo else GALORE_SCALE)
        first = (p for group in self.param_groups if group["of_matrices"] for p in group["params"])
        self.numbers = {parameter: number for number, parameter in enumerate(first, 1)}

    def step_matrices(self, parameters: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self._make_state(parameter)
        gap = self.arguments.update_proj_gap
        self._choose([p for p in parameters if self.state[p]["step"] % gap == 0])
        for parameter in parameters:
            state, gradient = self.state[parameter], _long(_gradient(parameter))
            state["step"] += 1
            step, (first, second) = state["step"], self.betas
            low = gradient @ state["projection"].T
            state["exp_avg"].lerp_(low, 1 - first)
            state["exp_avg_sq"].mul_(second).addcmul_(low, low, value=1 - second)
            moved = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(self.eps)
            if self.is_apollo:
                update = self._scaled(gradient, low, moved, state, step)
            else:
                update = (moved @ state["projection"]).mul_(self.scale)
            rate = lr * (1 - second**step) ** 0.5 / (1 - first**step)
            _long(parameter).add_(update, alpha=-rate)
            parameter.mul_(1 - lr * weight_decay)

    def _make_state(self, parameter: torch.nn.Parameter) -> None:
        long, short = _long(parameter).shape
        rank = self.arguments.rank if self.is_apollo else min(self.arguments.rank, short)
        state = self.state[parameter]
        state["step"] = 0
        state["projection"] = parameter.new_zeros(rank, short)
        state["exp_avg"], state["exp_avg_sq"] = (parameter.new_zeros(long, rank) for _ in range(2))
        if self.is_apollo:
            state["update_norm"] = parameter.new_zeros(1)

    def _choose(self, parameters: list[torch.nn.Parameter]) -> None:
        """New directions for some matrices: with the numbers and signs that the packages have."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for parameter in parameters if self.is_apollo else parameters[rank::ranks]:
            state, is_wide = self.state[parameter], parameter.shape[0] < parameter.shape[1]
            projection = state["projection"].T if is_wide else state["projection"]
            if self.is_apollo:
                seed = self.numbers[parameter] + 1_000_003 * (state["step"] // self.arguments.update_proj_gap)
                generator = torch.Generator(projection.device).manual_seed(seed)
                numbers = torch.randn(projection.shape, generator=generator, device=projection.device)
                projection.copy_(numbers / len(state["projection"]) ** 0.5)
            else:
                left, _, right = torch.linalg.svd(_gradient(parameter), full_matrices=False)
                count = len(state["projection"])
                projection.copy_(left[:, :count] if is_wide else right[:count])
        if not self.is_apollo and ranks > 1:
            for number, parameter in enumerate(parameters):
                dist.broadcast(self.state[parameter]["projection"], number % ranks)

    def _scaled(
        self, gradient: torch.Tensor, low: torch.Tensor, moved: torch.Tensor, state: dict[str, Any], step: int
    ) -> torch.Tensor:
        """The gradient itself, as much larger or smaller as AdamW makes its projection."""
        dim = 1 if self.arguments.scale_type == "channel" else (0, 1)
        factor = moved.norm(dim=dim, keepdim=True) / (low.norm(dim=dim, keepdim=True) + SMALL)
        update = gradient * factor
        norm = update.norm()
        if step > 1:
            limiter = torch.clamp(norm / (state["update_norm"] + SMALL), min=MOST_GROWTH) / MOST_GROWTH
            update, norm = update.div_(limiter), norm / limiter
        state["update_norm"].copy_(norm)
        return update.mul_(self.scale**0.5)


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _long(matrix: torch.Tensor) -> torch.Tensor:
    """A view with the longer side first."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def matrices(model: Any, targets: str | list[str]) -> list[torch.Tensor]:
    """The trained weights of the linear layers that training.optim_target_modules means."""
    head = model.get_output_embeddings()
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad and module is not head
        if targets == "all-linear" or any(target in name for target in targets)
    ]


def make(model: Any, recipe: Recipe, decaying: Collection[str], *, weight_decay: float, **options: Any) -> LowRank:
    """The optimizer of a model's trained parameters; `decaying` as of `grouped`."""
    assert recipe.low_rank is not None
    groups = grouped(model, matrices(model, recipe.training.optim_target_modules), decaying, weight_decay)
    return LowRank(groups, recipe.low_rank, recipe.training.optim == "apollo_adamw", **options)
