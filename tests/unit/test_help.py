"""The help of every command: all of it is there, and the list of commands has whole sentences."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from distft.cli import COMMANDS, main

COMMAND_LINES = [[name] for name in COMMANDS] + [["cluster", "init"], ["cluster", "check"], ["slurm", "template"]]


def shown(*arguments: str) -> str:
    done = CliRunner().invoke(main, [*arguments, "-h"], terminal_width=80)
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("group", [[], ["cluster"], ["slurm"]], ids=["distft", "cluster", "slurm"])
def test_the_list_of_commands_cuts_no_sentence(group: list[str]) -> None:
    listed = shown(*group).partition("Commands:\n")[2].splitlines()
    assert listed
    assert [line for line in listed if not line.endswith(".")] == []
    assert [line for line in listed if line.endswith("...")] == []


@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_every_option_is_explained(words: list[str]) -> None:
    command: click.Command = main
    for word in words:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found is not None
        command = found
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []
    text = shown(*words)
    assert all(option.opts[0] in text for option in options)
    assert command.help and command.help.partition("\n")[0].endswith(".")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data"], "distft data: missing argument 'RECIPE'; write distft data [OPTIONS] RECIPE"),
        (["data", "a", "b"], "distft data: got unexpected extra argument (b); write distft data [OPTIONS] RECIPE"),
        (["data", "a", "--row", "0"], "distft data: --row: got 0, need >= 1"),
        (
            ["plan", "a", "--nproc-per-node", "x"],
            "distft plan: --gpus-per-node / --nproc-per-node: got x, need an integer",
        ),
        (["plan", "a", "--node", "1"], "distft plan: no such option '--node'; did you mean '--nodes'?"),
        (["plan", "a", "--zzz"], "distft plan: no such option '--zzz'; distft plan -h lists them"),
        (["--qqq"], "distft: no such option '--qqq'; distft -h lists them"),
        (["logs", "x", "--rank"], "option '--rank' requires an argument"),
        (["planx"], "distft: no such command 'planx'; did you mean plan?"),
        (["cluster", "qqq"], "distft cluster: no such command 'qqq'; those are check, init"),
        (["launch"], "distft launch: give a RECIPE, or a script after --"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_line_that_is_wrong_is_one_line(words: list[str], expected: str) -> None:
    done = CliRunner().invoke(main, words, prog_name="distft")
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"error: {expected}\n")
