"""Plan → the configuration files of those who shard: DeepSpeed's JSON, accelerate's YAML with FSDP2 and HSDP inside.

Plain functions to plain dicts; nothing here imports torch, deepspeed or accelerate.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A new dict: `overrides` laid over `base`. Two dicts under one key are merged, anything else is replaced."""
    merged = deepcopy(base)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else deepcopy(value)
    return merged
