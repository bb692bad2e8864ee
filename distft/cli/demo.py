"""`make demo`: the quickstart, its fine-tuning, and the result.

python -m distft.cli.demo DIR [--gpus-per-node N]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

from distft.cli import reporting_errors
from distft.cli.options import RANKS
from distft.errors import RunError


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@RANKS
def demo(folder: Path, gpus_per_node: int | None) -> None:
    """Build the quickstart in FOLDER unless it exists, fine-tune it, and show one sample before and after."""
    from rich.console import Console

    from distft.commands import launch
    from distft.jobs.target import Target, plan_recipe
    from distft.quickstart.build import build
    from distft.views.progress import say

    console = Console()
    with reporting_errors():
        if not (folder / "base").exists():
            build(folder, gpus_per_node, console)
        say(console, ["", "2. fine-tune it with LoRA to describe a signature in one line"])
        sets = [f"output_dir={json.dumps(str(folder / 'runs'))}"]
        recipe, plan = plan_recipe(
            str(folder / "recipe.yaml"), sets, Target(gpus_per_node=gpus_per_node), for_launch=True
        )
        run = launch.RecipeLaunch(recipe, plan).start(console)
        say(console, ["", "3. one held-out row, before and after"])
        command = [sys.executable, "-m", "distft.quickstart.sample", str(folder), str(run.final)]
        shown = subprocess.run(command, capture_output=True, text=True)
        if shown.returncode:
            raise RunError(f"the adapter could not be tried:\n{shown.stderr.strip()}")
        say(console, shown.stdout.splitlines())
    base, adapter = (str(path.absolute()) for path in (folder / "base", run.final))
    say(
        console,
        [
            "",
            f"the adapter: {adapter}",
            "load it with:",
            "  from peft import PeftModel",
            "  from transformers import AutoModelForCausalLM",
            f"  base = AutoModelForCausalLM.from_pretrained({base!r})",
            f"  model = PeftModel.from_pretrained(base, {adapter!r})",
        ],
    )


if __name__ == "__main__":
    demo()
