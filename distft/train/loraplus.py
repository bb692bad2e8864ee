"""LoRA+: other learning rates for some parts of adapters (arXiv 2402.12354; peft/optimizers/loraplus.py)."""

from __future__ import annotations

from typing import Any

import torch

from distft.config.recipe import Lora

EMBEDDING_RATE = 1e-6  # peft's loraplus_lr_embedding


def set_rates(optimizer: torch.optim.Optimizer, model: Any, lora: Lora) -> None:
    """Split the groups of a new optimizer by what lora.loraplus_lr_ratio makes of their learning rate.

    The B matrices and vectors (DoRA's magnitudes, norms) get a multiple of it, adapters on embeddings a rate of their
    own. The schedule scales all of them; the first group has the rate of the recipe, which is the one that is logged.
    """
    if lora.loraplus_lr_ratio is None:
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            name, shape = names[id(parameter)], getattr(parameter, "ds_shape", parameter.shape)
            rate = group["lr"]
            if "lora_embedding_" in name:
                rate = lora.loraplus_lr_embedding or EMBEDDING_RATE
            elif "lora_B" in name or len(shape) == 1:
                rate *= lora.loraplus_lr_ratio
            parts.setdefault(rate, []).append(parameter)
        groups += [group | {"params": parameters, "lr": rate} for rate, parameters in parts.items()]
    first = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[:] = sorted(groups, key=lambda group: group["lr"] != first)
