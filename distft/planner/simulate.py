"""Memory of a rank, from one training step of the real model class on fake tensors: no weights, no GPU.

The model is built from its config on the meta device, wrapped by peft, and given fake parameters. A dispatch mode then
adds up live storages over forward, loss, backward and optimizer step. What another kernel does on a GPU than on the CPU
that fake tensors lie on is put in its place (distft/train/trace.py, CudaKernels). How a strategy divides the states and
what it gathers on the way is added by formula (distft/planner/sharding.py).

Depth. Identical blocks need not all be traced: live bytes while block k of L is worked on are linear in k and in L
(each block below adds the same activations, each above the same gradients), so the peak over all k lies at one of the
ends. `simulate` traces 4 and 5 blocks, takes the two lowest and the two highest (the outermost differ: a frozen
embedding needs no gradient), and continues each of these peaks linearly to the full depth. Blocks that differ in any
shape or setting (fake_model.alike) are all traced. tests/test_simulate.py holds it against the full depth, to the byte.

Approximations: rows are all max_length long; workspaces inside an operator are counted for FlashAttention's backward
and NF4's matrices only (not cuBLAS's); LLM.int8()'s outlier columns are taken as none; clipping and fp16's scaler are
left out (scalars); under ZeRO and FSDP the gradients' share is taken as there all the time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from distft.errors import PlanError
from distft.planner import sharding
from distft.planner.sharding import Share, Sizes
from distft.recipe import Recipe

if TYPE_CHECKING:
    from distft.train.trace import Trace

# Blocks traced where all are alike; see above.
DEPTHS = (4, 5)
# Outside the allocator: the CUDA context (0.47 GiB, A100, lazy module loading) and NCCL's buffers (the first collective
# of 2 ranks: 0.5 to 1.5 GiB); rounding and gaps of the caching allocator, in parts of the peak (fitcheck-llm, 69
# measured rows: 5%).
CONTEXT, NCCL, GAPS = int(0.47 * 2**30), 2**30, 0.05


@dataclass(frozen=True)
class Simulated:
    """Bytes per rank; `host_per_node` per machine.

    `parameters`, `gradients` and `optimizer` are the states in full; `activations`, `logits` (all that has an entry per
    token and word) and `buffers` (gathered parameters, buckets) what is live at the peak. Where not all gradients
    are there yet at the peak, it is less than their sum. `peaks` has the peak of every moment.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    peak: int
    overhead: int
    host_per_node: int
    moment: str  # of the peak: forward | loss | backward | optimizer
    peaks: dict[str, int]
    model_parameters: int
    trainable_parameters: int

    @property
    def process(self) -> int:
        return self.peak + self.overhead


def simulate(
    recipe: Recipe,
    *,
    strategy: str,
    micro_batch_size: int,
    offload: str = "none",
    shard_size: int = 1,
    world_size: int = 1,
    nproc_per_node: int = 1,
    gradient_checkpointing: bool = False,
    attn_implementation: str = "sdpa",
) -> Simulated:
    """Memory of a rank; `shard_size` ranks share one copy of what the strategy shards.

    Raises:
        PlanError: the model's config cannot be read, transformers cannot build it, or it cannot be traced.
    """
    from distft.train.fake_model import alike, blocks_of, build, sizes_of
    from distft.train.trace import trace

    layout = "autocast" if strategy == "ddp" else "zero" if strategy.startswith("zero") else "fsdp"
    blocks = blocks_of(build(recipe, layout, attn_implementation, plain=True))
    depths = DEPTHS if len(blocks) > DEPTHS[-1] and alike(blocks) else (len(blocks),)
    accumulating = recipe.training.global_batch_size > micro_batch_size * world_size
    found = []
    for depth in depths:
        model = build(recipe, layout, attn_implementation, depth)
        sizes = sizes_of(recipe, model)
        try:
            steps = trace(
                recipe,
                model,
                layout=layout,
                micro_batch_size=micro_batch_size,
                gradient_checkpointing=gradient_checkpointing,
                attn_implementation=attn_implementation,
                accumulating=accumulating and layout == "autocast",
            )
        except RuntimeError as error:  # a shape that depends on values, an operator that fake tensors lack
            name, why = recipe.model.name_or_path, str(error).splitlines()[0]
            raise PlanError(
                f"model.name_or_path: {name} cannot be simulated ({why}); plan without --simulate"
            ) from error
        found.append((sizes, steps))
    sizes, steps = _to_depth(found, depths, len(blocks))
    return _put_together(recipe, sizes, steps, strategy, offload, shard_size, world_size, nproc_per_node)


def _to_depth(found: list[tuple[Sizes, Trace]], depths: tuple[int, ...], depth: int) -> tuple[Sizes, Trace]:
    """Continue what two depths gave linearly to the full one."""
    (sizes, steps), (sizes_below, below) = found[-1], found[0]
    more = depth - depths[-1]
    if more == 0:
        return sizes, steps

    def line(low: Any, high: Any) -> Any:
        if isinstance(high, Counter):
            return Counter({kind: line(low[kind], high[kind]) for kind in high | low})
        return high + more * (high - low)

    growing = ("parameters", "frozen_bytes", "trained", "small_bytes", "bnb_bytes")
    sizes = replace(sizes, **{key: line(getattr(sizes_below, key), getattr(sizes, key)) for key in growing})
    peaks = {key: line(below.peaks[key], steps.peaks[key]) for key in steps.peaks if key in below.peaks}
    return sizes, replace(steps, peaks=peaks, states=line(below.states, steps.states))


def _put_together(
    recipe: Recipe, sizes: Sizes, steps: Trace, strategy: str, offload: str, shard_size: int, world: int, nproc: int
) -> Simulated:
    """States and buffers by strategy, on top of what the step itself keeps."""
    optim, bnb = recipe.training.optim, sizes.bnb_bytes > 0
    if strategy == "ddp":
        optimizer = sizes.bnb_bytes if bnb else steps.states["optimizer"]
        # DDP's buckets are a copy of all gradients: accelerate leaves gradient_as_bucket_view off
        # (utils/dataclasses.py:188).
        buckets = dict.fromkeys(sharding.MOMENTS, steps.states["gradients"] if world > 1 else 0)
        mine = Share(steps.states["parameters"], steps.states["gradients"], optimizer, buckets)
    else:
        state = steps.states["optimizer"] / sizes.trained
        if bnb:
            state = 8.0 if "32bit" in optim else 2 + 8 / 256
        elif optim == "adafactor" and strategy.startswith("zero"):
            state = 4.0  # a flat partition has no rows and columns to factor
        mine = sharding.share(
            strategy,
            offload,
            shard_size,
            sizes,
            state,
            _zero_section(recipe, strategy, offload, world, sizes),
            bf16=recipe.training.mixed_precision == "bf16",
        )
    # Paged states are CUDA managed memory, which torch's allocator does not count (bitsandbytes get_state_buffer).
    paged = mine.optimizer if "paged" in optim and strategy == "ddp" else 0
    totals: dict[str, tuple[int, Counter]] = {}
    for (moment, block), live in steps.peaks.items():
        if moment not in ("forward", "loss", "backward", "optimizer"):
            continue
        if moment == "optimizer":
            live = Counter(live, activations=live["activations"] // (shard_size if strategy != "ddp" else 1))
        buffers = live["buffers"] + mine.buffers["head" if moment == "backward" and block is None else moment]
        gradients = live["gradients"] if strategy == "ddp" else mine.gradients
        total = mine.parameters + mine.optimizer - paged + gradients + buffers + live["activations"] + live["logits"]
        if total > totals.get(moment, (-1,))[0]:
            totals[moment] = total, Counter(live, buffers=buffers)
    moment = max(totals, key=lambda moment: totals[moment][0])
    peak, live = totals[moment]
    return Simulated(
        parameters=mine.parameters,
        gradients=mine.gradients,
        optimizer=mine.optimizer,
        activations=live["activations"],
        logits=live["logits"],
        buffers=live["buffers"],
        peak=peak,
        overhead=CONTEXT + (NCCL if world > 1 else 0) + int(GAPS * peak) + paged,
        host_per_node=mine.host * nproc,
        moment=moment,
        peaks={moment: total for moment, (total, _) in totals.items()},
        model_parameters=sizes.parameters,
        trainable_parameters=sizes.trained,
    )


def _zero_section(recipe: Recipe, strategy: str, offload: str, world: int, sizes: Sizes) -> dict[str, Any] | None:
    """ds_config.json's zero_optimization, as the run will have it; None for FSDP."""
    if not strategy.startswith("zero"):
        return None
    from distft.planner.batch import Batch
    from distft.planner.model_shapes import ModelShape
    from distft.strategies.deepspeed import deepspeed_config

    shape = ModelShape(recipe.model.name_or_path, sizes.parameters, sizes.trained, 0)
    config = deepspeed_config(
        strategy=strategy,
        offload=offload,
        world_size=world,
        device_type="cuda",
        recipe=recipe,
        batch=Batch(1, 1, 1),
        model=shape,
    )
    return config["zero_optimization"]


def main(arguments: list[str] | None = None) -> None:
    """`python -m distft.planner.simulate RECIPE`: for trying; `distft plan --simulate` is the command."""
    import argparse
    import json

    from distft.loading import load_recipe

    parser = argparse.ArgumentParser(prog="python -m distft.planner.simulate", description=main.__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE")
    parser.add_argument("--strategy", default="ddp", choices=("ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"))
    parser.add_argument("--nproc", type=int, default=1, help="ranks, on one node")
    parser.add_argument("--attn", default="sdpa", choices=("sdpa", "flash_attention_2", "eager"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe, options.sets)
    micro, checkpointing = recipe.training.micro_batch_size, recipe.training.gradient_checkpointing
    result = simulate(
        recipe,
        strategy=options.strategy,
        offload=recipe.parallelism.offload,
        shard_size=1 if options.strategy == "ddp" else options.nproc,
        world_size=options.nproc,
        nproc_per_node=options.nproc,
        micro_batch_size=1 if micro == "auto" else micro,
        gradient_checkpointing=checkpointing is True,
        attn_implementation=options.attn,
    )
    found = asdict(result) | {"process": result.process}
    if options.json:
        print(json.dumps(found))
        return
    plain = ("moment", "model_parameters", "trainable_parameters")
    found |= {f"peak of {moment}": size for moment, size in found.pop("peaks").items()}
    for key, value in found.items():
        print(f"{key:21}{value if key in plain else f'{value / 2**30:.3f} GiB'}")


if __name__ == "__main__":
    main()
