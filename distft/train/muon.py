"""training.optim: muon. Muon for the matrices of hidden layers, AdamW for the rest, in one optimizer.

Muon is torch.optim.Muon's, which works on one process's tensors. Under FSDP2 a rank has some rows of each matrix, and
Newton-Schulz of these would be another update: here each rank gathers the whole update, iterates on it, and takes its
own rows. Momentum and weights stay sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

# torch.optim.Muon's defaults (torch/optim/_muon.py), which are those of https://kellerjordan.github.io/posts/muon.
MOMENTUM = 0.95
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
SMALLEST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon for the parameter groups with `use_muon`, AdamW for the others.

    A matrix has one state, its momentum; all else has AdamW's two.

    Args:
        dtype: of the Newton-Schulz iteration.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.dtype, others = dtype, self._others()
        self.adamw = torch.optim.AdamW(others, betas=betas, eps=eps, fused=True) if others else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of all parameters with a gradient. Collective under FSDP2."""
        assert closure is None
        for group in self.param_groups:
            if group["use_muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step(parameter, group["lr"], group["weight_decay"])
        if self.adamw is not None:
            # It has the groups and states of this optimizer, which accelerate replaces (load_state_dict).
            self.adamw.param_groups, self.adamw.state = self._others(), self.state
            self.adamw.step()

    def _others(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if not group["use_muon"]]

    def _step(self, parameter: torch.Tensor, lr: float, weight_decay: float) -> None:
        state, gradient, weight = self.state[parameter], _local(parameter.grad), _local(parameter)
        if not state:
            state["step"] = torch.zeros(())
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["step"] += 1
        state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        update = orthogonal(_whole(gradient.lerp(state["momentum_buffer"], MOMENTUM), parameter), self.dtype)
        # Scaled to the size of AdamW's updates, so that one learning rate and weight decay fit both (arXiv 2502.16982,
        # section 2.2; torch's adjust_lr_fn: match_rms_adamw).
        rate = lr * 0.2 * max(parameter.shape) ** 0.5
        weight.mul_(1 - lr * weight_decay)
        weight.add_(_own(update, parameter), alpha=-rate)


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
    """The optimizer of a model's trained parameters, with Muon's `options`.

    Args:
        decaying: names of the parameters that weight decay applies to.
    """
    of_muon = {id(parameter) for parameter in matrices(model)}
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = id(parameter) in of_muon, weight_decay if name in decaying else 0.0
            groups.setdefault(kind, []).append(parameter)
    made = [
        {"params": parameters, "use_muon": use_muon, "weight_decay": decay}
        for (use_muon, decay), parameters in groups.items()
    ]
    return Muon(made, **options)


def _local(tensor: Any) -> torch.Tensor:
    """This rank's part, in the same storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """All ranks' parts of what is sharded as `like` is. Collective."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()


def _own(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that is the same on all ranks."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
