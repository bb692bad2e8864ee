"""What may stand after `--`: the forms in which people start a script."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distft.errors import RecipeError
from distft.jobs.script import script_command
from distft.train.imports import AfterImport


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with scripts, a package and programs, which is the current one and on PATH."""
    (tmp_path / "my script.py").write_text("")
    (tmp_path / "x.py").write_text("")
    for name in ("pkg", "runs_itself", "pkg/inner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('it was imported')")
    (tmp_path / "pkg" / "inner" / "train.py").write_text("")
    (tmp_path / "runs_itself" / "__main__.py").write_text("")
    starts = {
        "tool": f"#!{sys.executable}\n",
        "long": f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\"\n",
        "run.sh": "#!/bin/bash\n",
    }
    (tmp_path / "bin").mkdir()
    for name, text in starts.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "words", "name"),
    [
        ("x.py --a -m 1", "x.py --a -m 1", "x"),
        ("my script.py|--a", "my script.py|--a", "my-script"),
        ("python x.py --a", "x.py --a", "x"),
        ("python3.11 -u x.py", "x.py", "x"),
        (f"{sys.executable} -m pkg.inner.train -u", "-m pkg.inner.train -u", "train"),
        ("-m pkg.inner.train --a", "-m pkg.inner.train --a", "train"),
        ("-m runs_itself", "-m runs_itself", "runs_itself"),
        ("trl sft --config c.yaml", "-m trl.scripts.sft --config c.yaml", "trl-sft"),
        ("/opt/bin/trl dpo", "-m trl.scripts.dpo", "trl-dpo"),
        ("tool a", "{}/bin/tool a", "tool"),
        ("long", "{}/bin/long", "long"),
    ],
)
def test_taken(folder: Path, given: str, words: str, name: str) -> None:
    command = script_command(given.split("|" if "|" in given else " "))
    assert command.words == tuple(words.replace("{}", str(folder)).split("|" if "|" in words else " "))
    assert command.name == name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("torchrun --nproc-per-node 2 x.py --a b", "its options: distft launch --gpus-per-node N -- x.py --a b"),
        ("accelerate launch --num_processes 2 -m pkg.inner.train --a", "-- -m pkg.inner.train --a"),
        ("python -m torch.distributed.run --nproc-per-node 2 x.py", "torch.distributed.run starts the ranks itself"),
        ("deepspeed --num_gpus 2 x.py", "-- x.py"),
        ("run.sh", "run.sh is no Python program"),
        ("absent.py", "script: no such file: absent.py"),
        ("absent", "no such file: absent, and no program of that name on PATH"),
        ("pkg.inner.train", "a module is named with -m: -- -m pkg.inner.train"),
        ("-m", "need the name of a module"),
        ("-m ../x", "need the name of a module"),
        ("-m pkg.absent", "-m pkg.absent: there is no such module here"),
        ("-m absent", "there is no such module here"),
        ("-m pkg", "without __main__.py"),
        ("python", "give python a script"),
        ("python -c 1", "got python -c; give python a script or -m MODULE"),
        ("/usr/lib/other/python x.py", "is another Python than distft's"),
    ],
)  # fmt: skip
def test_refused(given: str, said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        script_command(given.split())
    assert said in str(raised.value)


def test_a_module_that_only_the_nodes_have() -> None:
    assert script_command(["-m", "absent.train"], here=False).name == "train"
    assert script_command(["/opt/conda/bin/python", "x.py"], here=False).words == ("x.py",)


def test_actions_after_an_import(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "late.py").write_text("value = 1")
    monkeypatch.syspath_prepend(str(folder))
    imports, seen = AfterImport(), []
    try:
        imports.add("late", lambda module: seen.append(module.value))
        imports.add("sys", lambda module: seen.append(module is sys))
        assert seen == [True]
        import late  # noqa: F401

        assert seen == [True, 1]
    finally:
        sys.meta_path.remove(imports)
        sys.modules.pop("late", None)
