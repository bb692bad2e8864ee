"""Unmodified accelerate and transformers scripts get their strategy through the environment."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from running import distft
from tiny import Tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
WRAPPED = {
    "ddp": "DistributedDataParallel",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
    "fsdp": "FSDPLlamaForCausalLM",
}


def losses(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<!_)loss'?:? '?([0-9.]+)", text)]


@pytest.mark.parametrize(
    ("script", "strategy"),
    [
        *(("accelerate_loop.py", strategy) for strategy in ("ddp", "zero2", "fsdp")),
        *(("trainer_script.py", strategy) for strategy in ("ddp", "zero3", "fsdp")),
    ],
)
def test_example(tiny: Tiny, tmp_path: Path, script: str, strategy: str) -> None:
    output = ["--output", str(tmp_path / "out")] if script == "trainer_script.py" else []
    arguments = ["--model", str(tiny.path / "model"), "--data", str(tiny.path / "text.jsonl"), "--steps", "3", *output]
    options = ["--gpus-per-node", "2", "--set", f"parallelism.strategy={strategy}"]
    done = distft("launch", *options, "--", str(EXAMPLES / script), *arguments, cwd=tmp_path)
    log = distft("logs", Path(script).stem, cwd=tmp_path).stdout
    assert done.returncode == 0, done.stderr + log
    assert f"model: {WRAPPED[strategy]}, 2 processes" in log
    found = losses(log)
    assert len(found) == 3
    assert found[0] > found[-1] > 0


def test_arguments_reach_the_script_as_they_are(tmp_path: Path) -> None:
    hostile = ["a b", "$(touch pwned)", "it's", 'a"b', "new\nline", "ümläut", "--", "-x", "*", "\\"]
    (tmp_path / "my script.py").write_text("import sys, json\nprint(json.dumps(sys.argv[1:]))\n")
    done = distft("launch", "--gpus-per-node", "2", "--", "my script.py", *hostile, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(distft("logs", "my-script", cwd=tmp_path).stdout.splitlines()[-1]) == hostile
    assert json.dumps(hostile) in done.stdout.splitlines()  # shown while it ran
    # It is no training as far as anybody can tell: that is said.
    said = "warning: the plan is ddp on 2 ranks, but the script made no Accelerator"
    assert done.stdout.count(said) == 1 and "each rank ran alone" in done.stdout
    assert not (tmp_path / "pwned").exists()
    assert not list((tmp_path / "runs" / "my-script").glob("pwned"))


def test_a_module(tmp_path: Path) -> None:
    """As `python -m`: from the current folder, with its package."""
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "other.py").write_text("VALUE = 7\n")
    (package / "train.py").write_text(
        "import sys\nfrom .other import VALUE\nif __name__ == '__main__':\n    print(VALUE, __package__, sys.argv)\n"
    )
    done = distft("launch", "--", "-m", "pkg.train", "--a", "-m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"7 pkg ['{package / 'train.py'}', '--a', '-m']" in done.stdout
    assert "warning" not in done.stdout  # on one rank there is nothing to share
    assert (tmp_path / "runs" / "train").is_dir()


def test_a_script_that_exits_by_itself(tmp_path: Path) -> None:
    """argparse's refusal is in the rank's log alone: it is shown, and not torchrun's summary."""
    (tmp_path / "own.py").write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--output', required=True)\n"
        "parser.parse_args()\n"
    )
    done = distft("launch", "--gpus-per-node", "2", "--", "own.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "own.py: error: the following arguments are required: --output" in done.stderr
    assert "exited by itself with status 2" in done.stderr
    assert "To enable traceback" not in done.stderr


def test_a_script_that_ends_its_process(tmp_path: Path) -> None:
    """No hook sees it: the number is in torchrun's summary, not the error of the rank that lost it."""
    (tmp_path / "own.py").write_text(
        "import os, time\nprint('so far', flush=True)\nif os.environ['RANK'] == '1':\n    os._exit(5)\n"
        "time.sleep(2)\nraise RuntimeError('Connection closed by peer')\n"
    )
    done = distft("launch", "--gpus-per-node", "2", "--", "own.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "rank 1 ended by itself with status 5" in done.stderr
    status = json.loads((tmp_path / "runs" / "own" / "status.json").read_text())
    assert status["reason"] == "rank 1 ended by itself with status 5"


def test_an_abort_in_a_dying_interpreter(tmp_path: Path) -> None:
    """As of gloo's threads: a script that ended well has ended well; its exit handlers run, its output is whole."""
    (tmp_path / "own.py").write_text(
        "import atexit, os, sys\nclass Aborts:\n    def __del__(self, abort=os.abort):\n        abort()\n"
        "sys.kept = Aborts()\natexit.register(sys.stdout.write, 'the handler ran')\n"
    )
    done = distft("launch", "--gpus-per-node", "2", "--", "own.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert "the handler ran" in distft("logs", "own", "--rank", rank, cwd=tmp_path).stdout


def test_a_script_in_the_recipes_place(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("print(1)\n")
    done = distft("launch", "own.py", cwd=tmp_path)
    assert done.returncode == 2 and "own.py is a script: put -- before it" in done.stderr
    assert not (tmp_path / "runs").exists()
