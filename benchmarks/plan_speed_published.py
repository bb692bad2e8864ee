"""The plan's tokens/s beside speeds that others published, for the same settings as far as distft has them.

    python benchmarks/plan_speed_published.py

NeMo Automodel's performance summary (H100, LoRA, rows of 4,096, micro-batch 2, global batch 32; 70B and 32B also split
each layer over 2 GPUs), torchtitan's llama3 8B (H100, full, selective checkpointing, of which distft has none: without
checkpointing), torchtune's README (A100, packed rows of 4,096; its QLoRA and LoRA rows train with checkpointing, a loss
in chunks and offloaded activations, and compile).
planner/speed.py takes its constants from some of these rows.
"""

from __future__ import annotations

import statistics
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

from accuracy_rows import parse, recipe_of

from distft.hardware.devices import named_device
from distft.hardware.topology import Topology
from distft.models.shapes import read_model_shape
from distft.planner import speed
from distft.planner.memory import Estimator
from distft.planner.search import Where

# tokens/s of a GPU
ROWS = """
llama-3.1-8b   lora16 bf16 ddp*1    flash 2x4096 packed keep          gpu=h100 batch=32 speed=12473
qwen2.5-7b     lora16 bf16 ddp*1    flash 2x4096 packed keep          gpu=h100 batch=32 speed=14110
llama-3.1-70b  lora16 bf16 fsdp*8   flash 2x4096 packed keep          gpu=h100 batch=32 speed=1092
llama-3.1-70b  lora16 bf16 fsdp*16  flash 2x4096 packed keep          gpu=h100 batch=32 speed=985
qwen2.5-32b    lora16 bf16 fsdp*8   flash 2x4096 packed keep          gpu=h100 batch=32 speed=2250
qwen2.5-32b    lora16 bf16 fsdp*16  flash 2x4096 packed keep          gpu=h100 batch=32 speed=2073
llama-3.1-8b   full   bf16 fsdp*8   flash 2x8192 packed keep          gpu=h100 batch=16 speed=5762
llama-3.1-8b   full   bf16 fsdp*128 flash 2x8192 packed keep          gpu=h100 batch=256 speed=5605
llama-3.1-8b   full   bf16 fsdp*8   flash 2x8192 packed keep          gpu=h100 batch=16 speed=6667 compile
llama-3.1-8b   full   bf16 fsdp*128 flash 2x8192 packed keep          gpu=h100 batch=256 speed=6514 compile
llama-3.2-3b   full   bf16 ddp*1    flash 2x4096 packed keep          gpu=a100-80gb batch=2 speed=7075
llama-3.2-3b   full   bf16 ddp*1    flash 2x4096 packed keep          gpu=a100-80gb batch=2 speed=8998 compile
llama-3.2-3b   full   bf16 ddp*1    flash 2x4096 packed checkpointing gpu=a100-80gb batch=2 speed=7210 compile
llama-3.2-3b   lora8  bf16 ddp*1    flash 2x4096 packed checkpointing gpu=a100-80gb batch=2 speed=8210 compile
llama-3.2-3b   nf4:8  bf16 ddp*1    flash 2x4096 packed checkpointing gpu=a100-80gb batch=2 speed=8035 compile
"""


def compare(folder: Path) -> list[tuple[str, bool, float, float]]:
    """Of every row: the GPU, whether the model was compiled, and tokens/s: theirs and the plan's."""
    found = []
    for row in parse(ROWS):
        theirs, ours = float(row.extra["speed"]), _planned(folder, row)
        found.append((row.extra["gpu"], "compile" in row.extra, theirs, ours))
        print(f"{row.text:102}{theirs:8,.0f}{ours:8,.0f}{ours / theirs:7.2f}")
    return found


def main() -> None:
    print(f"{'tokens/s of a GPU':102}{'theirs':>8}{'plan':>8}{'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder))
    for name, compiled in (("not compiled", False), ("compiled", True)):
        off = [100 * abs(ours / theirs - 1) for _, is_compiled, theirs, ours in found if is_compiled is compiled]
        print(f"{name}: median {statistics.median(off):.0f}% off, worst {max(off):.0f}%, {len(off)} rows")
    pairs = [
        (one[2] > other[2]) == (one[3] > other[3])
        for one, other in combinations(found, 2)
        if one[:2] == other[:2] and abs(one[2] / other[2] - 1) > 0.03
    ]
    print(f"which is faster: right in {sum(pairs)} of {len(pairs)} pairs on the same GPU, compiled or not")


def _planned(folder: Path, row: Any) -> float:
    recipe = recipe_of(folder, row)
    setting = row.setting
    model = read_model_shape(recipe)
    device = named_device(row.extra["gpu"], setting.nproc_per_node)
    where = Where(Topology(setting.world_size // setting.nproc_per_node, setting.nproc_per_node), device)
    sizes = Estimator(recipe, model).sizes
    found = speed.estimate(
        recipe,
        model,
        sizes,
        setting,
        int(row.extra["batch"]) // (setting.micro_batch_size * setting.world_size),
        device,
        where.links,
        speed.flops_per_token(recipe, model, sizes),
    )
    assert found.tokens_per_second_per_gpu
    return found.tokens_per_second_per_gpu


if __name__ == "__main__":
    main()
