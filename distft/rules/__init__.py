"""What cannot be combined, and what is unwise: named rules, each a small function with its source and its fix.

`distft rules` lists them; docs/rules.md is generated from them.
"""

from distft.rules import (  # noqa: F401 (each registers its rules)
    adapters,
    advice,
    combinations,
    models,
    overrides,
    trainer_overrides,
)
from distft.rules.core import RULES, Case, RecipeCase, Rule, ScriptCase, apply, broken, sentences, unwise, warnings

__all__ = [
    "RULES",
    "Case",
    "RecipeCase",
    "Rule",
    "ScriptCase",
    "apply",
    "broken",
    "sentences",
    "unwise",
    "warnings",
]
