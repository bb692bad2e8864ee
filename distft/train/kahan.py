"""training.master_weights: none. AdamW for weights, gradients and moments in bf16, and how DDP averages such gradients.

A weight in bf16 has 8 significant bits: most steps at fine-tuning's learning rates are less than half of its last one,
and would be lost. Kahan summation keeps what was rounded off in a buffer, and adds it to the next step (optimi, and
torchdistX's AnyPrecisionAdamW, do so too). Three things those lose, measured in benchmarks/master_weights.py:

- They multiply the weight by 1 - lr * decay, which rounds to the weight itself: there is no weight decay. Here it is a
  part of the step.
- 0.999 of a second moment rounds to itself, so that it never falls.
- A step of less than half of the buffer's last bit is lost, too: with a weight of 1, one of 1e-6.

So moment and buffer are rounded up or down in proportion (to the right mean), by bits of the values and the number of
the step instead of a generator's: replicas stay equal, and sharding changes nothing.

All arithmetic is float32, element by element.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distft.train.matrix_optimizer import grouped

STATES = ("exp_avg", "exp_avg_sq", "kahan_comp")
CHUNK = 2**22  # elements of a tensor that are widened at a time
GOLDEN = -1640531527  # 2**32 / 1.618 as an int32: multiplying by it mixes the bits (Knuth, volume 3, 6.4)


class KahanAdamW(torch.optim.Optimizer):
    """AdamW whose tensors are all bf16."""

    def __init__(
        self, parameters: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.betas, self.eps = betas, eps

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state |= {name: torch.zeros_like(parameter) for name in STATES}
                state["step"] += 1
                tensors = [_flat(t).split(CHUNK) for t in (parameter, parameter.grad, *(state[n] for n in STATES))]
                for parts in zip(*tensors, strict=True):
                    self._step(parts, group["lr"], group["weight_decay"], state["step"])

    def _step(self, parts: Sequence[torch.Tensor], lr: float, decay: float, step: int) -> None:
        weight, gradient, exp_avg, exp_avg_sq, kahan_comp = parts
        first, second = self.betas
        gradient = gradient.float()
        mean = exp_avg.float().lerp_(gradient, 1 - first)
        square = exp_avg_sq.float().mul_(second).addcmul_(gradient, gradient, value=1 - second)
        del gradient
        exp_avg.copy_(mean)
        exp_avg_sq.copy_(rounded(square, mean, step))
        square.div_(1 - second**step).sqrt_().add_(self.eps)
        wanted = kahan_comp.float().add_(weight, alpha=1 - lr * decay)
        wanted.addcdiv_(mean, square, value=-lr / (1 - first**step))
        del mean, square
        weight.copy_(wanted)
        kahan_comp.copy_(rounded(wanted - weight, wanted, step))


def rounded(values: torch.Tensor, source: torch.Tensor, step: int) -> torch.Tensor:
    """float32 values with the last 16 bits rounded away: away from 0 with the probability that these bits are of the
    next value, as bits that are made from `source` and the number of the step have it. Deterministic. What is no number
    stays none."""
    mixed = source.view(torch.int32).add(step * GOLDEN & 0x7FFFFFFF)
    mixed ^= mixed >> 15  # a weight that moves by the same each step would else meet the same chance
    chance = mixed.mul_(GOLDEN).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    found = chance.add_(values.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    return found.where(values.isfinite(), values)


def make(model: Any, decaying: Collection[str], *, weight_decay: float, **options: Any) -> KahanAdamW:
    """The optimizer of a model's trained parameters; `decaying` as of `grouped`."""
    return KahanAdamW(grouped(model, (), decaying, weight_decay), **options)


class Float32Average:
    """A hook for DDP (register_comm_hook), which would add up gradients in bf16: the sum of many ranks would lose
    digits. At most two buckets are on their way, as float32 copies."""

    def __init__(self) -> None:
        self.sent: list[tuple[dist.Work, torch.futures.Future[torch.Tensor]]] = []

    def __call__(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        if len(self.sent) == 2:
            work, done = self.sent.pop(0)
            work.wait()  # NCCL keeps the copy until then
            done.wait()
        buffer = bucket.buffer()
        work = dist.all_reduce(buffer.float().div_(dist.get_world_size()), async_op=True)
        assert work is not None
        done = work.get_future().then(lambda future: buffer.copy_(future.value()[0]))
        self.sent = [] if bucket.is_last() else [*self.sent, (work, done)]
        return done


def averaging_in_float32(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """`Accelerator.prepare`, with the hook on a model that DDP wraps."""

    @functools.wraps(prepare)
    def prepare_hooked(*objects: Any, **options: Any) -> Any:
        prepared = prepare(*objects, **options)
        for found in prepared if isinstance(prepared, tuple) else (prepared,):
            if isinstance(found, DistributedDataParallel):
                average = Float32Average()
                found.register_comm_hook(None, lambda _, bucket, average=average: average(bucket))
        return prepared

    return prepare_hooked


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, in the same storage."""
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)
