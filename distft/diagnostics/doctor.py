"""Does what training needs work on this machine? `python -m distft.diagnostics.doctor` prints a JSON list of checks.

A check is {name, state, text}. Its state is `ok`, `failed`, `missing` (must be installed) or `absent` (not here and not
needed). Each check runs in a forked process of its own, so that a crash, a hang or a broken CUDA context stays there.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from distft.errors import in_one_line

Verdict = tuple[str, str]  # state, text

CHECK_SECONDS = 300.0  # a cold shared file system takes minutes to import everything
# What a kernel for GPUs says on a machine that has none, such as a login node.
NEEDS_GPU = r"'CPU' backend|No CUDA GPUs|no NVIDIA driver|not compiled with CUDA|libcuda\.so"


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    found = [{"name": "torch", "state": "failed", "text": "torch cannot be imported"}]
    try:
        import torch  # noqa: F401  (once for all forks; nothing may touch CUDA before them)
    except Exception as error:
        found[0]["text"] += f": {in_one_line(error)}"
    else:
        verdicts = {name: apart(check) for name, check in CHECKS.items()}
        found = [{"name": name, "state": v[0], "text": v[1]} for name, v in verdicts.items() if v]
    out.write(json.dumps(found))
    out.close()


def apart(check: Callable[[], Verdict | None]) -> Verdict | None:
    """The verdict of a check run in a forked process; `failed` if it raises, dies or hangs."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    process = fork.Process(target=_attempt, args=(check, send), daemon=True)
    process.start()
    send.close()  # else the pipe stays open here when the process dies
    what = check.__name__.replace("_", "-")
    try:
        if receive.poll(CHECK_SECONDS):
            return receive.recv()
        return "failed", f"{what}: not finished after {CHECK_SECONDS:.0f} s"
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return "failed", f"{what}: {how}"
    finally:
        process.kill()
        process.join()


def _attempt(check: Callable[[], Verdict | None], send: Any) -> None:
    try:
        verdict = check()
    except Exception as error:
        verdict = "failed", f"{check.__name__.replace('_', '-')}: {in_one_line(error)}"
    send.send(verdict)


def imports() -> Verdict:
    """Import every package of distft[train], and what distft itself takes from them."""
    from distft import extras

    failed = []
    for name in [name for name, _ in extras.requirements()] + ["distft.train.run"]:
        if name != "distft.train.run" and importlib.util.find_spec(name) is None:
            continue  # missing, which another check reports
        try:
            importlib.import_module(name)
        except Exception as error:
            failed.append(f"{name}: {in_one_line(error)}")
    return ("failed", f"import {'; '.join(failed)}") if failed else ("ok", "all packages import")


def cuda() -> Verdict | None:
    """Whether torch finds the GPUs that nvidia-smi finds. None where there are none."""
    import torch

    from distft.diagnostics import checks
    from distft.hardware.devices import visible_gpus

    here = len(visible_gpus())
    if not here:
        return None
    torch.cuda.init()  # raises with the reason, where is_available() would only return False
    seen = torch.cuda.device_count()
    text = f"CUDA {torch.version.cuda}, driver {checks.driver()}"
    return ("ok", text) if seen == here else ("failed", f"{text}: torch sees {seen} of {here} GPUs")


def products() -> Verdict:
    """Compute a product of known result on each GPU, or on the CPU."""
    import torch

    from distft.diagnostics import checks

    found, gpus = checks.Findings(), torch.cuda.device_count()
    checks.products(found, gpus)
    if found.problems:
        return "failed", "; ".join(found.problems)
    speed = found.facts["tflops"]
    if gpus:
        return "ok", f"matrix products on {gpus} GPU{'s' * (gpus > 1)}: {speed:.0f} TFLOP/s at least (bf16)"
    return "ok", f"matrix products on the CPU: {1000 * speed:.0f} GFLOP/s (float32)"


def flash_attention() -> Verdict:
    """Import flash-attn and run a tiny bf16 attention: within 1e-2 of SDPA's."""
    if importlib.util.find_spec("flash_attn") is None:
        return "absent", "flash-attn is not installed: SDPA is used"
    import torch

    device = _device()
    try:
        import flash_attn

        version = getattr(flash_attn, "__version__", "of an unknown version")
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 1, 64, 2, 64, device=device, dtype=torch.bfloat16).unbind()
        got = flash_attn.flash_attn_func(q, k, v, causal=True).float()
    except Exception as error:
        if device == "cpu" and re.search(NEEDS_GPU, str(error)):
            return "absent", "flash-attn needs a GPU to be tried: SDPA is used"
        return "failed", f"flash-attn: {in_one_line(error)}"
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    off = (got - expected).abs().max().item()
    if not off <= 1e-2:
        return "failed", f"flash-attn {version}: differs from SDPA by {off:.3g}"
    return "ok", f"flash-attn {version}: agrees with SDPA"


def bitsandbytes() -> Verdict | None:
    """Run bitsandbytes: weights to 4 bits and back, and a step of 8-bit AdamW. None where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes as bnb
    import torch

    device = _device()
    torch.manual_seed(0)
    weights = torch.randn(128, 128, device=device, dtype=torch.bfloat16)
    packed, state = bnb.functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    off = (bnb.functional.dequantize_4bit(packed, state) - weights).abs().float().mean().item()
    if not off < 0.1:  # NF4 of a standard normal distribution loses 0.075 on average
        return "failed", f"bitsandbytes {bnb.__version__}: weights in 4 bits are off by {off:.3g}"
    parameter = torch.nn.Parameter(torch.ones(128, 128, device=device))
    parameter.grad = torch.ones_like(parameter)
    bnb.optim.AdamW8bit([parameter], lr=0.1, weight_decay=0.0).step()
    if not (parameter - 0.9).abs().max().item() < 1e-3:  # the first step of Adam is lr
        return "failed", f"bitsandbytes {bnb.__version__}: a step of 8-bit AdamW is wrong"
    return "ok", f"bitsandbytes {bnb.__version__}: NF4 and 8-bit AdamW on {device}"


def compiler() -> Verdict:
    """Look for what training.compile needs: on GPUs Triton and a C compiler, else a C++ compiler."""
    if _device() == "cpu":
        need = {"g++": [os.environ.get("CXX", "g++")]}
    else:
        need = {"gcc": [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cc"]}
    missing = [name for name, commands in need.items() if not any(map(shutil.which, commands))]
    if _device() != "cpu" and importlib.util.find_spec("triton") is None:
        missing.append("triton")
    if missing:
        return "absent", f"{' and '.join(missing)} not found: training.compile: true cannot be used"
    return "ok", f"training.compile: {' and '.join(need)} found"


def all_reduce() -> Verdict:
    """All-reduce in a group of this process alone, over NCCL or gloo."""
    import torch
    import torch.distributed as dist

    device = _device()
    backend = "nccl" if device == "cuda" else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not re-exported explicitly
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    data = torch.ones(1024, device=device)
    dist.all_reduce(data)
    correct = bool((data == 1).all().item())
    dist.destroy_process_group()
    return ("ok", f"all-reduce over {backend}") if correct else ("failed", f"all-reduce over {backend}: wrong sums")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


CHECKS: dict[str, Callable[[], Verdict | None]] = {
    "imports": imports,
    "cuda": cuda,
    "products": products,
    "flash-attn": flash_attention,
    "bitsandbytes": bitsandbytes,
    "compiler": compiler,
    "all-reduce": all_reduce,
}

if __name__ == "__main__":
    main()
