"""The command line of a training script, as words or in a shell script → its options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from distft.errors import RecipeError

MOST_VALUES = 64  # of one option
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_ASSIGNMENT = re.compile(r"(?:export\s+)?(\w+)=(.*)", re.DOTALL)
_SCRIPT = re.compile(r"(.*/)?sft[\w-]*\.py")
_LAUNCHERS = ("python", "python3", "accelerate", "torchrun", "trl", "uv", "deepspeed")


@dataclass(frozen=True)
class Command:
    """The script's options, and what the launcher's say: `config_file` of accelerate, and how many processes."""

    options: dict[str, Any]
    processes: int | None = None
    config_file: str | None = None


def is_command(words: Sequence[str]) -> bool:
    """Whether it runs TRL's SFT: `trl sft …`, or a script named sft….py through any launcher."""
    return ("sft" in words[:2] and words[0] == "trl") or any(_SCRIPT.fullmatch(word) for word in words)


def find_command(text: str, name: str) -> list[str]:
    """The words of the command that trains, in a shell script. Its plain assignments are filled in.

    Raises:
        RecipeError: there is none or several, or it uses what only a shell knows.
    """
    found: list[list[str]] = []
    variables: dict[str, str] = {}
    for words in _lines(text, name):
        start = next((n for n, word in enumerate(words) if not _ASSIGNMENT.fullmatch(word)), len(words))
        assigned = {match[1]: match[2] for match in map(_ASSIGNMENT.fullmatch, words) if match}
        if start == len(words) or words[0] == "export":
            variables |= {key: _filled(value, variables) for key, value in assigned.items()}
        elif is_command([_filled(word, variables) for word in words[start:]]):
            found.append([word for part in words[start:] for word in _expanded(part, variables, name)])
    if not found:
        raise RecipeError(f"{name}: no command in it runs `trl sft` or a script sft.py")
    if len(found) > 1:
        raise RecipeError(f"{name}: {len(found)} commands in it train; give one after --")
    return found[0]


def _lines(text: str, name: str) -> Iterator[list[str]]:
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # a string over several lines: not the command
        if words:
            yield words


def _filled(text: str, variables: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], match[0]), text)


def _expanded(word: str, variables: Mapping[str, str], name: str) -> list[str]:
    """A word with its variables; one that is nothing but a variable may be several words."""
    if word in ("$@", "${@}", "$*"):
        return []
    filled = _filled(word, variables)
    if left := re.search(r"\$[\w{(@]|`", filled):
        raise RecipeError(f"{name}: {filled[left.start() :]} has a value only when it runs; write the value")
    return filled.split() if _VARIABLE.fullmatch(word) else [filled]


def parse(words: Sequence[str], where: str) -> Command:
    """The options of a command.

    Raises:
        RecipeError: it does not run TRL's SFT.
    """
    if not is_command(words):
        raise RecipeError(
            f"{where}: not a command that trains; need `trl sft …`, or a launcher ({', '.join(_LAUNCHERS)}) and sft.py"
        )
    script = next((n for n, word in enumerate(words) if _SCRIPT.fullmatch(word)), None)
    at = script if script is not None else list(words).index("sft")
    launcher, _ = _read(words[:at])
    options, loose = _read(words[at + 1 :])
    if script is None:
        # `trl sft` passes what accelerate knows on to it (trl/cli/accelerate.py, resolve_accelerate_config_argument).
        launcher |= {key: options.pop(key) for key in ("num_processes", "accelerate_config") if key in options}
    if loose:
        raise RecipeError(f"{where}: {loose[0]} belongs to no option")
    number = launcher.get("num_processes", launcher.get("nproc_per_node", launcher.get("num_gpus")))
    nodes = launcher.get("nnodes", 1) if "nproc_per_node" in launcher else 1
    config = launcher.get("config_file", launcher.get("accelerate_config"))
    processes = number * nodes if isinstance(number, int) and isinstance(nodes, int) else None
    return Command(options, processes, str(config) if config is not None else None)


def _read(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """`--name value`, `--name=value`, `--name` (true), `--name a b` (a list); and words before the first option."""
    found: dict[str, list[str]] = {}
    loose: list[str] = []
    name: str | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            name = key.replace("-", "_")
            found[name] = [value] if equals else []
        elif name is None:
            loose.append(word)
        elif len(found[name]) < MOST_VALUES:
            found[name].append(word)
    options: dict[str, Any] = {}
    for key, values in found.items():
        if key.startswith("no_") and not values:
            options[key[3:]] = False  # HfArgumentParser's --no_bf16
        else:
            options[key] = [_value(v) for v in values] if len(values) > 1 else _value(values[0]) if values else True
    return options, loose


def _value(text: str) -> Any:
    """A word as a number, a boolean, a mapping in JSON, or as it is."""
    if text in ("True", "False"):
        return text == "True"
    if re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?", text):
        return float(text)
    if text.startswith("{"):
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            return text
        return value if isinstance(value, dict) else text
    return text
