"""Counts in distft's cache, so that plan, validate and launch of one recipe count once: a small file of JSON for each
model and setting. Whatever keeps a file from being read or written (a full disk, another user's folder) only means that
it is counted again."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from distft import extras
from distft.config.recipe import Recipe
from distft.data.cache import cache_root, digest
from distft.models.architecture import guess_sizes
from distft.models.layout import Tensor
from distft.models.shapes import read_config, shape_of
from distft.models.vocabulary import rows_needed
from distft.planner.counting import Counts, Step
from distft.planner.memory import Peaks
from distft.planner.sharding import LowRank, Muon, Sizes, Unit
from distft.runs.files import write_atomically

MOST = 100  # files, of 20 to 500 kB each; the one that was not used for longest goes
# What a count depends on besides distft: the classes that are traced, and kernels that they use where they are there.
PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "bitsandbytes", "timm"),
    *("kernels", "flash-attn", "flash-linear-attention", "mamba-ssm", "causal-conv1d"),
)
ROOMS = ("models", "planner", "simulation", "train")  # the code that counts, and the training that it follows
KEYS = {"sizes", "states", "tensors", "tied", "config", "steps"}
# The fields of a recipe that change nothing about a step; the model's name is not among what counts, its config is.
NOT_COUNTED: Mapping[str, Iterable[str]] = {
    "model": ("name_or_path", "revision", "add_tokens"),
    "data": ("train", "eval", "columns", "format", "ignore_fields", "roles", "train_on", "long_rows", "chat_template"),
    "training": (
        *("global_batch_size", "micro_batch_size", "gradient_checkpointing", "max_steps", "num_train_epochs"),
        *("learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm"),
        *("eval_steps", "seed", "report_to"),
    ),
}
OTHER_GROUPS = ("name", "parallelism", "checkpoint", "deepspeed", "fsdp", "trainer", "output_dir")


class Kept:
    """The counts of a recipe (planner.counting.Counts). What is not in the cache is counted, and kept there.

    Args:
        count: counts on the model itself; it is called when the first thing is missing.

    Raises:
        DistftError: as `count`; or config.json cannot be read.
    """

    def __init__(self, recipe: Recipe, count: Callable[[], Counts]) -> None:
        self.file, self._count = _file(recipe), cache(count)
        found = _read(self.file)
        if found is None:
            found = _json(self._count())
            _write(self.file, found)
        self._found = found
        self.sizes = Sizes(**{name: _PARTS.get(name, _same)(value) for name, value in found["sizes"].items()})
        self.states: Mapping[str, int] = found["states"]
        tensors, tied = (
            tuple(Tensor(name, tuple(shape), kind) for name, shape, kind in found[key]) for key in ("tensors", "tied")
        )
        config = found["config"]
        self.model = shape_of(recipe, tensors, tied, guess_sizes(config), config, trained=self.sizes.trained)

    def peaks(self, *steps: Step) -> list[Peaks]:
        """See Counts."""
        kept = self._found["steps"]
        if missing := {name: step for step in steps if (name := _name(step)) not in kept}:
            for name, counted in zip(missing, self._count().peaks(*missing.values()), strict=True):
                kept[name] = [[*segment, dict(live)] for segment, live in counted.items()]
            _write(self.file, self._found)
            kept = self._found["steps"]
        return [{(moment, block): Counter(live) for moment, block, live in kept[_name(step)]} for step in steps]


def _name(step: Step) -> str:
    return " ".join(map(str, step))


def _same(value: Any) -> Any:
    return value


# The groups in Sizes, from what asdict makes of them.
_PARTS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("embedding", "block", "tail"), lambda value: Unit(**value)),
    "muon": lambda value: Muon(**value),
    "low_rank": lambda value: LowRank(**value),
    "block_inputs": tuple,
}


def _json(counts: Counts) -> dict[str, Any]:
    """What a file has, before the first step is counted."""
    return {
        "sizes": asdict(counts.sizes),
        "states": dict(counts.states),
        "tensors": [list(tensor) for tensor in counts.model.tensors],
        "tied": [list(tensor) for tensor in counts.model.tied],
        "config": dict(counts.model.config),
        "steps": {},
    }


def _file(recipe: Recipe) -> Path | None:
    """Where the counts of a recipe are kept; None for a model with code of its own, which may change."""
    if recipe.model.trust_remote_code:
        return None
    settings = recipe.model_dump(mode="json", exclude={*OTHER_GROUPS, *NOT_COUNTED})
    for group, names in NOT_COUNTED.items():
        settings[group] = getattr(recipe, group).model_dump(mode="json", exclude=set(names))
    installed = extras.installed()
    words = [json.dumps(settings, sort_keys=True), json.dumps(read_config(recipe), sort_keys=True)]
    words += [str(rows_needed(recipe, 0)), *(installed.get(name, "") for name in PACKAGES)]
    return cache_root() / "counts" / f"{digest(_code(), *words)}.json"


@cache
def _code() -> bytes:
    """A digest of the code that counts."""
    here = Path(__file__).parents[1]
    files = (path for room in ROOMS for path in sorted((here / room).glob("*.py")))
    return digest(*(path.read_bytes() for path in files)).encode()


def _read(file: Path | None) -> dict[str, Any] | None:
    """What a file has; None where there is no such file, or not a whole one."""
    if file is None:
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        os.utime(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() == KEYS else None


def _write(file: Path | None, found: dict[str, Any]) -> None:
    """Keep counts, together with the steps that another process has counted meanwhile."""
    if file is None:
        return
    if other := _read(file):
        found["steps"] = other["steps"] | found["steps"]
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(found))
        newest = sorted(file.parent.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in newest[MOST:]:
            old.unlink()
