"""What stands after `--`: a script of one's own, in any of the forms in which people start one."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from distft.config.paths import near
from distft.config.recipe import run_name
from distft.errors import RecipeError
from distft.shell import command_line

# Programs that start the ranks themselves, as distft does.
LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "torch.distributed.run", "torch.distributed.launch")
TRL = ("sft", "dpo", "kto", "reward", "grpo", "rloo", "distillation")  # `trl NAME` is `accelerate launch` of a module
PYTHON = re.compile(r"python[\d.]*")


@dataclass(frozen=True)
class ScriptCommand:
    """A script and its arguments as every rank runs them: PATH ARGS..., or -m MODULE ARGS... `name` is the run's."""

    words: tuple[str, ...]
    name: str


def script_command(words: Sequence[str], here: bool = True) -> ScriptCommand:
    """The command after `--`. `here`: it runs on this machine, so a module that is missing is missing there.

    Raises:
        RecipeError: nothing that the ranks can run; the message has the form that works.
    """
    first, rest = words[0], list(words[1:])
    program = Path(first).name
    if PYTHON.fullmatch(program):
        return _without_python(first, rest, here)
    if program in LAUNCHERS or (first == "-m" and rest[:1] and rest[0] in LAUNCHERS):
        raise RecipeError(
            f"script: {rest[0] if first == '-m' else program} starts the ranks itself, and so does distft; leave it "
            f"out, and its options: distft launch --gpus-per-node N -- {_script_in(rest)}"
        )
    if first == "-m":
        return _module(rest, here)
    if program == "trl" and rest[:1] and rest[0] in TRL:
        return ScriptCommand(("-m", f"trl.scripts.{rest[0]}", *rest[1:]), f"trl-{rest[0]}")
    path = first if Path(first).is_file() else None if "/" in first else shutil.which(first)
    if path is None:
        raise RecipeError(f"script: no such file: {first}{_near(first)}")
    if not (path.endswith(".py") or _is_python(Path(path))):
        raise RecipeError(
            f"script: {first} is no Python program; name the Python script that it starts: distft launch ... -- "
            "SCRIPT.py ARGS, or -- -m MODULE ARGS"
        )
    return ScriptCommand((path, *rest), run_name(Path(path).stem, "script"))


def _without_python(python: str, rest: list[str], here: bool) -> ScriptCommand:
    """`python x.py` and `python -m x`: the ranks' Python is distft's, or the one that the cluster's profile names."""
    while rest and rest[0] == "-u":  # the ranks' output is unbuffered anyway
        rest = rest[1:]
    if "/" in python and here and Path(python).resolve() != Path(sys.executable).resolve():
        raise RecipeError(
            f"script: {python} is another Python than distft's, which the ranks run with ({sys.executable}); install "
            "distft there and start it from there"
        )
    if not rest or (rest[0].startswith("-") and rest[0] != "-m"):
        got = f"got {command_line([python, *rest[:1]])}; " if rest else ""
        raise RecipeError(f"script: {got}give python a script or -m MODULE: -- SCRIPT.py ARGS")
    return script_command(rest, here)


def _module(rest: list[str], here: bool) -> ScriptCommand:
    if not rest or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", rest[0]):
        raise RecipeError(f"script: got -m {' '.join(rest[:1])}, need the name of a module: -m package.module ARGS")
    if here and (problem := _missing(rest[0])):
        raise RecipeError(f"script: -m {rest[0]}: {problem}")
    return ScriptCommand(("-m", *rest), run_name(rest[0].rpartition(".")[2], "script"))


def _missing(module: str) -> str | None:
    """Why `python -m module` would not start. Imports nothing: a package may take seconds."""
    where: Sequence[str] | None = ["", *sys.path]  # as python -m
    top, *parts = module.split(".")
    spec = PathFinder.find_spec(top, where) or importlib.util.find_spec(top)
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            break
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    if spec is None or (parts and spec.name != parts[-1]):
        return "there is no such module here"
    inside = spec.submodule_search_locations
    if inside is not None and not PathFinder.find_spec("__main__", list(inside)):
        return "a package without __main__.py cannot be run; name a module in it"
    return None


def _script_in(words: Sequence[str]) -> str:
    """The script among the words of a launcher, with its arguments."""
    for number, word in enumerate(words):
        if word.endswith(".py"):
            return command_line(words[number:])
        if word in ("-m", "--module") and number + 1 < len(words) and words[number + 1] not in LAUNCHERS:
            return command_line(["-m", *words[number + 1 :]])
    return "SCRIPT.py ARGS"


def _is_python(path: Path) -> bool:
    """Whether a program is a Python script, by its first lines: pip writes `#!/bin/sh` where Python's path is long."""
    with path.open("rb") as file:
        head = file.read(300)
    return head.startswith(b"#!") and b"python" in b"".join(head.splitlines()[:2])


def _near(name: str) -> str:
    """What else a word could be that names no file."""
    if "/" in name or name.endswith(".py"):
        return near(Path(name))
    module = f"; a module is named with -m: -- -m {name}" if re.fullmatch(r"\w+(\.\w+)+", name) else ""
    return f", and no program of that name on PATH{module}"
