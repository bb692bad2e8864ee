"""Memory of a rank, from one training step of the real model class on fake tensors: no weights, no GPU.

The model is built from its config on the meta device, wrapped by peft, and given fake parameters. A dispatch mode then
adds up live storages over forward, loss, backward and optimizer step. What another kernel does on a GPU than on the CPU
that fake tensors lie on is put in its place (`CudaKernels`). How a strategy divides the states and what it gathers on
the way is added by formula (`distft.planner.sharding`).

Depth. Identical blocks need not all be traced: live bytes while block k of L is worked on are linear in k and in L
(each block below adds the same activations, each above the same gradients), so the peak over all k lies at one of the
ends. `simulate` traces 4 and 5 blocks, takes the two lowest and the two highest (the outermost differ: a frozen
embedding needs no gradient), and continues each of these peaks linearly to the full depth. Blocks that differ in any
shape or setting (`_alike`) are all traced. tests/test_simulate.py holds it against the full depth, to the byte.

Approximations: rows are all max_length long; kernels' workspaces inside an operator (cuBLAS, FlashAttention's float32
sum of dq) are not seen; bitsandbytes' outlier columns are taken as none.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from distft.errors import PlanError
from distft.planner import sharding
from distft.planner.sharding import Share, Sizes, Unit

if TYPE_CHECKING:
    import torch

    from distft.recipe import Recipe

# (moment, block or None); blocks 0 and 1 count from the bottom, -2 and -1 from the top.
Segment = tuple[str, "int | None"]


DEPTHS = (4, 5)
# Outside the allocator: the CUDA context (0.47 GiB, A100, lazy module loading) and NCCL's buffers and streams (the first
# collective of 2 ranks: 0.5 to 1.5 GiB); rounding and gaps of the caching allocator, in parts of the peak
# (fitcheck-llm, 69 rows of measurements: 5%).
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
        PlanError: the model's config cannot be read, or transformers cannot build it.
    """
    layout = "autocast" if strategy == "ddp" else "zero" if strategy.startswith("zero") else "fsdp"
    whole = build(
        recipe.model_copy(update={"lora": None, "model": recipe.model.model_copy(update={"quantization": None})}),
        layout,
        attn_implementation,
    )
    depth = len(blocks_of(whole))
    depths = DEPTHS if depth > DEPTHS[-1] and _alike(blocks_of(whole)) else (depth,)
    accumulating = recipe.training.global_batch_size > micro_batch_size * world_size
    found = []
    for some in depths:
        model = build(recipe, layout, attn_implementation, some)
        sizes = _sizes(recipe, model)
        steps = trace(
            recipe,
            model,
            layout=layout,
            micro_batch_size=micro_batch_size,
            gradient_checkpointing=gradient_checkpointing,
            attn_implementation=attn_implementation,
            accumulating=accumulating and layout == "autocast",
        )
        del model
        found.append((sizes, steps))
    sizes, steps = _to_depth(found, depths, depth)
    return _put_together(recipe, sizes, steps, strategy, offload, shard_size, world_size, nproc_per_node)


def _sizes(recipe: Recipe, model: Any) -> Sizes:
    """What there is to divide, by units that are gathered together. `model` is on the meta device."""
    low = compute_dtype(recipe).itemsize
    blocks, embedding, head = blocks_of(model), model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight

    def size(p: Any) -> int:
        return _stored_bytes(p) or low * p.numel()

    def unit(parameters: list) -> Unit:
        return Unit(sum(map(size, parameters)), sum(p.numel() for p in parameters if p.requires_grad))

    everything = list(model.parameters())
    inside = {id(p) for p in blocks.parameters()} | (set() if tied else {id(p) for p in embedding.parameters()})
    trained = [p for p in everything if p.requires_grad]
    return Sizes(
        parameters=sum(p.numel() for p in everything if not p.requires_grad or not recipe.lora),
        frozen_bytes=sum(size(p) for p in everything if not p.requires_grad),
        trained=sum(p.numel() for p in trained),
        largest_trained=max(p.numel() for p in trained),
        low=low,
        embedding=unit([] if tied else list(embedding.parameters())),
        block=max((unit(list(block.parameters())) for block in blocks), key=lambda unit: unit.bytes),
        tail=unit([p for p in everything if id(p) not in inside]),
        largest_module=max(sum(size(p) for p in module.parameters(recurse=False)) for module in model.modules()),
        small_bytes=low * sum(p.numel() for p in everything if p.numel() < 100_000),
        bnb_bytes=sum(_bnb_state_bytes(recipe.training.optim, p, p is embedding.weight) for p in trained),
        tied=tied,
    )


def _stored_bytes(parameter: Any) -> int | None:
    """Of a quantised weight: NF4 0.5 bytes, an 8-bit scale per 64, a float32 one per 64 * 256; int8 1 and a float32
    scale per row."""
    kind, size = type(parameter).__name__, parameter.numel()
    if kind == "Params4bit":
        return size // 2 + -(-size // 64) + 4 * -(-size // (64 * 256))
    return size + 4 * parameter.shape[0] if kind == "Int8Params" else None


def _bnb_state_bytes(optim: str, parameter: Any, embedding: bool) -> int:
    """Two moments: 8 bit with a float32 scale per 256; whole for small tensors (bitsandbytes optim/optimizer.py:502) and
    the embedding (transformers trainer.py, GlobalOptimManager). 0 for other optimizers."""
    if "bnb" not in optim and "paged" not in optim:
        return 0
    size = parameter.numel()
    return 8 * size if "32bit" in optim or embedding or size < 4096 else 2 * size + 8 * -(-size // 256)


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
    return sizes, Trace(peaks, line(below.states, steps.states))


def _put_together(
    recipe: Recipe, sizes: Sizes, steps: Trace, strategy: str, offload: str, shard_size: int, world: int, nproc: int
) -> Simulated:
    """States and buffers by strategy, on top of what the step itself keeps."""
    optim, bnb = recipe.training.optim, sizes.bnb_bytes > 0
    if strategy == "ddp":
        optimizer = sizes.bnb_bytes if bnb else steps.states["optimizer"]
        # DDP's buckets are a copy of all gradients: accelerate leaves gradient_as_bucket_view off (utils/dataclasses.py).
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


@dataclass(frozen=True)
class Trace:
    """Live bytes by kind at the peak of every segment of a step."""

    peaks: dict[Segment, Counter]
    states: Counter  # all parameters, gradients, optimizer states and buffers, in bytes

    def total(self, segment: Segment) -> int:
        return sum(self.peaks[segment].values())


def ledger(vocab_size: int, tokens: int) -> Any:
    """A dispatch mode that counts live storages, each once however many views it has.

    Storages and not tensors, by weak reference: a storage's Python object lives as long as the storage.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Ledger(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.live: dict[int, list] = {}  # id of the storage → [weak reference, bytes, kind]
            self.bytes: Counter = Counter()
            self.total = 0
            self.segment: Segment = ("forward", None)
            self.peaks: dict[Segment, tuple[int, Counter]] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    logits = leaf.dim() > 1 and leaf.shape[-1] == vocab_size and leaf.numel() >= tokens * vocab_size
                    self.count(leaf, "logits" if logits else "activations")
            self.look(_workspace(func, args))
            return result

        def count(self, tensor: torch.Tensor, kind: str) -> None:
            storage = tensor.untyped_storage()
            if id(storage) in self.live:
                return
            key, size = id(storage), storage.nbytes()
            self.live[key] = [weakref.ref(storage, lambda _: self.free(key)), size, kind]
            self.bytes[kind] += size
            self.total += size
            self.look()

        def free(self, key: int) -> None:
            _, size, kind = self.live.pop(key)
            self.bytes[kind] -= size
            self.total -= size

        def call(self, tensor: torch.Tensor, kind: str) -> None:
            """Say what a tensor is."""
            self.count(tensor, kind)
            entry = self.live[id(tensor.untyped_storage())]
            self.bytes[entry[2]] -= entry[1]
            self.bytes[kind] += entry[1]
            entry[2] = kind

        def enter(self, moment: str, block: int | None = None) -> None:
            self.segment = (moment, block)
            self.look()

        def look(self, workspace: int = 0) -> None:
            if self.total + workspace > self.peaks.get(self.segment, (-1,))[0]:
                self.peaks[self.segment] = (self.total + workspace, Counter(self.bytes))
                self.peaks[self.segment][1]["activations"] += workspace

    return Ledger()


def _workspace(func: Any, args: tuple) -> int:
    """Large temporaries inside one operator, which no dispatch mode sees.

    bitsandbytes gemm_4bit turns the matrix into the compute dtype for more than some 1500 tokens (backends/cuda/ops.py,
    _dequant_linear_fallback). FlashAttention-2's backward sums dq in float32 and, with fewer key than query heads,
    makes dk and dv for every query head (ATen flash_attn/flash_api.cpp, mha_bwd: dq_accum, dk_expanded).
    """
    name = func.name()
    if name == "bitsandbytes::gemm_4bit":
        return args[2][0] * args[2][1] * args[0].element_size()
    if name == "aten::_scaled_dot_product_flash_attention_backward":
        query, key = args[1], args[2]
        expanded = 2 * query.numel() * query.element_size() if key.shape[1] != query.shape[1] else 0
        return 4 * query.numel() + expanded
    return 0


def cuda_kernels() -> Any:
    """A function mode under which CPU tensors take the shapes and dtypes that a CUDA GPU would give.

    Attention: FlashAttention keeps q, k, v, the output and float32 log-sums; with a mask the memory-efficient kernel
    keeps the mask too, turned into the compute dtype anew in every layer (ATen native/transformers/attention.cpp,
    convert_boolean_attn_mask). Dropout keeps a bool mask (native_dropout). Autocast: CUDA computes these functions in
    float32 where the CPU does not (ATen autocast_mode.h, AT_FORALL_FP32).
    """
    import torch
    import torch.nn.functional as F
    from torch.overrides import TorchFunctionMode

    names = "softmax log_softmax layer_norm group_norm pow rsqrt exp expm1 log log1p cumsum cumprod sum prod norm"
    names += " softplus cosh sinh tan acos asin cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss kl_div"
    owners = (torch, torch.Tensor, F, torch._C._nn)
    float32 = {getattr(owner, name) for name in names.split() for owner in owners if hasattr(owner, name)}
    float32 |= {torch.Tensor.__pow__, torch.Tensor.__rpow__}
    sdpa, aten = F.scaled_dot_product_attention, torch.ops.aten

    def autocast_dtype() -> torch.dtype | None:
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **rest
    ) -> Any:
        dtype = autocast_dtype() or query.dtype
        query, key, value = (t.to(dtype) for t in (query, key, value))
        if attn_mask is None and dtype is not torch.float32 and value.shape[-1] <= 256:
            scale = rest.get("scale")
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if rest.get("enable_gqa"):
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        if attn_mask is not None:
            attn_mask = (
                torch.where(attn_mask, 0.0, float("-inf")).to(dtype)
                if attn_mask.dtype is torch.bool
                else (attn_mask.to(dtype))
            )
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], -1, -1)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=rest.get("scale")
        )[0]

    class CudaKernels(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is sdpa:
                return attention(*args, **kwargs)
            if func is F.dropout:
                return dropout(*args, **kwargs)
            if func in float32 and autocast_dtype():
                args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, _float, (args, kwargs))
            return func(*args, **kwargs)

    def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    def _float(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

    return CudaKernels()


def build(recipe: Recipe, layout: str, attn_implementation: str, depth: int | None = None) -> Any:
    """The model as distft/train/model.py makes it, on the meta device; `depth` blocks of it.

    `layout` is what the strategy computes with. `autocast` (DDP): what is trained is float32, and autocast casts on
    the way. `fsdp`: FSDP2 gathers every parameter in the compute dtype, autocast is on too (accelerate). `zero`:
    DeepSpeed casts the module to the compute dtype, no autocast.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = compute_dtype(recipe)
    name, revision, trust = recipe.model.name_or_path, recipe.model.revision, recipe.model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype if recipe.lora else torch.float32,
                attn_implementation=_attention(attn_implementation),
                trust_remote_code=trust,
            )
    except (OSError, ValueError) as error:
        raise PlanError(f"model.name_or_path: {name} cannot be simulated ({str(error).splitlines()[0]})") from None
    model.config.use_cache = False
    if depth is not None:
        del blocks_of(model)[depth:]
    if recipe.model.quantization:
        from transformers import BitsAndBytesConfig
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        four = recipe.model.quantization == "nf4"
        settings = BitsAndBytesConfig(
            load_in_4bit=four,
            load_in_8bit=not four,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        keep = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
        replace_with_bnb_linear(model, modules_to_not_convert=keep, quantization_config=settings)
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = four, not four
    if recipe.lora:
        from distft.train.model import add_adapters

        with torch.device("meta"):
            model = add_adapters(model, recipe)
    if layout != "autocast":
        for parameter in model.parameters():
            if parameter.is_floating_point() and _stored_bytes(parameter) is None:
                parameter.data = parameter.data.to(dtype)
    return model


def compute_dtype(recipe: Recipe) -> torch.dtype:
    from distft.train.model import compute_dtype

    return compute_dtype(recipe)


def _attention(name: str) -> str:
    """FlashAttention-2 by a name under which SDPA runs without a mask; flash-attn itself need not be there."""
    if name != "flash_attention_2":
        return "sdpa" if name == "auto" else name
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("distft_flash", sdpa_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register("distft_flash", lambda *args, **kwargs: None)
    return "distft_flash"


def blocks_of(model: Any) -> Any:
    """The ModuleList of the decoder's blocks: the longest one whose entries transformers does not split."""
    import torch

    whole = set(getattr(model, "_no_split_modules", None) or ())
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    return max(lists, key=lambda blocks: (type(blocks[0]).__name__ in whole, len(blocks)))


def _alike(blocks: Any) -> bool:
    """Whether all blocks have the same modules, shapes, dtypes and settings, so that one stands for any."""

    def signature(block: Any) -> list:
        shapes = [(name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()]
        settings = [
            (name, type(module).__name__, key, value)
            for name, module in block.named_modules()
            for key, value in sorted(vars(module).items())
            if isinstance(value, (bool, int, float, str)) and key not in ("layer_idx", "layer_id", "layer_number")
        ]
        return shapes + settings

    first = signature(blocks[0])
    return all(signature(block) == first for block in blocks)


def _materialise(model: Any) -> None:
    """Put tensors in the place of meta parameters and buffers: fake ones under a FakeTensorMode, else zeros."""
    import bitsandbytes as bnb
    import torch

    made: dict[int, Any] = {}
    for module in model.modules():
        kind = type(module)
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is None:
                    continue
                if id(old) not in made:
                    shape, dtype = old.shape, old.dtype
                    if kind is bnb.nn.Linear4bit and name == "weight":
                        shape, dtype = ((old.numel() + 1) // 2, 1), torch.uint8
                    elif kind is bnb.nn.Linear8bitLt and name == "weight":
                        dtype = torch.int8
                    new = torch.zeros(shape, dtype=dtype, device="cpu")
                    made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if store is module._parameters else new
                store[name] = made[id(old)]
        if kind is bnb.nn.Linear4bit:
            _quantise_nf4(module)
        elif kind is bnb.nn.Linear8bitLt:
            _quantise_int8(module)


def _quantise_nf4(linear: Any) -> None:
    """NF4 with double quantisation: an 8-bit scale per 64 weights, a float32 one per 256 scales: 0.516 bytes a weight
    (bitsandbytes functional.py, quantize_4bit)."""
    import torch
    from bitsandbytes.functional import QuantState

    shape = (linear.out_features, linear.in_features)
    scales = -(-shape[0] * shape[1] // 64)

    def zeros(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device="cpu")

    second = QuantState(absmax=zeros(-(-scales // 256)), code=zeros(256), blocksize=256, dtype=torch.float32)
    linear.weight.quant_state = QuantState(
        absmax=zeros(scales, torch.uint8),
        shape=torch.Size(shape),
        code=zeros(16),
        blocksize=64,
        quant_type="nf4",
        dtype=linear.compute_dtype,
        offset=zeros(1)[0],
        state2=second,
    )
    linear.compute_type_is_set = True


def _quantise_int8(linear: Any) -> None:
    """LLM.int8(): CUDA's autograd function (bitsandbytes takes another on a CPU), without outlier columns."""
    import torch
    from bitsandbytes.autograd._functions import MatMul8bitLt

    state, weight = linear.state, linear.weight
    state.CB, state.SCB = weight.data, torch.zeros(linear.out_features, device="cpu")
    state.threshold, state.has_fp16_weights = 0.0, False
    linear.forward = lambda x: MatMul8bitLt.apply(x, weight, None, linear.bias, state)


def make_optimizer(name: str, parameters: list) -> Any | None:
    """The class that transformers makes of `training.optim`; None where states are counted by formula.

    transformers 5 trainer_optimizer.py. On a GPU adamw_torch is torch's foreach version, whose square roots of all
    second moments are alive at once (torch/optim/adam.py, _multi_tensor_adam).
    """
    import torch

    if name.startswith("adamw_torch"):
        fused = name == "adamw_torch_fused"
        return torch.optim.AdamW(parameters, fused=fused, foreach=not fused)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, lr=1e-4, scale_parameter=False, relative_step=False)
    return None


def trace(
    recipe: Recipe,
    model: Any,
    *,
    layout: str,
    micro_batch_size: int,
    gradient_checkpointing: bool,
    attn_implementation: str,
    accumulating: bool = False,
    fake: bool = True,
    cuda: bool = True,
) -> Trace:
    """One optimizer step and one training step of a model from `build`, which is used up.

    `accumulating`: gradients of earlier micro-batches are there. `fake=False` runs it for real, on zeros; `cuda=False`
    keeps the CPU's own kernels.
    """
    import torch
    from accelerate.utils.operations import convert_outputs_to_fp32
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.autograd.graph import _engine_run_backward

    flash = attn_implementation == "flash_attention_2"
    length, dtype = recipe.data.max_length, compute_dtype(recipe)
    # FlashAttention gets the micro-batch as one row (distft/train/trainer.py, Collator).
    rows, columns = (1, micro_batch_size * length) if flash else (micro_batch_size, length)
    config = model.config.get_text_config()
    book = ledger(config.vocab_size, rows * columns)
    with contextlib.ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode())
        stack.enter_context(book)
        if cuda:
            stack.enter_context(cuda_kernels())
            # peft asks for CUDA's autocast by default (tuners/lora/bnb.py, requires_conversion).
            enabled = torch.is_autocast_enabled
            stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda device="cpu": enabled(device)))
        _materialise(model)
        for tensor in model.parameters():
            book.call(tensor, "parameters")
        for tensor in _quantisation_states(model):
            book.call(tensor, "parameters")
        for tensor in model.buffers():
            book.call(tensor, "buffers")
        model.train()
        if gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})

        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.register_post_accumulate_grad_hook(lambda p: book.call(p.grad, "gradients"))
        optimizer = _optimizer_step(recipe, trained, book)
        states = Counter(book.bytes)
        if not accumulating:
            for p in trained:
                p.grad = None

        _watch_blocks(model, book)
        forward = model.forward
        if layout != "zero" and dtype is not torch.float32:
            # accelerate/accelerator.py, prepare_model: autocast, and the outputs turned into float32.
            forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=dtype)(forward))
        book.enter("forward")
        ids = torch.zeros(rows, columns, dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if recipe.data.packing or flash:
            batch["position_ids"] = torch.zeros_like(ids)
        elif rows > 1:
            batch["attention_mask"] = torch.ones_like(ids)
        loss = _loss(forward, batch, torch.ones((), dtype=torch.long))
        book.enter("backward")
        # What loss.backward() does; that would turn the function mode off, and checkpointed blocks are computed again
        # in here.
        _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
        del loss, batch, ids, optimizer
        book.segment = ("end", None)
    return Trace({segment: bytes for segment, (_, bytes) in book.peaks.items()}, states)


def _loss(forward: Any, batch: dict[str, Any], tokens: Any) -> Any:
    """Trainer.compute_loss: the model's outputs, logits among them, live until it returns."""
    import inspect

    accepts = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    return forward(**batch, **({"num_items_in_batch": tokens} if accepts else {})).loss


def _optimizer_step(recipe: Recipe, trained: list, book: Any) -> Any | None:
    """The states of a step before, and the peak of a step ("optimizer"); leaves the gradients."""
    import torch

    for p in trained:
        p.grad = torch.zeros_like(p)
        book.call(p.grad, "gradients")
    optimizer = make_optimizer(recipe.training.optim, trained)
    if optimizer is None:
        book.enter("optimizer")
        return None
    book.segment = ("warm-up", None)
    optimizer.step()
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                book.call(value, "optimizer")
    book.enter("optimizer")
    optimizer.step()
    return optimizer


def _watch_blocks(model: Any, book: Any) -> None:
    """Tell the ledger which block is worked on: forward by a hook before it, backward by its output's gradient."""
    import torch

    blocks = blocks_of(model)

    def before(index: int) -> Any:
        def hook(*_: Any) -> None:
            if book.segment[0] == "forward":  # not when a checkpointed block is computed again
                book.enter("forward", index)

        return hook

    def after(index: int, last: bool) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            if book.segment[0] != "forward":
                return
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: book.enter("backward", index))
            if last:
                book.enter("loss")

        return hook

    for position, block in enumerate(blocks):
        index = position if position < 2 else position - len(blocks)
        block.register_forward_pre_hook(before(index))
        block.register_forward_hook(after(index, block is blocks[-1]))


def _quantisation_states(model: Any) -> Iterator[Any]:
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        state = getattr(module, "state", None)
        if getattr(state, "SCB", None) is not None:
            yield state.SCB


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
    for key, value in found.items():
        text = (
            value
            if not isinstance(value, int) or value < 2**20 or "parameters" in key[5:]
            else f"{value / 2**30:.2f} GiB"
        )
        print(f"{key:21}{text}")


if __name__ == "__main__":
    sys.exit(main())
