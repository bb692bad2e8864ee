"""`torchrun ... -m count_states RUN_DIR`: a rank that trains like `distft.train` and writes the bytes of its states.

RUN_DIR/states-RANK.json has the bytes of distinct storages: the model's parameters, the gradients wherever the strategy
keeps them, and what else the optimizer holds (master weights and states).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from distft.runs.directory import RunDir
from distft.train import strategy_check, worker
from distft.train.stopping import Stopping


def main() -> None:
    run = RunDir(Path(sys.argv[1]).absolute())
    plan = worker.enter(run)
    from distft.train import cpu_ranks

    cpu_ranks.apply()
    from distft.train import run as training

    class Counting(training.RecipeTrainer):
        """Counts in the second step."""

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            if not hasattr(self, "counted"):
                self.counted = False
                _before_step(self.model_wrapped, self.optimizer, lambda: self._count(run.path))
            return super().training_step(model, *args, **kwargs)

        def _count(self, folder: Path) -> None:
            if self.state.global_step != 1 or self.counted:
                return
            self.counted = True
            found = count(self.model_wrapped, self.optimizer)
            found["ran"] = strategy_check.describe(self.model_wrapped, self.optimizer)
            (folder / f"states-{self.args.process_index}.json").write_text(json.dumps(found))

    training.RecipeTrainer = Counting
    training.train(run, plan, Stopping(run))


def _before_step(model: Any, optimizer: Any, then: Any) -> None:
    """Call `then` when the gradients of a step exist and nothing has used them yet."""
    if type(model).__name__ == "DeepSpeedEngine":
        step = model._take_model_step

        def take(*args: Any, **kwargs: Any) -> Any:
            then()
            return step(*args, **kwargs)

        model._take_model_step = take
    else:
        optimizer.optimizer.register_step_pre_hook(lambda *_: then())


def count(model: Any, optimizer: Any) -> dict[str, Any]:
    """Bytes by kind; a storage that several kinds point to counts for the first."""
    seen: set[int] = set()

    def total(tensors: Iterator[torch.Tensor]) -> int:
        size = 0
        for tensor in tensors:
            storage = _local(tensor).untyped_storage()
            if storage.data_ptr() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                size += storage.nbytes()
        return size

    parameters = total(_parameters(model))
    gradients = total(_gradients(model))
    # Bytes alone would not show whether a strategy computes in the dtype that the formula assumes.
    dtypes = {
        "trained" if p.requires_grad else "frozen": str(p.dtype).removeprefix("torch.") for p in model.parameters()
    }
    found = {"parameters": parameters, "gradients": gradients, "optimizer": total(_optimizer(model, optimizer))}
    return found | {"dtypes": dtypes}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists and dicts."""
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, dict):
        for value in found.values():
            yield from _tensors(value)
    elif isinstance(found, (list, tuple)):
        for value in found:
            yield from _tensors(value)


def _parameters(model: Any) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3: the rank's partition, and small tensors as a whole
            yield parameter.ds_tensor
        yield parameter.detach()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from _tensors([state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code])


def _gradients(model: Any) -> Iterator[torch.Tensor]:
    yield from (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    zero = getattr(model, "optimizer", None)
    for name in (
        "fp32_groups_gradients_flat",  # ZeRO-1 in bf16
        "averaged_gradients",  # ZeRO-2, ZeRO-3
        "all_grad_tensors",  # ZeRO-1
        "grad_partitions_flat_buffer",  # ZeRO-3
    ):
        yield from _tensors(getattr(zero, name, None))


def _optimizer(model: Any, optimizer: Any) -> Iterator[torch.Tensor]:
    while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
        zero, optimizer = optimizer, optimizer.optimizer
        for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
            yield from _tensors(getattr(zero, name, None))
    for group in optimizer.param_groups:
        yield from _tensors(group["params"])
    for state in optimizer.state.values():
        # Not the step counters: 4 bytes per tensor.
        yield from (value for value in _tensors(state) if _local(value).numel() > 1)


if __name__ == "__main__":
    main()
