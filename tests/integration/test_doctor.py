"""doctor: what it says of this machine, of a broken one and of a light install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from light_install import light
from running import distft

from distft import extras

RAISES = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEa\\nmore')"
FUNCTION = "__version__ = '2.8.0'\ndef flash_attn_func(q, k, v, causal):\n    "
SDPA = """import torch.nn.functional as F
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)"""


def fake(folder: Path, text: str) -> dict[str, str]:
    """An environment with a flash_attn of this text."""
    (folder / "flash_attn.py").write_text(text + "\n")
    return {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}


def test_this_machine(tmp_path: Path) -> None:
    done = distft("doctor", "--json", cwd=tmp_path, env={"HF_TOKEN": "hf_never-shown"})
    assert done.returncode == 0, done.stdout
    answer = json.loads(done.stdout)
    assert answer["ok"] is True
    states = {check["name"]: check["state"] for check in answer["checks"]}
    said = [check["text"] for check in answer["checks"]]
    packages = [name for name, _ in extras.requirements()]
    assert len(packages) == 10
    assert {f"{name} {metadata.version(name)}" for name in packages} <= {*said}
    for name in ("imports", "products", "bitsandbytes", "all-reduce", "cache", "hub", "hub token"):
        assert states[name] == "ok", answer
    assert "hub token: found in HF_TOKEN" in " ".join(said)
    assert "hf_never-shown" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_a_broken_package_hides_nothing(tmp_path: Path) -> None:
    env = {"COLUMNS": "80", "DISTFT_CACHE": "/tmp/distft-doctor"}
    done = distft("doctor", cwd=tmp_path, env=fake(tmp_path, RAISES) | env)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    text = done.stdout.replace("\n  ", " ")
    assert "failed: flash-attn: ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c104" in text
    assert f"ok: torch {metadata.version('torch')}\n" in text
    assert "ok: all-reduce over " in text
    assert "flash-attn" in lines[-1] and lines[-1].startswith("to fix: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "state", "said"),
    [
        (FUNCTION + SDPA, "ok", "flash-attn 2.8.0: agrees with SDPA"),
        (FUNCTION + "raise RuntimeError('no kernel image is available')", "failed", "RuntimeError: no kernel image is"),
        (FUNCTION + "return v", "failed", "flash-attn 2.8.0: differs from SDPA by "),
        (FUNCTION + "import os; os.kill(os.getpid(), 11)", "failed", "killed by SIGSEGV"),
        (RAISES, "failed", "ImportError: flash_attn_2_cuda.so: undefined symbol"),
        ("raise ImportError('libcuda.so.1: cannot open shared object file')", "absent", "needs a GPU to be tried"),
    ],
    ids=["works", "raises", "wrong numbers", "crashes", "not imported", "needs a GPU"],
)
def test_flash_attention_is_run(tmp_path: Path, text: str, state: str, said: str) -> None:
    import torch

    if state == "absent" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    program = "import torch; from distft.diagnostics import doctor; print(*doctor.apart(doctor.flash_attention))"
    env = {**os.environ, **fake(tmp_path, text)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith(f"{state} flash-att"), done.stderr
    assert said in done.stdout


def test_a_light_install(light_site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_CACHE", "/proc/cache")
    monkeypatch.setenv("COLUMNS", "80")
    done = light(light_site, "doctor", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    text = done.stdout.replace("\n  ", " ")
    assert "\nmissing: torch, transformers, " in text
    assert ': pip install "distft[train]"\n' in text
    assert "failed: cache /proc/cache: /proc is not writable" in text
    assert text.endswith("to fix: distft[train], cache\n")
    answer = json.loads(light(light_site, "doctor", "--json", cwd=tmp_path).stdout)
    assert answer["ok"] is False
    assert answer["checks"][0]["name"] == "python"


def test_what_needs_a_cluster(tmp_path: Path) -> None:
    done = distft("doctor", "--nodes", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert "--nodes needs --cluster PROFILE" in done.stderr
