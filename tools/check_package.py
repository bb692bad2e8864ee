"""Build sdist and wheel, install the wheel in an empty environment outside the tree, and use it as a login node would.

python tools/check_package.py    exit status 1 at the first thing that is wrong; prints the seconds of each part

Only the light dependencies are installed: a module that needs torch to start, a data file that the wheel lacks, or a
name that only the working tree has fails here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What distft reads at run time besides its modules, and the mark for type checkers.
DATA = (
    "distft/py.typed",
    "distft/planner/activations.txt",
    "distft/schedulers/templates/job.sbatch.jinja",
    "distft/quickstart/base.yaml",
    "distft/quickstart/recipe.yaml",
)
HEAVY = ("torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "bitsandbytes", "datasets")

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
RECIPE = """\
name: packaged
model: {name_or_path: model}
data: {train: train.jsonl}
training: {global_batch_size: 32, max_steps: 10}
"""
PROFILE = """\
runs_dir: /shared/runs
python: python3
node: {gpus_per_node: 4, gpu: H100}
"""
# For each command: what its standard output must hold.
COMMANDS = (
    (("--help",), "quickstart"),
    (("validate", "recipe.yaml", "--gpus-per-node", "1"), "valid"),
    (("plan", "recipe.yaml", "--gpus-per-node", "8", "--gpu", "h100-80gb", "--json"), '"schema"'),
    (("render", "recipe.yaml", "--gpus-per-node", "1", "-o", "local"), ""),
    (("render", "recipe.yaml", "--cluster", "site.yaml", "--nodes", "2", "-o", "slurm"), ""),
    (("rules",), "quantization-needs-lora"),
)
RENDERED = ("local/job.sh", "local/plan.json", "slurm/job.sbatch", "slurm/plan.json")


@contextmanager
def part(name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"  {name:<32} {time.monotonic() - began:>6.1f} s", flush=True)


def check(condition: bool, problem: str) -> None:
    if not condition:
        sys.exit(f"error: {problem}")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Standard output of a command that must succeed, in an environment without variables that lead to this tree."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DISTFT", "SLURM"))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env={**clean, **env}, capture_output=True, text=True)
    shown = f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    check(done.returncode == 0, shown)
    return done.stdout


def build(folder: Path) -> Path:
    """The wheel, built from the sdist as pip would do it.

    A copy of the files that git does not ignore is built: setuptools would add what an earlier build/ and *.egg-info
    in the working tree still name.
    """
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in sorted(set(listed.split("\0")) - {""}):
        if (ROOT / name).is_file():  # not deleted
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source", cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """All modules and data files are in both, and the wheel has nothing else (no tests, tools or benchmarks)."""
    needed = {*DATA, *(path.relative_to(ROOT).as_posix() for path in (ROOT / "distft").rglob("*.py"))}
    held = set(zipfile.ZipFile(wheel).namelist())
    check(needed <= held, f"the wheel lacks {', '.join(sorted(needed - held))}")
    strange = sorted(name for name in held if not name.startswith(("distft/", "distft-")))
    check(not strange, f"the wheel would write outside distft/ in site-packages: {', '.join(strange)}")
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed |= {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    check(needed <= held, f"the sdist lacks {', '.join(sorted(needed - held))}")
    # setuptools takes tests/test*.py by itself, without the conftest.py that they need.
    check("tests" not in held, "the sdist has a part of the tests")


def install(wheel: Path, folder: Path) -> Path:
    """The bin folder of an environment that holds the wheel and its light dependencies alone."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", wheel, cwd=folder)
    run(*pip, "check", cwd=folder)
    return python.parent


def use(bin_folder: Path, folder: Path) -> None:
    """Run the commands in a folder of their own, where nothing leads to the working tree."""
    folder.mkdir()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(LLAMA))
    (folder / "train.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n' * 64)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "site.yaml").write_text(PROFILE)
    env = {"HOME": str(folder), "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    code = f"import importlib.util as i, distft; print(distft.__file__, [n for n in {HEAVY} if i.find_spec(n)])"
    where, _, heavy = run(bin_folder / "python", "-c", code, cwd=folder, **env).strip().partition(" ")
    check(Path(where).is_relative_to(bin_folder.parent), f"distft was imported from {where}, not from the wheel")
    check(heavy == "[]", f"the light part brings {heavy}")
    for arguments, expected in COMMANDS:
        out = run(bin_folder / "distft", *arguments, cwd=folder, **env)
        check(expected in out, f"distft {' '.join(arguments)} does not print {expected!r}:\n{out}")
    for name in RENDERED:
        check((folder / name).is_file(), f"distft render wrote no {name}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="distft-package-") as name:
        folder = Path(name)
        with part("sdist and wheel are built"):
            wheel = build(folder)
        check_contents(wheel)
        with part("the wheel is installed"):
            bin_folder = install(wheel, folder)
        with part(f"{len(COMMANDS)} commands outside the tree"):
            use(bin_folder, folder / "work")


if __name__ == "__main__":
    main()
