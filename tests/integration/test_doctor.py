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
from distft.hardware.devices import visible_gpus

RAISES = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEa\\nmore')"
FUNCTION = "__version__ = '2.8.0'\ndef flash_attn_func(q, k, v, causal):\n    "
SDPA = """import torch.nn.functional as F
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)"""


def fake(folder: Path, text: str) -> dict[str, str]:
    """An environment with a flash_attn of this text."""
    (folder / "flash_attn.py").write_text(text + "\n")
    return {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}


def test_this_machine_with_one_broken_package(tmp_path: Path) -> None:
    """It hides nothing of the others. (A whole machine is test_fake_cuda's.)"""
    env = {"HF_TOKEN": "hf_never-shown", "DISTFT_CACHE": "/tmp/distft-doctor", "COLUMNS": "80"}
    done = distft("doctor", cwd=tmp_path, env=fake(tmp_path, RAISES) | env)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    text = done.stdout.replace("\n  ", " ")
    assert "failed: flash-attn: ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c104" in text
    packages = [name for name, _ in extras.requirements()]
    assert len(packages) == 10
    assert all(f"ok: {name} {metadata.version(name)}\n" in text for name in packages)
    for said in ("matrix products on ", "bitsandbytes ", "all-reduce over ", "cache ", "hub: "):
        assert f"ok: {said}" in text, text
    assert "ok: hub token: found in HF_TOKEN" in text
    assert "hf_never-shown" not in done.stdout + done.stderr
    assert "flash-attn" in lines[-1] and lines[-1].startswith("to fix: ")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["flash_attn.py"]


def test_hidden_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.commands.doctor import _gpus

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    visible_gpus.cache_clear()
    (check,) = _gpus()
    visible_gpus.cache_clear()
    assert (check["state"], check["text"]) == ("absent", "CUDA_VISIBLE_DEVICES hides all GPUs: CPU ranks over gloo")


# The text of a flash_attn, and what is said of it.
FLASH_ATTN = {
    "works": (FUNCTION + SDPA, "ok", "flash-attn 2.8.0: agrees with SDPA"),
    "raises": (FUNCTION + "raise RuntimeError('no kernel image is available')", "failed", "RuntimeError: no kernel"),
    "wrong": (FUNCTION + "return v", "failed", "flash-attn 2.8.0: differs from SDPA by "),
    "crashes": (FUNCTION + "import os; os.kill(os.getpid(), 11)", "failed", "killed by SIGSEGV"),
    "not-imported": (RAISES, "failed", "ImportError: flash_attn_2_cuda.so: undefined symbol"),
    "needs-a-gpu": ("raise ImportError('libcuda.so.1: cannot open shared object file')", "absent", "needs a GPU to be"),
}
TRY_EACH = """
import sys, torch
from distft.diagnostics import doctor
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)  # for the process in which the check runs, apart from this one
    print(*doctor.apart(doctor.flash_attention))
    del sys.path[0]
"""


def test_flash_attention_is_run(tmp_path: Path) -> None:
    import torch

    for name, (text, _, _) in FLASH_ATTN.items():
        (tmp_path / name).mkdir()
        fake(tmp_path / name, text)
    done = subprocess.run([sys.executable, "-c", TRY_EACH, *FLASH_ATTN], capture_output=True, text=True, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == len(FLASH_ATTN), done.stderr
    for line, (name, (_, state, said)) in zip(lines, FLASH_ATTN.items(), strict=True):
        if name == "needs-a-gpu" and torch.cuda.is_available():
            state, said = "failed", "libcuda"
        assert line.startswith(f"{state} flash-att") and said in line, name


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
