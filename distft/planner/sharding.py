"""What each rank keeps of the states under a strategy, and which buffers it needs: bytes by formula, with sources.

Versions read: torch 2.13, accelerate 1.15, deepspeed 0.19.8. T: trained elements; N: ranks that share one copy; `low`:
bytes of an element in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from distft.strategies.kinds import Kind

# Elements of the flat copy that ZeRO-1 averages at a time (deepspeed/runtime/engine.py, MEMORY_OPT_ALLREDUCE_SIZE).
ZERO1_MESSAGE = 500_000_000

# Bytes of a message of DDP; a larger gradient travels alone (torch nn/parallel/distributed.py, bucket_cap_mb).
DDP_MESSAGE = 25 * 2**20

# `head` is the backward pass from the loss to the last block.
MOMENTS = ("forward", "loss", "head", "backward", "optimizer")


@dataclass(frozen=True)
class Unit:
    """What is gathered together: a block, the embedding, or the final norm with the output layer."""

    bytes: int  # of all parameters, in the dtype they are gathered in
    trained: int  # elements


@dataclass(frozen=True)
class Muon:
    """The matrices that Muon trains; none under another optimizer.

    A step of a matrix (n elements, m the smaller side, M the larger) has the float32 update and, of the Newton-Schulz
    iteration in the compute dtype, matrix and next matrix, Gram matrix and its polynomial. An iteration is three
    products, 4 m^2 M + 2 m^3 FLOPs, and there are 5 (train/muon.py, orthogonal).
    """

    elements: int = 0
    step_bytes: int = 0  # temporaries of the largest one
    flops: float = 0.0  # of a step of all

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, ...]], low: int) -> Muon:
        """For matrices of these shapes; `low`: bytes of an element in the compute dtype."""
        sides = [(min(shape), max(shape)) for shape in shapes]
        return cls(
            elements=sum(m * large for m, large in sides),
            step_bytes=max((4 * m * large + 2 * low * (m * large + m * m) for m, large in sides), default=0),
            flops=5.0 * sum(4 * m * m * large + 2 * m**3 for m, large in sides),
        )


@dataclass(frozen=True)
class LowRank:
    """The matrices that GaLore or APOLLO trains; none under another optimizer.

    A matrix of M x n elements (n the shorter side) has a projection (r x n) and two moments (M x r); APOLLO's also the
    norm of its last update. GaLore's new projection decomposes the gradient: a copy of it, U (M x n) and V (n x n). A
    step has the gradient in r directions, two more of its size, and the update (train/low_rank.py).
    """

    elements: int = 0
    state_elements: int = 0
    step_bytes: int = 0  # temporaries of the largest one

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, ...]], rank: int, is_apollo: bool) -> LowRank:
        """For matrices of these shapes."""
        elements = states = step = 0
        for long, short in ((max(shape), min(shape)) for shape in shapes):
            r = rank if is_apollo else min(rank, short)
            elements += long * short
            states += r * short + 2 * long * r + is_apollo
            choosing = 0 if is_apollo else 2 * long * short + short * short
            step = max(step, 4 * choosing, 4 * (long * short + 3 * long * r))
        return cls(elements, states, step)


@dataclass(frozen=True)
class Sizes:
    """What there is to divide among the ranks."""

    parameters: int  # elements; a quantized weight counts as one
    frozen_bytes: int
    trained: int  # elements
    largest_trained: int  # elements of the largest trained tensor
    low: int  # bytes of an element in the compute dtype
    largest_module: int  # bytes of the parameters of one module
    bnb_bytes: int  # of bitsandbytes' optimizer states, unsharded; 0 where it is not used
    embedding: Unit
    block: Unit
    tail: Unit
    small_bytes: int  # of tensors that ZeRO-3 leaves whole
    tied: bool  # input and output embeddings share one weight
    largest_tensor: int  # elements of the base's largest one
    stored_quantized: bool  # the base's files are
    muon: Muon = Muon()
    low_rank: LowRank = LowRank()
    wide: int = 4  # bytes of an element of the weights that the optimizer steps, and of their gradients
    block_inputs: tuple[int, int] = (0, 0)  # number of blocks, width

    @property
    def has_masters(self) -> bool:
        return self.wide == 4

    @property
    def gathered_bytes(self) -> int:
        return self.frozen_bytes + self.low * self.trained


@dataclass(frozen=True)
class Share:
    """Bytes of a rank; `buffers` by moment; `host` in host memory."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: dict[str, int]
    host: int = 0

    @property
    def states(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def share(
    kind: Kind,
    offload: str,
    shard_size: int,
    sizes: Sizes,
    state_bytes: float,
    zero: dict[str, Any] | None,
    bf16: bool,
    reshard_after_forward: bool = True,
    whole_gradients: bool = False,
) -> Share:
    """States and buffers of a rank under a strategy that shards.

    Args:
        state_bytes: optimizer state, bytes per trained element.
        zero: the `zero_optimization` section as distft/strategies/deepspeed.py generates it; None for fsdp and hsdp.
        bf16: the compute dtype is bfloat16 (for which ZeRO-1 has its own optimizer).
        reshard_after_forward, whole_gradients: of FSDP2, as in planner/setting.py.
    """
    if zero is None:
        return _fsdp(offload, shard_size, sizes, state_bytes, reshard_after_forward, whole_gradients)
    return _zero(kind, offload, shard_size, sizes, state_bytes, zero, bf16)


def _fsdp(
    offload: str, ranks: int, sizes: Sizes, state_bytes: float, reshard_after_forward: bool, whole_gradients: bool
) -> Share:
    """FSDP2: everything / N; trained parameters are float32 (accelerate/utils/fsdp_utils.py:813), or have no masters.

    Units are the blocks, the embedding, and [final norm, output layer], which stays gathered from its forward to its
    backward pass (fsdp_utils.py:857-879). Forward: a unit in use, its all-gather's output, held until the next unit's
    copy-out (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py:430 and :483), and the next block's all-gather
    (train/blocks.py, gather_ahead). Backward: a unit in use and
    the next one's all-gather (:795), the unit's gradients in the compute dtype, and their float32 copy that is
    reduce-scattered (distft's reduce_dtype); the previous unit's reduce-scatter is waited for first (:647).
    Without reshard_after_forward all units stay gathered until the backward pass has used them; two all-gathers'
    output is beside them. Whole gradients are kept in float32, and become shards in the last micro-batch.
    """
    parameters = -(-(sizes.frozen_bytes + sizes.wide * sizes.trained) // ranks)
    gradients, optimizer = -(-sizes.wide * sizes.trained // ranks), int(state_bytes * sizes.trained) // ranks
    block, embedding, tail = sizes.block, sizes.embedding, sizes.tail

    def reducing(unit: Unit) -> int:
        return (sizes.low + 4) * unit.trained

    first = tail if sizes.tied else embedding  # a tied embedding is in the tail, which is gathered from the start
    always = tail.bytes if sizes.tied else 0
    buffers = {
        "forward": max(3 * block.bytes + always, 2 * first.bytes),
        "loss": max(2 * tail.bytes, block.bytes + tail.bytes),
        "head": tail.bytes + block.bytes + reducing(tail),
        "backward": max(
            2 * block.bytes + reducing(block) + (tail.bytes + sizes.low * tail.trained if sizes.tied else 0),
            first.bytes + reducing(first),
        ),
        "optimizer": 0,
    }
    if not reshard_after_forward:
        whole = sizes.gathered_bytes
        buffers |= {
            "forward": whole + 2 * block.bytes,
            "loss": whole + tail.bytes,
            "head": whole + reducing(tail),
            "backward": whole + reducing(block),
        }
    unsharded = 4 * sizes.trained if whole_gradients else 0
    if offload == "all":
        return Share(0, unsharded, 0, buffers, parameters + gradients + optimizer)
    return Share(parameters, gradients + unsharded, optimizer, buffers)


def _zero(
    kind: Kind, offload: str, ranks: int, sizes: Sizes, state_bytes: float, zero: dict[str, Any], bf16: bool
) -> Share:
    """DeepSpeed. The float32 masters (4 T / N, flat) count as optimizer states: its optimizer holds and shards them.

    ZeRO-1: gradients are summed into one flat float32 copy of all (bf16_optimizer.py:191; fp16: grad_accum), and
        averaged in messages of at most 5e8 elements, each of them copied.
    ZeRO-2: gradients 4 T / N in float32 (stage_1_and_2.py:1269); buckets of reduce_bucket_size in the compute dtype,
        two with overlap_comm (:3266, :3275), and the message in float32. A tensor larger than the bucket travels alone.
    ZeRO-3: parameters / N except small ones; gradients 4 T / N (stage3.py:791); a float32 bucket (:782) and its
        message; gathered parameters: the module in use, what is prefetched, and what the backward pass will use again
        within stage3_max_reuse_distance, which at the turn is half of it (partitioned_param_coordinator.py,
        __params_to_release). Optimizer step: the float32 gradients of a sub-group (stage3.py:1305).
    Offload: masters, states and gradients of the rank's partition are in host memory; with `all`, parameters too.
    training.master_weights: none: the masters are bf16, but a copy all the same (stage3.py:1162 compares a device with
        a name). Gradients and their sums are bf16. ZeRO-1's optimizer is that of fp16: whole gradients until it steps.
    """
    trained, low, wide = sizes.trained, sizes.low, sizes.wide
    mine = -(-trained // ranks)
    bucket, overlap = int(zero["reduce_bucket_size"]), zero["overlap_comm"]
    message = 4 * min(max(bucket, sizes.largest_trained), max(trained, 1))
    parameters, gradients, optimizer = sizes.gathered_bytes, wide * mine, int((wide + state_bytes) * mine)
    buffers = dict.fromkeys(MOMENTS, 0)
    if kind.zero_stage == 1 and bf16 and sizes.has_masters and offload == "none":
        gradients, buffers["optimizer"] = 4 * trained, 4 * min(trained, ZERO1_MESSAGE)
    elif not kind.shards_parameters:
        if not kind.shards_gradients and sizes.has_masters:
            gradients = wide * trained
        width = low if kind.shards_gradients else wide
        buffers["head"] = buffers["backward"] = (2 if overlap else 1) * width * bucket + message
        if not kind.shards_gradients and not sizes.has_masters:
            buffers |= {moment: buffers[moment] + wide * (trained - mine) for moment in MOMENTS[:-1]}
    else:
        kept = min(int(zero["stage3_max_reuse_distance"]), int(zero["stage3_max_live_parameters"])) // 2
        ahead = low * int(zero["stage3_prefetch_bucket_size"])
        live = min(sizes.gathered_bytes, low * kept + ahead + sizes.largest_module)
        parameters = -(-parameters // ranks) + sizes.small_bytes
        buffers.update(dict.fromkeys(("forward", "loss"), live + 4 * bucket))
        buffers.update(dict.fromkeys(("head", "backward"), live + 4 * bucket + message))
        buffers["optimizer"] = 4 * bucket + wide * min(mine, int(zero["sub_group_size"]))
    if offload == "none":
        return Share(parameters, gradients, optimizer, buffers)
    host = 4 * mine + optimizer
    if not kind.shards_parameters:  # sums of gradients over micro-batches (stage_1_and_2.py, accumulated_grads_in_cpu)
        host += low * mine
    moved = parameters - sizes.small_bytes if offload == "all" else 0
    return Share(parameters - moved, 0, 0, buffers, host + moved)
