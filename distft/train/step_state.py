"""What the next step depends on besides weights and the optimizer's states: random numbers, loss scale, schedule."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def generators() -> dict[str, torch.Tensor]:
    """States of torch's random generators on this rank (dropout draws from them), by device type."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def set_generators(states: dict[str, torch.Tensor]) -> None:
    """Set the generators that are in `states`."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def scaler_state(trainer: Any) -> dict[str, float] | None:
    """The loss scale of fp16, of torch's GradScaler or DeepSpeed's; None without one."""
    if trainer.accelerator.scaler is not None:
        return trainer.accelerator.scaler.state_dict()
    scale = getattr(_deepspeed_scaler(trainer), "cur_scale", None)
    return None if scale is None else {"scale": float(scale)}


def set_scaler(trainer: Any, saved: dict[str, float] | None) -> None:
    """Take over a saved loss scale, whichever kind it was saved from."""
    if not saved:
        return
    if trainer.accelerator.scaler is not None:
        scaler = trainer.accelerator.scaler
        scaler.load_state_dict(scaler.state_dict() | saved)
    elif hasattr(scaler := _deepspeed_scaler(trainer), "cur_scale"):
        scaler.cur_scale = saved["scale"]


def _deepspeed_scaler(trainer: Any) -> Any:
    return getattr(getattr(trainer.model_wrapped, "optimizer", None), "loss_scaler", None)


def set_schedule(trainer: Any, steps: int) -> None:
    """Put the learning rate where it is after `steps` steps of the schedule.

    Not by the scheduler's state_dict: it has a rate per parameter group, and DeepSpeed leaves out empty groups.
    """
    scheduler = trainer.lr_scheduler
    scheduler.last_epoch = steps
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="To get the last learning rate computed")
        scheduler._last_lr = scheduler.get_lr()
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
