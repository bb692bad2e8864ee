"""Clipping under ZeRO in a script of accelerate's: as the script asks, as under every other strategy.

accelerate fills in gradient_clipping: 1.0 where a config says "auto" and no Trainer knows better (accelerator.py 1.15,
_prepare_deepspeed), steps within `accelerator.backward`, and takes `clip_grad_norm_(parameters, max_norm)` for a
question about the norm. So a script that clips nothing was clipped to 1.0, and so was one that asks for 0.5.

Here the step waits for `clip_grad_norm_` or `optimizer.step()`, as the script is written.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from distft.errors import RunError

_wrappers: list[Any] = []  # accelerate's engine wrappers, one for each Accelerator of the script


def watch_accelerator(kind: Any) -> None:
    """Change Accelerator: a config whose clipping is "auto" clips as the script asks."""
    prepare, clip = kind._prepare_deepspeed, kind.clip_grad_norm_

    @functools.wraps(prepare)
    def prepare_deepspeed(accelerator: Any, *args: Any) -> Any:
        plugin = accelerator.state.deepspeed_plugin
        undecided = plugin.is_auto("gradient_clipping") and any(isinstance(found, nn.Module) for found in args)
        if undecided:
            plugin.deepspeed_config["gradient_clipping"] = 0.0
            plugin.script_clips = True  # also for the next Accelerator, which has the same plugin
        result = prepare(accelerator, *args)
        wrapper = accelerator.deepspeed_engine_wrapped
        if getattr(plugin, "script_clips", False) and wrapper is not None:
            wrapper.script_clips, wrapper.waits = True, False
            _wrappers.append(wrapper)
            for optimizer in accelerator._optimizers:
                optimizer.engine_wrapper = wrapper
        return result

    @functools.wraps(clip)
    def clip_grad_norm_(accelerator: Any, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        wrapper = accelerator.deepspeed_engine_wrapped
        if getattr(wrapper, "script_clips", False):
            _clip(wrapper, max_norm, norm_type)
        return clip(accelerator, parameters, max_norm, norm_type)

    kind._prepare_deepspeed, kind.clip_grad_norm_ = prepare_deepspeed, clip_grad_norm_


def watch_torch() -> None:
    """Change torch.nn.utils.clip_grad_norm_: under ZeRO parameters have no gradients, and it would clip nothing."""
    clip = torch.nn.utils.clip_grad_norm_

    @functools.wraps(clip)
    def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Any:
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        ids = {id(parameter) for parameter in given}
        for wrapper in _wrappers:
            if wrapper.waits and any(id(parameter) in ids for parameter in wrapper.engine.module.parameters()):
                _clip(wrapper, max_norm, norm_type)
                return torch.tensor(wrapper.get_global_grad_norm())
        return clip(given, max_norm, norm_type, *args, **kwargs)

    for module in (torch.nn.utils, torch.nn.utils.clip_grad):
        vars(module)["clip_grad_norm_"] = clip_grad_norm_


def watch_engine(module: Any) -> None:
    """Change accelerate's wrappers of engine and optimizer: the step comes when the script makes it."""
    kind = module.DeepSpeedEngineWrapper
    run = kind.backward

    @functools.wraps(run)
    def backward(wrapper: Any, loss: Any, sync_gradients: bool = True, **kwargs: Any) -> None:
        if not getattr(wrapper, "script_clips", False):
            run(wrapper, loss, sync_gradients, **kwargs)
            return
        _step(wrapper, 0.0)  # a script that leaves the steps to DeepSpeed
        wrapper.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        wrapper.engine.backward(loss, **kwargs)
        wrapper.waits = sync_gradients

    def step(optimizer: Any) -> None:
        if (wrapper := getattr(optimizer, "engine_wrapper", None)) is not None:
            _step(wrapper, 0.0)

    kind.backward, module.DeepSpeedOptimizerWrapper.step = backward, step


def _clip(wrapper: Any, max_norm: float, norm_type: float) -> None:
    if norm_type != 2:
        raise RunError(f"clip_grad_norm_(norm_type={norm_type}): DeepSpeed clips by the 2-norm only")
    _step(wrapper, float(max_norm))


def _step(wrapper: Any, max_norm: float) -> None:
    """Make the step that waits, if any, with its gradient clipped to max_norm (0: not at all; infinite: not either)."""
    if wrapper.waits:
        wrapper.waits = False
        wrapper.engine.optimizer.clip_grad = 0.0 if max_norm == float("inf") else max_norm
        wrapper.engine.step()
