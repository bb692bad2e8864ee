"""training.train_only from what other tools freeze, or leave unfrozen."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from distft.importers.draft import Draft
from distft.importers.options import Options


def unfrozen_parameters(options: Options, name: str) -> None:
    """axolotl's list (utils/freeze.py, LayerNamePattern): regular expressions for the beginning of a parameter's name,
    whose dots are plain unless a plus follows; `[a:b]` after one trains some rows alone."""
    found = []
    for text in options.texts(name):
        if re.fullmatch(r".+\[[0-9]*(?::[0-9]*)?\]", text):
            options.refuse(name, f"{text} trains some rows of a weight alone; distft trains whole ones, or none")
            return
        pattern = re.sub(r"\.(?!\+)", r"\.", text).removeprefix("^")
        if "|" in pattern:
            pattern = f"(?:{pattern}).*"
        elif pattern.endswith("$"):
            pattern = pattern.removesuffix("$")
        else:
            pattern = pattern.removesuffix(r"\.*") + ".*"
        found.append(pattern)
    options.set("training.train_only", name, found)


def layers(options: Options, modules: Sequence[str], extra: Sequence[str], of_layers: int | None = None) -> None:
    """LLaMA-Factory's layers by number (model/adapter.py, _setup_freeze_tuning): the last ones, or the first ones where
    the number is negative; in these the modules named, and elsewhere what has one of the names in `extra` in it.

    Args:
        of_layers: how many layers the model has, where every n-th of them is trained (LLaMA Pro).
    """
    name = "freeze_trainable_layers"
    given = options.integer(name)
    count = 2 if given is None else given
    if of_layers is not None and (count < 1 or of_layers % count):
        options.draft.problems.append(f"{name}: got {count}, which does not divide the model's {of_layers} layers")
        return
    if of_layers is not None:
        stride = of_layers // count
        numbers: Collection[int] = range(stride - 1, of_layers, stride)
    else:
        numbers = range(-1, -count - 1, -1) if count > 0 else range(-count)
    patterns = []
    if numbers:
        below = "" if "all" in modules else rf"\.(?:{'|'.join(map(re.escape, modules))}).*"
        patterns.append(rf".*\.{_any_of(numbers)}{below}")
    patterns += [f".*{re.escape(module)}.*" for module in extra]
    if not patterns:
        options.draft.problems.append(f"{name}: got {count}, and freeze_extra_modules is empty: nothing is trained")
    elif given is None:
        options.draft.default("training.train_only", patterns, name)
    else:
        options.set("training.train_only", name, patterns)


def _any_of(numbers: Collection[int]) -> str:
    """A regular expression for some numbers, all of the same sign."""
    words = sorted({str(abs(number)) for number in numbers}, key=int)
    sign = "-" if min(numbers) < 0 else ""
    if len(words) == 1:
        return sign + words[0]
    return f"{sign}[{''.join(words)}]" if all(len(word) == 1 for word in words) else f"{sign}(?:{'|'.join(words)})"


def number_of_layers(draft: Draft, model: str | None) -> int | None:
    """Layers of a model whose folder is on this machine."""
    folder = draft.locate(model or "")
    try:
        config: Any = json.loads((folder / "config.json").read_text()) if folder else {}
    except (OSError, ValueError):
        return None
    config = config if isinstance(config, dict) else {}
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    found = next((text[name] for name in ("num_hidden_layers", "num_layers", "n_layer") if text.get(name)), None)
    return found if isinstance(found, int) else None
