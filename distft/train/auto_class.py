"""transformers' class for a model that is trained on text."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from distft.models.kinds import IMAGES_AND_TEXT


def auto_class(model_type: str) -> Any:
    """AutoModelForCausalLM, or the one that has the model's whole class, images included."""
    return AutoModelForImageTextToText if model_type in IMAGES_AND_TEXT else AutoModelForCausalLM
