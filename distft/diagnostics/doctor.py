"""Does what training needs work on this machine? `python -m distft.diagnostics.doctor` prints a JSON list of checks.

A check is {name, state, said}; the states are `right`, `wrong`, `missing` (must be installed) and `absent` (is not
here, and need not be). Each check runs in a forked process: a crash, a hang or a broken CUDA context is its own alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any

Verdict = tuple[str, str]  # state, said

CHECK_SECONDS = 300.0  # a cold shared file system takes minutes to import everything
# What a kernel for GPUs says on a machine that has none, such as a login node.
NEEDS_GPU = r"'CPU' backend|No CUDA GPUs|no NVIDIA driver|not compiled with CUDA|libcuda\.so"


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    found = [{"name": "torch", "state": "wrong", "said": "torch cannot be imported"}]
    try:
        import torch  # noqa: F401  (once for all forks; nothing may touch CUDA before them)
    except Exception as error:
        found[0]["said"] += f": {first_line(error)}"
    else:
        verdicts = {name: apart(check) for name, check in CHECKS.items()}
        found = [{"name": name, "state": v[0], "said": v[1]} for name, v in verdicts.items() if v]
    out.write(json.dumps(found))
    out.close()


def first_line(error: Exception) -> str:
    """An error in one line."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def apart(check: Callable[[], Verdict | None]) -> Verdict | None:
    """The verdict of a check that runs in a forked process; `wrong` if it raises, dies or hangs."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    process = fork.Process(target=_attempt, args=(check, send), daemon=True)
    process.start()
    send.close()  # its end here: else the pipe stays open when the process dies
    what = check.__name__.replace("_", "-")
    try:
        if receive.poll(CHECK_SECONDS):
            return receive.recv()
        return "wrong", f"{what}: not done after {CHECK_SECONDS:.0f} s"
    except EOFError:
        process.join()
        code = process.exitcode
        return "wrong", f"{what}: " + (f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}")
    finally:
        process.kill()
        process.join()


def _attempt(check: Callable[[], Verdict | None], send: Any) -> None:
    try:
        verdict = check()
    except Exception as error:
        verdict = "wrong", f"{check.__name__.replace('_', '-')}: {first_line(error)}"
    send.send(verdict)


def imports() -> Verdict:
    """Every package of distft[train] imported, and what distft itself takes from them."""
    from distft import extras

    failed = []
    for name in [name for name, _ in extras.requirements()] + ["distft.train.run"]:
        if name != "distft.train.run" and importlib.util.find_spec(name) is None:
            continue  # missing, which is said elsewhere
        try:
            importlib.import_module(name)
        except Exception as error:
            failed.append(f"{name}: {first_line(error)}")
    return ("wrong", f"import {'; '.join(failed)}") if failed else ("right", "all packages can be imported")


def cuda() -> Verdict | None:
    """torch finds the GPUs that nvidia-smi finds. None where there are none."""
    import torch

    from distft.diagnostics import checks
    from distft.hardware.devices import visible_gpus

    here = len(visible_gpus())
    if not here:
        return None
    torch.cuda.init()  # raises saying why, where is_available() is only False
    seen = torch.cuda.device_count()
    said = f"CUDA {torch.version.cuda}, driver {checks.driver()}"
    return ("right", said) if seen == here else ("wrong", f"{said}: torch sees {seen} of {here} GPUs")


def products() -> Verdict:
    """A product of known result on each GPU, or on the CPU."""
    import torch

    from distft.diagnostics import checks

    found, gpus = checks.Findings(), torch.cuda.device_count()
    checks.products(found, gpus)
    if found.problems:
        return "wrong", "; ".join(found.problems)
    speed = found.facts["tflops"]
    if gpus:
        return "right", f"matrix products on {gpus} GPU{'s' * (gpus > 1)}: {speed:.0f} TFLOP/s at least (bf16)"
    return "right", f"matrix products on the CPU: {1000 * speed:.0f} GFLOP/s (float32)"


def flash_attention() -> Verdict:
    """flash-attn imported and run: a tiny bf16 attention, within 1e-2 of SDPA's."""
    if importlib.util.find_spec("flash_attn") is None:
        return "absent", "flash-attn: SDPA is used"
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
            return "absent", "flash-attn: it needs a GPU to be tried; SDPA is used"
        return "wrong", f"flash-attn: {first_line(error)}"
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    off = (got - expected).abs().max().item()
    if not off <= 1e-2:
        return "wrong", f"flash-attn {version}: off from SDPA by {off:.3g}"
    return "right", f"flash-attn {version}: as SDPA"


def bitsandbytes() -> Verdict | None:
    """bitsandbytes run: weights to 4 bits and back, and a step of 8-bit AdamW. None where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes as bnb
    import torch

    device = _device()
    torch.manual_seed(0)
    weights = torch.randn(128, 128, device=device, dtype=torch.bfloat16)
    packed, state = bnb.functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    off = (bnb.functional.dequantize_4bit(packed, state) - weights).abs().float().mean().item()
    if not off < 0.1:  # of a normal distribution NF4 loses 0.075
        return "wrong", f"bitsandbytes {bnb.__version__}: weights in 4 bits are off by {off:.3g}"
    parameter = torch.nn.Parameter(torch.ones(128, 128, device=device))
    parameter.grad = torch.ones_like(parameter)
    bnb.optim.AdamW8bit([parameter], lr=0.1, weight_decay=0.0).step()
    if not (parameter - 0.9).abs().max().item() < 1e-3:  # the first step of Adam is lr
        return "wrong", f"bitsandbytes {bnb.__version__}: a step of 8-bit AdamW is wrong"
    return "right", f"bitsandbytes {bnb.__version__}: NF4 and 8-bit AdamW on {device}"


def all_reduce() -> Verdict:
    """All-reduce of this process alone, over NCCL or gloo."""
    import torch
    import torch.distributed as dist

    device = _device()
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    data = torch.ones(1024, device=device)
    dist.all_reduce(data)
    right = bool((data == 1).all().item())
    dist.destroy_process_group()
    return ("right", f"all-reduce over {backend}") if right else ("wrong", f"all-reduce over {backend}: wrong sums")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


CHECKS: dict[str, Callable[[], Verdict | None]] = {
    "imports": imports,
    "cuda": cuda,
    "products": products,
    "flash-attn": flash_attention,
    "bitsandbytes": bitsandbytes,
    "all-reduce": all_reduce,
}

if __name__ == "__main__":
    main()
