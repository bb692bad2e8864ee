"""training.optim: muon. Muon for the matrices of hidden layers, AdamW for the rest, in one optimizer.

Muon is torch.optim.Muon's. That works on one process's tensors, and its iterations over all matrices of a large model
take longer than the rest of a step. Here the ranks share the matrices among them: each iterates on whole ones, whose
rows it gets from the other ranks under FSDP2, and sends the others the result. Momentum and weights stay sharded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from distft.train.matrix_optimizer import MatrixOptimizer, grouped

# torch.optim.Muon's defaults (torch/optim/_muon.py), which are those of https://kellerjordan.github.io/posts/muon.
MOMENTUM = 0.95
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
SMALLEST_NORM = 1e-7


class Muon(MatrixOptimizer):
    """A matrix has one state, its momentum.

    Args:
        dtype: of the Newton-Schulz iteration.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], dtype: torch.dtype = torch.bfloat16, **options: Any):
        super().__init__(groups, **options)
        self.dtype = dtype

    def step_matrices(self, parameters: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        for parameter in parameters:
            state, gradient = self.state[parameter], _local(parameter.grad)
            if not state:
                state["step"] = torch.zeros(())
                state["momentum_buffer"] = torch.zeros_like(gradient)
            state["step"] += 1
            state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        ranks = _ranks(parameters[0]) if parameters else 1
        for start in range(0, len(parameters), ranks):
            self._step_of(parameters[start : start + ranks], lr, weight_decay)

    def _step_of(self, parameters: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        """A step of at most one matrix a rank."""
        for parameter, update in zip(parameters, self._orthogonal(parameters), strict=True):
            # Scaled to the size of AdamW's updates, so that one learning rate and weight decay fit both (arXiv
            # 2502.16982, section 2.2; torch's adjust_lr_fn: match_rms_adamw).
            rate = lr * 0.2 * max(parameter.shape) ** 0.5
            _local(parameter).mul_(1 - lr * weight_decay).add_(update, alpha=-rate)

    def _orthogonal(self, parameters: list[torch.nn.Parameter]) -> Iterable[torch.Tensor]:
        """This rank's part of the orthogonal update of each."""
        if isinstance(parameters[0], DTensor):
            return self._of_rows(parameters)
        if _ranks(parameters[0]) > 1:
            return self._of_whole_ones(parameters)
        return (orthogonal(self._update(parameter), self.dtype) for parameter in parameters)

    def _update(self, parameter: torch.Tensor) -> torch.Tensor:
        return _local(parameter.grad).lerp(self.state[parameter]["momentum_buffer"], MOMENTUM)

    def _of_whole_ones(self, parameters: list[torch.nn.Parameter]) -> Iterator[torch.Tensor]:
        """Of matrices that all ranks have: each iterates on one, and sends it to the others."""
        rank = dist.get_rank()
        mine = None
        if rank < len(parameters):
            mine = orthogonal(self._update(parameters[rank]), self.dtype).contiguous()
        for owner, parameter in enumerate(parameters):
            update = mine if owner == rank and mine is not None else torch.empty_like(parameter, dtype=self.dtype)
            dist.broadcast(update, owner)
            yield update

    def _of_rows(self, parameters: list[Any]) -> Sequence[torch.Tensor]:
        """Of matrices of which each rank has some rows (FSDP2's Shard(0)): each gets all rows of one, and iterates."""
        mesh = parameters[0].device_mesh
        group = mesh.get_group(mesh.ndim - 1)  # of HSDP's mesh, the ranks that share a copy
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        parts = [_local(parameter).shape for parameter in parameters]
        here = [part.numel() for part in parts] + [0] * (ranks - len(parts))
        rows, columns = parameters[rank].shape if rank < len(parameters) else (0, 0)
        chunk = -(-rows // ranks)
        there = [columns * max(0, min(chunk, rows - other * chunk)) for other in range(ranks)]
        sent = torch.cat([self._update(parameter).flatten() for parameter in parameters])
        whole = sent.new_empty(rows * columns)
        dist.all_to_all_single(whole, sent, there, here, group)
        del sent
        whole = orthogonal(whole.view(rows, columns), self.dtype).flatten() if rows else whole.to(self.dtype)
        found = whole.new_empty(sum(here))
        dist.all_to_all_single(found, whole, here, there, group)
        return [piece.view(part) for piece, part in zip(found.split(here), parts, strict=False)]


def _ranks(parameter: Any) -> int:
    """Ranks that share the work on the matrices."""
    if isinstance(parameter, DTensor):
        return parameter.device_mesh.size(parameter.device_mesh.ndim - 1)
    return dist.get_world_size() if dist.is_initialized() else 1


def orthogonal(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest matrix whose singular values are about 1 (0.7 to 1.2), which may overwrite this one.

    A quintic Newton-Schulz iteration: torch/optim/_muon.py, _zeropower_via_newtonschulz, which is always in bfloat16.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(dtype)
    x.div_(x.norm().clamp(min=SMALLEST_NORM))
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x if wide else x.T


def matrices(model: Any) -> list[torch.nn.Parameter]:
    """The trained weights that Muon is for: matrices of layers other than embeddings, norms and the output layer."""
    head = model.get_output_embeddings()
    others = {
        id(module.weight)
        for module in model.modules()
        if module is head or isinstance(module, torch.nn.Embedding) or "Norm" in type(module).__name__
        if getattr(module, "weight", None) is not None
    }
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and name.endswith(".weight") and id(parameter) not in others
    ]


def make(model: Any, decaying: Collection[str], *, weight_decay: float, **options: Any) -> Muon:
    """The optimizer of a model's trained parameters, with Muon's `options`; `decaying` as of `grouped`."""
    return Muon(grouped(model, matrices(model), decaying, weight_decay), **options)


def _local(tensor: Any) -> torch.Tensor:
    """This rank's part, in the same storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
