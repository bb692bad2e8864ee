"""Which tool a file is for, by its keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distft.config.document import MAX_BYTES
from distft.config.paths import near
from distft.config.recipe import run_name
from distft.config.schema_text import Steps
from distft.errors import RecipeError
from distft.importers import (
    accelerate,
    axolotl,
    command_line,
    llama_factory,
    llama_factory_v1,
    sharding,
    tokens,
    torchtune,
    trl,
)
from distft.importers.draft import Draft, Left
from distft.importers.options import Options, read_yaml
from distft.shell import quote

Reader = Callable[[Options], None]
_NAMES = ("axolotl", "LLaMA-Factory", "TRL", "torchtune", "accelerate")


def kind_of(data: Mapping[str, Any]) -> str | None:
    """The tool, or None."""
    keys = set(data)
    if torchtune.is_torchtune(data):
        return "torchtune"
    if "base_model" in keys:
        return "axolotl"
    if "model_name_or_path" in keys and keys & _LLAMA_FACTORY:
        return "LLaMA-Factory"
    if "model_name_or_path" in keys and keys & trl.KEYS:
        return "TRL"
    if isinstance(data.get("model"), str) and keys & llama_factory_v1.KEYS:
        return llama_factory_v1.NAME
    if len(keys & accelerate.KEYS) > 1:
        return "accelerate"
    return None


def is_recipe(data: Mapping[str, Any]) -> bool:
    model = data.get("model")
    return isinstance(model, dict) and "name_or_path" in model


def other_file(name: str, data: Mapping[str, Any]) -> str | None:
    """What a YAML or JSON file is that is no recipe, by its keys, and which command takes it; None where that is not
    known."""
    file = quote(name)
    if is_recipe(data):
        return None
    if kind := kind_of(data):
        return f"{name}: a file of {kind}'s, and no recipe; make one of it with: distft import {file}"
    if "runs_dir" in data:
        return f"{name}: a site profile; it goes with a recipe: distft plan RECIPE --cluster {file}"
    if {"model_type", "architectures"} & data.keys():
        return f"{name}: a model's config; a recipe names its folder in model.name_or_path"
    if "zero_optimization" in data:
        return f"{name}: a DeepSpeed config; a recipe says parallelism.strategy, and deepspeed.overrides for the rest"
    return None


_LLAMA_FACTORY = {"stage", "finetuning_type", "template", "cutoff_len", "dataset_dir", "do_train"}
_READERS: dict[str, Reader] = {
    "axolotl": axolotl.read,
    "LLaMA-Factory": llama_factory.read,
    llama_factory_v1.NAME: llama_factory_v1.read,
    "TRL": trl.read,
    "torchtune": torchtune.read,
    "accelerate": accelerate.read,
}
KINDS = tuple(_READERS)


def read_command(words: Sequence[str], target: Path, gpus: int | None = None, stem: str = "recipe") -> Draft:
    """Import the command line of TRL's SFT. Arguments: see Draft.

    Raises:
        RecipeError: it is not one, or a file that it names cannot be read.
    """
    return _command(words, Draft("TRL", Path("command"), target, gpus, stem))


def read_file(path: Path, target: Path, gpus: int | None = None, stem: str = "recipe") -> Draft:
    """Import a file for a recipe in the folder `target`. Arguments: see Draft.

    Raises:
        RecipeError: it cannot be read, or is none of these tools'.
    """
    if path.suffix in (".sh", ".bash", ".sbatch", ".slurm"):
        return _command(command_line.find_command(_text(path), path.name), Draft("TRL", path, target, gpus, stem))
    document = read_yaml(path)
    kind = kind_of(document.data)
    if kind is None:
        if is_recipe(document.data):
            check = f"distft validate {quote(str(path))}"
            raise RecipeError(f"{path}: a recipe of distft's already; check it with: {check}")
        if text := other_file(str(path), document.data):
            raise RecipeError(text)
        raise RecipeError(
            f"{path}: not a training file of {', '.join(_NAMES[:-1])} or {_NAMES[-1]}, by its keys: "
            f"{', '.join(list(document.data)[:6])}{', ...' * (len(document.data) > 6)}"
        )
    draft = Draft(kind, path, target, gpus, stem)
    draft.fields["name"] = run_name(path.stem, "imported")
    if kind == trl.NAME:
        _trl(draft, document.data, document.places, {})
    else:
        _READERS[kind](Options(draft, document.data, document.places))
    return _finished(draft)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode("utf-8")
    except OSError as error:
        hint = near(path) if isinstance(error, FileNotFoundError) else ""
        raise RecipeError(f"cannot read {path}: {(error.strerror or str(error)).lower()}{hint}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"cannot read {path}: not a text file in UTF-8") from None


def _command(words: Sequence[str], draft: Draft) -> Draft:
    """TRL's options on the command line win over those in its --config; accelerate's config says how many GPUs."""
    command = command_line.parse(words, draft.file.name)
    data, draft.gpus = dict(command.options), draft.gpus or command.processes
    lines: dict[Steps, Any] = {}
    if isinstance(config := data.pop("config", None), str):
        path = draft.locate(config)
        if path is None:
            raise RecipeError(f"--config: no such file: {config}{draft.near(config)}")
        document = read_yaml(path)
        lines = {steps: line for steps, line in document.places.items() if steps and steps[0] not in data}
        data = document.data | data
        draft.file = path
    draft.fields["name"] = run_name(draft.file.stem, "imported")
    for name, value in command.others.items():
        draft.dropped.append(Left(f"--{name}", value, "torchrun and SLURM start the ranks"))
    _trl(draft, data, lines, command.launcher)
    return _finished(draft)


def _trl(draft: Draft, data: Mapping[str, Any], lines: Mapping[Steps, Any], launcher: Mapping[str, Any]) -> None:
    """TRL's options. Those that are accelerate's, and not TRL's, are its launcher's (trl/cli/commands/training.py)."""
    passed = {name: value for name, value in data.items() if accelerate.is_launchers(name)}
    if passed or launcher:
        _launcher(draft, {**passed, **launcher})
    trl.read(Options(draft, {name: value for name, value in data.items() if name not in passed}, lines))


def _finished(draft: Draft) -> Draft:
    """What follows from several options together."""
    tokens.add_missing(draft)
    sharding.leave_to_distft(draft)
    return draft


def _launcher(draft: Draft, options: Mapping[str, Any]) -> None:
    """Options of accelerate's launcher, with its config: how the states are sharded, and on how many GPUs."""
    said, path, config = dict(options), draft.file, {}
    name = next((name for name in ("config_file", "accelerate_config") if name in said), None)
    if name is not None:
        text = str(said.pop(name))
        found = draft.locate(text)
        if found is not None:
            path, config = found, read_yaml(found).data
        elif name == "accelerate_config" and text in trl.ACCELERATE_CONFIGS:
            config = trl.ACCELERATE_CONFIGS[text]
        else:
            draft.warn(f"--{name}: {text} is not here{draft.near(text)}; parallelism is left to distft")
    part = Draft("accelerate", path, draft.target)
    data = accelerate.config_of(said, config)
    accelerate.read(Options(part, data))
    said_here = ("parallelism.", "training.compile")
    draft.fields |= {name: value for name, value in part.fields.items() if name.startswith(said_here)}
    for item in part.mapped:
        if item.field is None or item.field.startswith(said_here):
            draft.mapped.append(item)
        else:
            draft.dropped.append(Left(item.option, item.value, "TRL's own arguments go before it", item.line))
    draft.dropped += part.dropped
    draft.refused += part.refused
    draft.problems += part.problems
    draft.warnings += part.warnings
    draft.cluster = part.cluster
    # Under NO a config's other processes do not start (commands/launch.py, simple_launcher).
    processes = 1 if config and data.get("distributed_type") == "NO" else data.get("num_processes")
    if draft.gpus is None and isinstance(processes, int) and processes > 0:
        draft.gpus = processes
