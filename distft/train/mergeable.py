"""Which weights an adapter is on, and whether it can be merged into the tensors that they are stored as."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.oft import OFTLayer
from peft.utils import ModulesToSaveWrapper

from distft.train.conversion import Conversion, Group, on_meta

ADAPTED = (LoraLayer, OFTLayer)  # peft's layers with an adapter
PEFT = "base_model.model."  # before every name in a peft model


def plain_name(name: str) -> str:
    """A module or parameter of a peft model, by its name in the model without adapters."""
    return re.sub(r"\.(?:base_layer|original_module|modules_to_save\.default)(?=\.|$)", "", name.removeprefix(PEFT))


def adapted(model: Any) -> dict[str, tuple[str, Any]]:
    """Name and module of the layers with an adapter, by the plain name of the weight that it is on.

    An adapter on experts is on one parameter of their module, and two of them are one inside the other.
    """
    return {
        f"{plain_name(name)}.{getattr(module, 'parameter_name', 'weight')}": (name, module)
        for name, module in model.named_modules()
        if isinstance(module, ADAPTED)
    }


def saved_modules(model: Any) -> dict[str, torch.nn.Module]:
    """The copies of lora.modules_to_save in a peft model, by the plain name of the layer that each stands for."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    return {plain_name(name): module.modules_to_save["default"] for name, module in found.items()}


def saved_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of these, by the plain name of the one that each stands for."""
    return {f"{path}.{name}": p for path, m in saved_modules(model).items() for name, p in m.named_parameters()}


def obstacles(conversion: Conversion, parameters: Iterable[str]) -> list[str]:
    """Why changed values of these parameters could not be stored as the base's are: a sentence each."""
    tied = {*conversion.tied, *conversion.tied.values()}
    found: list[str] = []
    groups: dict[Group, None] = {}
    for name in parameters:
        if name in tied:
            found.append(
                f"{name} is tied to another weight, which a merge would change as well: use final/ with peft, as it is"
            )
        elif name not in conversion.group_of:
            found.append(f"{name}: the base's files have nothing for it")
        else:
            groups[conversion.group_of[name]] = None
    shapes = {name: conversion.shapes[name] for group in groups for name in group.parameters}
    try:
        conversion.store(groups, on_meta(shapes))
    except Exception as error:  # any, of operations that get what they were not written for
        found.append(str(error))
    return found
