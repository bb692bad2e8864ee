"""The command line of a training script, as words or in a shell script → its options."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.errors import RecipeError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_ASSIGNMENT = re.compile(r"(?:export\s+)?(\w+)=(.*)", re.DOTALL)
_SCRIPT = re.compile(r"(.*/)?sft[\w-]*\.py|trl\.scripts\.sft")
_LAUNCHERS = ("python", "python3", "accelerate", "torchrun", "trl", "uv", "deepspeed")
_COMMENT = re.compile(r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.)|(?:(?<=\s)|^)#.*""")
# What says on how many GPUs a launcher starts it; torchrun's and DeepSpeed's are by node.
_PER_NODE = {"nproc_per_node": "nnodes", "num_gpus": "num_nodes"}


@dataclass(frozen=True)
class Command:
    """The script's options, and what the launcher's say.

    Args:
        launcher: options of accelerate's launcher.
        others: options of another launcher, but for the number of processes.
    """

    options: dict[str, Any]
    launcher: dict[str, Any]
    others: dict[str, Any]
    processes: int | None = None


def is_command(words: Sequence[str]) -> bool:
    """Whether it runs TRL's SFT: `trl sft …`, or a script named sft….py through any launcher."""
    return _script(words) is not None


def _script(words: Sequence[str]) -> int | None:
    """The place of the word after which the script's options stand."""
    for n, word in enumerate(words):
        if _SCRIPT.fullmatch(word) or (word == "sft" and n and re.fullmatch("(.*/)?trl", words[n - 1])):
            return n
    return None


def find_command(text: str, name: str) -> list[str]:
    """The words of the command that trains, in a shell script. Its plain assignments are filled in.

    Raises:
        RecipeError: there is none or several, or it uses what only a shell knows.
    """
    found: list[list[str]] = []
    variables: dict[str, str] = {}
    for words in _commands(text, name):
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


def _commands(text: str, name: str) -> Iterator[list[str]]:
    """The words of each command. Where its output goes is left out."""
    text = "\n".join(_COMMENT.sub(lambda match: match[1] or "", line) for line in text.splitlines())
    for line in re.sub(r"\\\n", " ", text).splitlines():
        lexer = shlex.shlex(re.sub(r"(?<=\s)[0-9](?=>)", "", line), posix=True, punctuation_chars=";<>|&")
        lexer.whitespace_split, lexer.commenters = True, ""
        try:
            tokens = list(lexer)
        except ValueError:
            continue  # a string over several lines: not the command
        if tokens and tokens[0].startswith("--"):
            raise RecipeError(
                f"{name}: a line begins with {tokens[0]}, and the command ends above it: lines go on after a "
                "backslash at their end, and not after a comment or an empty line"
            )
        words: list[str] = []
        is_file = False  # behind > or <
        for token in tokens:
            if is_file or re.fullmatch("[;<>|&]+", token):
                if not is_file and not set(token) & set("<>"):
                    yield words
                    words = []
                is_file = not is_file and bool(set(token) & set("<>"))
            else:
                words.append(token)
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
    at = _script(words) or 0
    options, loose = _read(words[at + 1 :])
    if loose:
        raise RecipeError(f"{where}: {loose[0]} belongs to no option")
    launch = max((n for n, word in enumerate(words[:at]) if word.split("/")[-1] in ("accelerate", "trl")), default=None)
    before, _ = _read(words[: at if launch is None else launch])
    if launch is not None:
        return Command(options, _read(words[launch:at])[0], before)
    processes = None
    for number, nodes in _PER_NODE.items():
        count, of = before.pop(number, None), before.pop(nodes, 1)
        processes = count * of if isinstance(count, int) and isinstance(of, int) else processes
    return Command(options, {}, before, processes)


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
        elif name is None or re.fullmatch("-[a-zA-Z]", word):
            name = None
            loose.append(word)
        else:
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
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return value if isinstance(value, dict) else text
    return text
