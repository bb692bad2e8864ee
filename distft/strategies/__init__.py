"""What the strategies are, and plan → configuration files: DeepSpeed's JSON, accelerate's YAML with FSDP2 and HSDP.

Plain functions that return plain dicts; nothing here imports torch, deepspeed or accelerate.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A new dict: `base` with `overrides` on top. Two dicts under one key are merged, anything else is replaced."""
    merged = deepcopy(base)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else deepcopy(value)
    return merged
