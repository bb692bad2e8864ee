"""Two H100s that are not there, for a process that has this folder on its PYTHONPATH: emulated, on the CPU.

What asks torch about CUDA is told of GPUs, and NCCL's groups are gloo's; the numbers are computed by the CPU, where
ACCELERATE_TORCH_DEVICE=cpu keeps every tensor. So distft walks its branches for GPUs (devices, rules, configs,
arguments) and trains; kernels, streams, timeouts and NCCL itself are not tried. tests/fake_gpus.py sets it up.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import walked

GIB = 2**30
MEMORY = int(79.1 * GIB)


class After(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a package as ever, and then does something to it."""

    def __init__(self, package: str, then: Callable[[Any], None]):
        self.package, self.then, self.looking = package, then, False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Also asked by who only looks whether there is such a package."""
        if name != self.package or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.then(module)


def emulate(torch: Any) -> None:
    cuda, dist = torch.cuda, torch.distributed
    here = int(os.environ.get("LOCAL_RANK", "0"))
    count = int(os.environ.get("FAKE_CUDA_DEVICES", "2"))
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", total_memory=MEMORY, major=9, minor=0, multi_processor_count=132, uuid="GPU-0"
    )
    properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id = 0xFFFF, here, 0
    told = {
        "is_available": True,
        "device_count": count,
        "current_device": here,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "is_bf16_supported": True,
        "is_initialized": True,
        "mem_get_info": (MEMORY, MEMORY),
        "max_memory_allocated": GIB,
        "max_memory_reserved": GIB,
        "memory_allocated": GIB,
        "memory_reserved": GIB,
        "memory_stats": {},
        "get_rng_state": torch.get_rng_state(),
        "can_device_access_peer": True,
    }
    ignored = ("init", "set_device", "synchronize", "empty_cache", "set_rng_state", "manual_seed", "manual_seed_all")
    ignored += ("reset_peak_memory_stats", "ipc_collect", "_lazy_init")
    for name in ignored:
        told[name] = None
    for name, value in told.items():
        setattr(cuda, name, lambda *_, value=value, **__: value)
    place_on_cpu(torch)
    torch._C._cuda_getCurrentRawStream = lambda *_: 0
    cuda.Stream = cuda.Event = Nothing
    cuda.current_stream = cuda.default_stream = lambda *_: Nothing()
    cuda.stream = lambda *_: Nothing()

    def gloo(original: Any) -> Any:
        def group(*args: Any, **options: Any) -> Any:
            args = tuple(without_nccl(value) for value in args)
            options = {name: without_nccl(value) for name, value in options.items() if name != "device_id"}
            return original(*args, **options)

        return group

    for name in ("init_process_group", "new_group"):
        setattr(dist, name, gloo(getattr(dist, name)))
        setattr(dist.distributed_c10d, name, getattr(dist, name))
    ddp = torch.nn.parallel.DistributedDataParallel
    wrap = ddp.__init__
    ddp.__init__ = lambda self, module, **options: wrap(
        self, module, **options | {"device_ids": None, "output_device": None}
    )
    from torch.distributed import device_mesh

    mesh = device_mesh.init_device_mesh
    device_mesh.init_device_mesh = dist.init_device_mesh = lambda kind, *args, **options: mesh("cpu", *args, **options)


def place_on_cpu(torch: Any) -> None:
    """What is made on or moved to a GPU is on the CPU."""

    class OnCpu(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), options: Any = None) -> Any:
            options = dict(options or {})
            if function is torch.device:
                index = ("cuda",) if args and isinstance(args[0], int) else ()
                return function(*index, *args, **options)
            if function is torch.Tensor.cuda:
                return args[0]
            options.pop("pin_memory", None)
            if isinstance(options.get("device"), int):
                options["device"] = "cpu"
            return function(*map(cpu, args), **{name: cpu(value) for name, value in options.items()})

    def cpu(value: Any) -> Any:
        is_gpu = isinstance(value, str | torch.device) and str(value).partition(":")[0] == "cuda"
        return "cpu" if is_gpu else value

    OnCpu().__enter__()


def without_nccl(value: Any) -> Any:
    if isinstance(value, str) and "nccl" in value:
        with open(os.environ.get("FAKE_CUDA_BACKENDS", os.devnull), "a") as said:
            said.write(f"{value} {os.environ.get('PYTORCH_ALLOC_CONF')}\n")
        return "gloo"
    return value


class Nothing:
    """A stream or an event: it does nothing, in whatever way."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def without_compiler(deepspeed: Any) -> None:
    """Its accelerator here is the CPU's, whose all-reduce would be compiled first (train/cpu_ranks.py)."""
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


def without_packing(modules: Any) -> None:
    """Of 4-bit weights for CPUs that multiply bfloat16: another arithmetic than CPU ranks have (train/cpu_ranks.py)."""
    modules.has_avx512bf16 = lambda: False


def varlen_on_cpu(kernels: Any) -> None:
    import varlen  # imports torch, which most processes do without

    varlen.instead(kernels)


def smaller(checks: Any) -> None:
    """Matrices whose product does not take the CPU minutes; how fast it is does not matter."""
    checks.GPU_SIZE, checks.SLOW = 256, 0


if "FAKE_CUDA" in os.environ:
    after = {
        "torch": emulate,
        "torch.nn.attention.varlen": varlen_on_cpu,
        "deepspeed": without_compiler,
        "bitsandbytes.nn.modules": without_packing,
        "distft.diagnostics.checks": smaller,
    }
    sys.meta_path[:0] = [*(After(name, then) for name, then in after.items()), walked.Finder()]
