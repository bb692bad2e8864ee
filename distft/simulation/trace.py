"""One training step under a ledger of live storages: on fake tensors, or on real ones for comparison."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate.utils.operations import convert_outputs_to_fp32
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import _engine_run_backward, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from distft.config.recipe import Recipe
from distft.models.attention import UNPADDED
from distft.models.chunks import chunk_tokens
from distft.simulation.fake_model import blocks_of, dequantized_for_dora, materialize
from distft.train import chunked_loss, kahan, low_rank, muon
from distft.train.losses import mean_loss
from distft.train.model import compute_dtype
from distft.train.offload import offload_block_inputs

# (moment, block or None). Blocks 0 and 1 are counted from the bottom, the others from the top (-1 is the last).
Segment = tuple[str, "int | None"]


@dataclass(frozen=True)
class Trace:
    """Live bytes by kind at the peak of every segment of a step."""

    peaks: dict[Segment, Counter[str]]
    states: Counter[str]  # bytes of all parameters, gradients, optimizer states and buffers
    starts: dict[Segment, Counter[str]]  # live bytes where a segment begins
    operators: Counter[Segment]  # that ran
    outputs: tuple[torch.dtype | None, ...]  # of each block, which returns a tensor alone; None where it returns more
    has_loops: bool = False  # some blocks are drawn from shorter rows (loops.py)

    def total(self, segment: Segment) -> int:
        return sum(self.peaks[segment].values())


class LongLoopError(Exception):
    """A block that runs too many operators to trace it at this length."""


class Ledger(TorchDispatchMode):
    """Counts live storages, each once, however many views it has.

    Storages rather than tensors, by weak reference: a storage's Python object lives as long as the storage.
    """

    def __init__(self, vocab_size: int, tokens: int, most_operators: int | None) -> None:
        super().__init__()
        self.operators: Counter[Segment] = Counter()
        self.most_operators = most_operators
        self.outputs: list[torch.dtype | None] = []
        self.vocab_size, self.entries = vocab_size, tokens * vocab_size
        self.live: dict[int, list[Any]] = {}  # id of the storage → [weak reference, bytes, kind]
        self.bytes: Counter[str] = Counter()
        self.total = 0
        self.segment: Segment = ("forward", None)
        self.peaks: dict[Segment, tuple[int, Counter[str]]] = {}
        self.starts: dict[Segment, Counter[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # two of three calls
            return args[0].fake_device
        self.operators[self.segment] += 1
        if self.most_operators and self.operators[self.segment] > self.most_operators and self.segment[0] == "forward":
            raise LongLoopError
        if func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            func = _grouped_mm if args[0].dtype is not torch.bfloat16 else func
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                logits = leaf.dim() > 1 and leaf.shape[-1] == self.vocab_size and leaf.numel() >= self.entries
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
        """Count a tensor as this kind."""
        self.count(tensor, kind)
        entry = self.live[id(tensor.untyped_storage())]
        self.bytes[entry[2]] -= entry[1]
        self.bytes[kind] += entry[1]
        entry[2] = kind

    def enter(self, moment: str, block: int | None = None) -> None:
        self.segment = (moment, block)
        self.starts[self.segment] = Counter(self.bytes)
        self.look()

    def look(self, workspace: int = 0) -> None:
        if self.total + workspace > self.peaks.get(self.segment, (-1,))[0]:
            self.peaks[self.segment] = (self.total + workspace, Counter(self.bytes))
            self.peaks[self.segment][1]["activations"] += workspace


def _grouped_mm(first: torch.Tensor, second: torch.Tensor, offs: Any = None, *_: Any, **__: Any) -> torch.Tensor:
    """The product of other dtypes than bf16, which torch's kernels multiply group by group into one output, and whose
    shape it refuses to tell (_meta_registrations.py, _meta_grouped_mm_common)."""
    groups = (offs.shape[0],) if first.dim() == second.dim() == 2 else ()
    groups = (first.shape[0],) if first.dim() == second.dim() == 3 else groups
    return first.new_empty((*groups, first.shape[-2], second.shape[-1]))


def _workspace(func: Any, args: tuple) -> int:
    """Bytes of large temporaries inside one operator, which no dispatch mode sees.

    bitsandbytes gemm_4bit dequantizes the matrix for more than some 1500 tokens (backends/cuda/ops.py,
    _dequant_linear_fallback). FlashAttention-2's backward sums dq in float32 and, with fewer key than query heads,
    computes dk and dv for every query head (ATen flash_attn/flash_api.cpp, mha_bwd: dq_accum, dk_expanded). Softmax
    backward first multiplies the gradient by the output (ATen native/cuda/SoftMax.cu, softmax_backward_cuda_out).
    """
    name = "" if func is _grouped_mm else func.name()
    if name == "bitsandbytes::gemm_4bit":
        return args[2][0] * args[2][1] * args[0].element_size()
    if name == "aten::_scaled_dot_product_flash_attention_backward":
        query, key = args[1], args[2]
        expanded = 2 * query.numel() * query.element_size() if key.shape[1] != query.shape[1] else 0
        return 4 * query.numel() + expanded
    if name == "aten::_softmax_backward_data":
        return args[0].numel() * args[0].element_size()
    return 0


_NAMES = "softmax log_softmax layer_norm group_norm pow rsqrt exp expm1 log log1p cumsum cumprod sum prod norm"
_NAMES += " softplus cosh sinh tan acos asin cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss kl_div"
_OWNERS = (torch, torch.Tensor, F, torch._C._nn)
# What CUDA's autocast computes in float32 (ATen autocast_mode.h, AT_FORALL_FP32 and its set_opt_dtype).
FLOAT32 = {getattr(owner, name) for name in _NAMES.split() for owner in _OWNERS if hasattr(owner, name)}
FLOAT32 |= {torch.Tensor.__pow__, torch.Tensor.__rpow__}


SOME_EXPERTS = 16  # of which a loop over experts finds tokens


class Values(TorchFunctionMode):
    """Answers what a model asks of values, which fake tensors do not have.

    Positions: the last one of a row, on which rotary scaling depends. Experts: a loop over those that have tokens
    (experts.nonzero(), then torch.where for the tokens of each) finds all of them, or `most`, and the same number of
    tokens for each; a list of their numbers of tokens (tolist) divides the last topk evenly.
    """

    def __init__(self, row: int, most: int | None) -> None:
        super().__init__()
        self.row, self.most, self.experts, self.chosen = row, most, 1, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is None:
            return func(*args, **kwargs)
        whole = first.dtype is torch.long
        if func in (torch.max, torch.Tensor.max) and whole and len(args) == 1 and not kwargs:
            return torch.tensor(self.row - 1)
        if func is torch.Tensor.nonzero and first.dim() == 1:
            found = first.numel() - first.numel() % 2  # an odd number has one that stands for no expert
            self.experts = min(max(1, found), self.most or found)
            return [torch.tensor([expert]) for expert in range(self.experts)]
        if func is torch.where and len(args) == 1:
            share = -(-first.numel() // self.experts)
            return tuple(torch.zeros(share, dtype=torch.long) for _ in range(first.dim()))
        if func in (torch.topk, torch.Tensor.topk):
            found = func(*args, **kwargs)
            self.chosen = found[1].numel()
            return found
        return func(*args, **kwargs)

    def tolist(self, tensor: Any) -> list[int]:
        """For FakeTensor.tolist, which no function mode sees."""
        each, more = divmod(self.chosen, tensor.numel())
        return [each + (expert < more) for expert in range(tensor.numel())]


class CudaKernels(TorchFunctionMode):
    """Gives CPU tensors the shapes and dtypes that they would have on a CUDA GPU.

    Fake CUDA tensors do not work: without a GPU autograd aborts ("PyTorch is not linked with support for cuda
    devices"), and torch.autocast turns itself off.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.softmax and kwargs.get("dtype") is torch.float32 and args[0].dtype is torch.float16:
            return torch.ops.aten._softmax(args[0], kwargs["dim"], True)  # one kernel; of bf16 a copy is made first
        if func in FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, _float32, (args, kwargs))
        return func(*args, **kwargs)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **rest: Any,
) -> Any:
    """FlashAttention keeps q, k, v, the output and float32 log-sums. With a mask, or in float32, the memory-efficient
    kernel keeps the mask too, converted to the compute dtype again in every layer (ATen
    native/transformers/attention.cpp, convert_boolean_attn_mask)."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    query, key, value = (t.to(dtype) for t in (query, key, value))
    aten, scale = torch.ops.aten, rest.get("scale")
    one_size = query.shape[-1] == value.shape[-1] <= 256  # MLA's values are smaller, which FlashAttention refuses
    if attn_mask is None and dtype is not torch.float32 and one_size:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if rest.get("enable_gqa"):
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.where(attn_mask, torch.zeros((), dtype=dtype), torch.full((), -torch.inf, dtype=dtype))
        attn_mask = attn_mask.to(dtype).expand(query.shape[0], query.shape[1], -1, -1)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """CUDA keeps a bool mask, the CPU a mask in the input's dtype."""
    return torch.native_dropout(input, p, True)[0] if training and p else input


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def make_optimizer(recipe: Recipe, model: Any) -> Any | None:
    """The optimizer that is made for `training.optim`; None where states are counted by formula.

    transformers 5 trainer_optimizer.py. On a GPU adamw_torch is torch's foreach version, in which the square roots of
    all second moments are live at once (torch/optim/adam.py, _multi_tensor_adam).
    """

    name, parameters = recipe.training.optim, [p for p in model.parameters() if p.requires_grad]
    if name == "muon":
        dtype = torch.float32 if recipe.training.mixed_precision == "no" else torch.bfloat16
        return muon.make(model, (), lr=1e-4, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, dtype=dtype)
    if recipe.low_rank is not None:
        # The second step, which is recorded, chooses directions, too.
        often = recipe.low_rank.model_copy(update={"update_proj_gap": 1})
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"optim_args": often})})
        return low_rank.make(model, recipe, (), lr=1e-4, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    if recipe.training.is_pure_bf16:
        return kahan.make(model, (), lr=1e-4, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
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
    dtype_regime: str,
    micro_batch_size: int,
    gradient_checkpointing: bool,
    attn_implementation: str,
    accumulating: bool = False,
    chunked: bool = False,
    fake: bool = True,
    cuda: bool = True,
    most_operators: int | None = None,
    left_out: Mapping[int, torch.dtype] | None = None,
) -> Trace:
    """One optimizer step and one training step of a model from `build`, which is consumed.

    Args:
        accumulating: gradients of earlier micro-batches exist.
        chunked: the loss is computed in chunks.
        fake: False runs it on real tensors of zeros.
        cuda: False keeps the CPU's own kernels.
        most_operators: of a block's forward pass.
        left_out: blocks that only hand on what they get, by their positions: the dtype in which they do.

    Raises:
        LongLoopError: a block ran more operators than that.
    """

    flash = attn_implementation in UNPADDED
    length, dtype = recipe.data.max_length, compute_dtype(recipe)
    # FlashAttention gets the micro-batch as one row (distft/train/trainer.py, Collator).
    rows, columns = (1, micro_batch_size * length) if flash else (micro_batch_size, length)
    config = model.config.get_text_config()
    tokens = rows * columns
    logits = min(tokens, chunk_tokens(config.vocab_size)) if chunked else tokens
    book = Ledger(config.vocab_size, logits, most_operators)
    with contextlib.ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode())
            stack.enter_context(dequantized_for_dora())
            # Experts under adapters are in the compute dtype: autocast makes no copy of each, and some stand for all.
            values = stack.enter_context(Values(columns, SOME_EXPERTS if recipe.lora else None))
            stack.enter_context(patch.object(FakeTensor, "tolist", lambda tensor: values.tolist(tensor)))
            stack.enter_context(patch.object(chunked_loss, "trained_tokens", lambda found: torch.arange(len(found))))
        stack.enter_context(book)
        if cuda:
            stack.enter_context(CudaKernels())
            # By default peft asks about CUDA's autocast (tuners/lora/bnb.py, requires_conversion).
            enabled = torch.is_autocast_enabled
            stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda device="cpu": enabled(device)))
        if not (recipe.data.packs or flash):
            # It looks at position ids, and where it cannot (they are fake) assumes that rows are packed.
            stack.enter_context(patch("transformers.masking_utils.find_packed_sequence_indices", lambda _: None))
        materialize(model)
        for tensor in model.parameters():
            book.call(tensor, "parameters")
        for tensor in _quantization_states(model):
            book.call(tensor, "parameters")
        for tensor in model.buffers():
            book.call(tensor, "buffers")
        model.train()
        if gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            if recipe.training.activation_offloading:
                offload_block_inputs(model, partial(saved_tensors_hooks, _gone, _again))

        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.register_post_accumulate_grad_hook(lambda p: book.call(p.grad, "gradients"))
        optimizer = _optimizer_step(recipe, model, book)
        states = Counter(book.bytes)
        if not accumulating:
            for p in trained:
                p.grad = None

        _watch_blocks(model, book)
        for position, as_dtype in (left_out or {}).items():
            blocks_of(model)[position].forward = partial(_hand_on, as_dtype)
        if chunked:
            chunked_loss.add(model if recipe.lora is None else model.get_base_model())
        forward = model.forward
        if dtype_regime != "zero" and dtype is not torch.float32:
            # accelerate/accelerator.py, prepare_model: autocast, and outputs converted to float32.
            forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=dtype)(forward))
        book.enter("forward")
        ids = torch.zeros(rows, columns, dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if recipe.data.packs or flash:
            batch["position_ids"] = torch.zeros_like(ids)
        elif rows > 1:
            batch["attention_mask"] = torch.ones_like(ids)
        count = torch.ones((), dtype=torch.long)
        if chunked:
            loss = forward(**batch, chunked=recipe.training.loss_type, num_items_in_batch=count).loss
        else:
            loss = _loss(forward, batch, count, recipe.training.loss_type)
        book.enter("backward")
        # As loss.backward(), which would turn the function mode off; checkpointed blocks are recomputed in here.
        _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
        book.enter("end")
        del loss, batch, ids, optimizer
    peaks = {segment: bytes for segment, (_, bytes) in book.peaks.items()}
    return Trace(peaks, states, book.starts, book.operators, tuple(book.outputs))


def _gone(tensor: torch.Tensor) -> Any:
    """What is left of a tensor that went to the host."""
    return tensor.shape, tensor.stride(), tensor.dtype


def _again(found: Any) -> torch.Tensor:
    shape, stride, dtype = found
    return torch.empty_strided(shape, stride, dtype=dtype)


def _hand_on(as_dtype: torch.dtype, hidden_states: Any, *_: Any, **__: Any) -> Any:
    """A block that does nothing, through which gradients go all the same."""
    return hidden_states.to(as_dtype) + torch.zeros((), dtype=as_dtype, requires_grad=True)


def _loss(forward: Any, batch: dict[str, Any], tokens: Any, loss_type: str) -> Any:
    """As Trainer.compute_loss: the model's outputs, including logits, live until it returns."""

    if loss_type != "nll":
        labels = batch.pop("labels")
        outputs = forward(**batch)
        return mean_loss(loss_type)(outputs, labels, tokens)
    accepts = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    return forward(**batch, **({"num_items_in_batch": tokens} if accepts else {})).loss


def _optimizer_step(recipe: Recipe, model: Any, book: Any) -> Any | None:
    """Create optimizer states with a first step, and record the peak of a second one ("optimizer"); gradients stay."""

    for p in (p for p in model.parameters() if p.requires_grad):
        p.grad = torch.zeros_like(p)
        book.call(p.grad, "gradients")
    optimizer = make_optimizer(recipe, model)
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


def block_number(position: int, count: int) -> int:
    """A block's number in a Segment, of `count` blocks."""
    return position if position < 2 else position - count


def _watch_blocks(model: Any, book: Any) -> None:
    """Tell the ledger which block runs: forward by a hook before it, backward by a hook on its output's gradient."""

    blocks = blocks_of(model)

    def before(index: int) -> Any:
        def hook(*_: Any) -> None:
            if book.segment[0] == "forward":  # not when a checkpointed block is recomputed
                book.enter("forward", index)

        return hook

    def after(index: int, last: bool) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            if book.segment[0] != "forward":
                return
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            book.outputs.append(hidden.dtype if hidden is output else None)
            if hidden.requires_grad:
                hidden.register_hook(lambda _: book.enter("backward", index))
            if last:
                book.enter("loss")

        return hook

    for position, block in enumerate(blocks):
        index = block_number(position, len(blocks))
        block.register_forward_pre_hook(before(index))
        block.register_forward_hook(after(index, block is blocks[-1]))


def _quantization_states(model: Any) -> Iterator[Any]:
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        scale = getattr(getattr(module, "state", None), "SCB", None)
        if scale is not None:
            yield scale
