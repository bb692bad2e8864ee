"""checkpoints/step-N: which are complete, and what may continue them. Without torch, for `resume` and `status`.

A folder counts once manifest.json is in it. That is written last: every other file was flushed to disk, read back and
compared before, and until then the folder had another name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.config.recipe import Recipe
from distft.data.cache import content_digest, file_digest
from distft.data.reading import are_here
from distft.runs.directory import RunDir

MANIFEST = "manifest.json"
SCHEMA = 1
SAMPLE = 2**16  # bytes at both ends of a weights file, which identify it
# What is stored in a checkpoint depends on these: not even --force makes another adapter fit it.
FIXED = ("model", "lora", "training.train_only", "training.optim", "training.master_weights")

# What a version did that did not have the field.
EARLIER = {"training.master_weights": "float32"}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with its files, by their checksums; checks every `parts`-th file from `part` on."""
        for name, facts in sorted(self.manifest["files"].items())[part::parts]:
            try:
                digest = file_digest(self.path / name).hex()
            except OSError as error:
                return f"{name}: {error.strerror}"
            if digest != facts["sha256"]:
                return f"{name}: its checksum differs from the manifest's"
        return None


def complete(run: RunDir) -> list[Checkpoint]:
    """The complete checkpoints of a run, the newest first. Checksums are not compared (Checkpoint.damage does)."""
    found = []
    for path in run.checkpoints.glob("step-*"):
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            whole = all((path / name).stat().st_size == facts["bytes"] for name, facts in manifest["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if whole and manifest.get("schema") == SCHEMA:
            found.append(Checkpoint(path, manifest))
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def changes(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, str]:
    """What differs between a checkpoint and the recipe that continues it, by dotted name.

    Data that is not on this machine is not compared: the ranks do that.
    """
    saved, here = checkpoint.manifest["identity"], are_here(recipe)
    if not here:
        saved = {name: value for name, value in saved.items() if name != "data"}
    return differences(saved, identity(recipe, with_data=here))


def identity(recipe: Recipe, with_data: bool = True) -> dict[str, Any]:
    """What a checkpoint and the run that continues it must have in common, by the recipe's dotted names.

    Left out is what does not change the maths: strategy, world size, micro-batch, gradient checkpointing.
    """
    training, low_rank = recipe.training, recipe.low_rank
    return {
        **model_identity(recipe),
        **_lora_identity(recipe),
        **({"data": content_digest(recipe)} if with_data else {}),
        "training.train_only": training.train_only or None,
        "training.optim_args": low_rank and low_rank.model_dump(mode="json"),
        "training.optim_target_modules": training.optim_target_modules if low_rank else None,
        "training.loss_type": training.loss_type if training.loss_type != "nll" else None,
        **{
            f"training.{name}": getattr(training, name)
            for name in (
                "optim",
                "global_batch_size",
                "max_steps",
                "num_train_epochs",
                "learning_rate",
                "lr_scheduler_type",
                "warmup_ratio",
                "warmup_steps",
                "weight_decay",
                "max_grad_norm",
                "mixed_precision",
                "master_weights",
                "seed",
            )
        },
    }


def _lora_identity(recipe: Recipe) -> dict[str, Any]:
    if recipe.lora is None:
        return {"lora": None}
    fields = recipe.lora.model_dump(mode="json", exclude={"start_from"})
    # None for empty ones, so that a checkpoint of a version that did not have the field can be continued.
    if recipe.lora.init_lora_weights is True:
        fields.pop("init_lora_weights", None)
    return {f"lora.{name}": None if value in ({}, []) else value for name, value in fields.items()}


def differences(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What differs, by dotted name, in words."""
    found = {}
    for name in sorted(saved.keys() | now.keys()):
        before, after = (of.get(name, EARLIER.get(name)) for of in (saved, now))
        if before != after:
            hidden = name in ("data", "model.config", "model.weights")  # digests
            found[name] = "its content has changed" if hidden else f"was {before!r}, is {after!r}"
    return found


def is_fixed(name: str) -> bool:
    """Whether a checkpoint cannot continue with another value of this, not even with --force."""
    return any(name == fixed or name.startswith(f"{fixed}.") for fixed in FIXED)


def model_identity(recipe: Recipe) -> dict[str, Any]:
    """A hub id by name and revision; a folder, wherever it is, by its configuration and both ends of its weights."""
    model, folder = recipe.model, Path(recipe.model.name_or_path)
    found: dict[str, Any] = {"model.quantization": model.quantization}
    found |= {"model.eos_token": model.eos_token, "model.add_tokens": model.add_tokens or None}
    if not folder.is_dir():
        return found | {"model.name_or_path": model.name_or_path, "model.revision": model.revision}
    import hashlib

    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = file.seek(0, 2)
            digest.update(f"{path.name} {size} ".encode())
            for start in (0, max(0, size - SAMPLE)):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    config = folder / "config.json"
    found["model.config"] = file_digest(config).hex() if config.is_file() else None
    return found | {"model.weights": digest.hexdigest()}
