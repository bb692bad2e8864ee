"""A recipe's model without its weights: on the meta device, then with fake (or zero) tensors in their place."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import bitsandbytes as bnb
import torch
from transformers import AutoConfig

from distft.config.recipe import Recipe
from distft.errors import PlanError, SimulationError, first_line
from distft.models.attention import UNPADDED, planned_attention
from distft.models.quantization import (
    NF4,
    NF4_BLOCK,
    NF4_QUANT_TYPE,
    NF4_SCALE_BLOCK,
    disk_quantization,
    is_kept,
    stored_bytes,
)
from distft.models.shapes import read_config
from distft.models.vocabulary import new_token_count, rows_needed
from distft.planner import memory
from distft.planner.sharding import Muon, Sizes, Unit
from distft.strategies.deepspeed import PERSISTENT
from distft.train import low_rank, muon
from distft.train.auto_class import auto_class
from distft.train.model import add_adapters, compute_dtype, freeze


def build(recipe: Recipe, dtype_regime: str, attn_implementation: str) -> Any:
    """The model as distft/train/model.py makes it, on the meta device; see `base` and `finish`."""
    return finish(recipe, base(recipe, attn_implementation), dtype_regime)


def base(recipe: Recipe, attn_implementation: str) -> Any:
    """The base model on the meta device, without quantization and adapters; frozen where these are not asked for.

    Raises:
        PlanError: the config cannot be read, or transformers cannot build the model.
    """
    dtype = compute_dtype(recipe)
    name, revision, trust = recipe.model.name_or_path, recipe.model.revision, recipe.model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
        if recipe.model.add_tokens:
            text = config.get_text_config()
            text.vocab_size = rows_needed(recipe, text.vocab_size)
        with torch.device("meta"):
            model = auto_class(config.model_type).from_config(
                config,
                dtype=dtype if recipe.lora else torch.float32,
                attn_implementation=_attention(attn_implementation),
                trust_remote_code=trust,
            )
    except ImportError as error:  # Gemma 3n's vision tower is timm's
        raise PlanError(f"model.name_or_path: {name}: {first_line(error).partition(' but ')[0]}: install it") from None
    except KeyError as error:  # Falcon has its own table of attention classes
        if str(error) != "'distft_unmasked'":
            raise failure(recipe, error) from error
        why = f"{config.model_type} has no {attn_implementation} that runs without its kernel"
        raise SimulationError(f"model.name_or_path: {name} cannot be simulated ({why})") from None
    except Exception as error:  # transformers' own, those of configs that it checks, and those of a model's own code
        if attn_implementation == "sdpa" and "scaled_dot_product_attention" in str(error):
            return base(recipe, "eager")  # `auto`, of a class that has FlashAttention only; eager keeps more
        raise failure(recipe, error, "built by the installed transformers") from error
    model.config.use_cache = False
    if recipe.lora is None:
        freeze(model, recipe)
    return model


def failure(recipe: Recipe, error: Exception, what: str = "simulated") -> SimulationError:
    """An error that says why a model cannot be simulated, or built."""
    lines = str(error).strip().splitlines()
    why = lines[-1].strip() if type(error).__name__.startswith("Strict") else lines[0] if lines else ""
    text = why if isinstance(error, (OSError, ValueError)) and why else f"{type(error).__name__}: {why}"
    return SimulationError(f"model.name_or_path: {recipe.model.name_or_path} cannot be {what} ({text})")


def finish(recipe: Recipe, model: Any, dtype_regime: str) -> Any:
    """Quantize a base model, add adapters and cast it.

    Args:
        dtype_regime: what the strategy computes in. `autocast` (DDP): trained parameters are float32, and autocast
            casts on the way. `fsdp`: FSDP2 gathers every parameter in the compute dtype, with autocast on as well
            (accelerate). `zero`: DeepSpeed casts the module to the compute dtype, without autocast.

    Raises:
        PlanError: the adapters of the recipe cannot be added.
    """
    dtype = compute_dtype(recipe)
    if recipe.model.quantization:
        from transformers import BitsAndBytesConfig
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        four = recipe.model.quantization == "nf4"
        stored = {**NF4, "bnb_4bit_compute_dtype": dtype} if four else {"load_in_8bit": True}
        settings = BitsAndBytesConfig(**stored)
        stored_config = model.config.to_dict()
        keep = [
            name
            for name, module in model.named_modules()
            if module is model.get_output_embeddings() or is_kept(stored_config, name)
        ]
        replace_with_bnb_linear(model, modules_to_not_convert=keep, quantization_config=settings)
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = four, not four
        model.config._is_quantized = True  # Falcon-Mamba and Jamba then call dt_proj, instead of reading its weight
    if recipe.lora:
        try:
            with torch.device("meta"), dequantized_for_dora():
                model = add_adapters(model, recipe, range(new_token_count(recipe)))
        except ValueError as error:  # peft's, such as a layer that cannot have an adapter
            raise PlanError(f"lora.target_modules: {str(error).splitlines()[0]}") from None
    if dtype_regime != "autocast":
        for parameter in model.parameters():
            if parameter.is_floating_point() and _stored_bytes(parameter) is None:
                parameter.data = parameter.data.to(dtype)
    return model


def dequantized_for_dora() -> Any:
    """A patch for DoRA, which needs the norms of the weights: bitsandbytes cannot dequantize tensors without values."""

    def dequantized(module: Any) -> torch.Tensor:
        if not isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            return module.weight
        dtype = getattr(module, "compute_dtype", torch.float16)  # LLM.int8() uses float16, whatever the input
        return torch.empty((module.out_features, module.in_features), dtype=dtype, device=module.weight.device)

    return patch("peft.tuners.lora.dora.dequantize_module_weight", dequantized)


def _attention(name: str) -> str:
    """For FlashAttention-2 and varlen, a name under which SDPA runs without a mask, so that neither a kernel nor
    flash-attn is needed.

    There is no "flash" in that name: transformers would look for such a kernel.
    """
    if name not in UNPADDED:
        return planned_attention(name)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(*args: Any, softcap: float | None = None, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)  # SDPA refuses softcap; FlashAttention keeps nothing for it

    ALL_ATTENTION_FUNCTIONS.register("distft_unmasked", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("distft_unmasked", lambda *args, **kwargs: None)
    return "distft_unmasked"


def blocks_of(model: Any) -> Any:
    """The ModuleList of the decoder's blocks: the longest one, first among those that transformers does not split."""
    whole = set(getattr(model, "_no_split_modules", None) or ())
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    return max(lists, key=lambda blocks: (type(blocks[0]).__name__ in whole, len(blocks)))


def materialize(model: Any) -> None:
    """Replace meta parameters and buffers by tensors: fake ones under a FakeTensorMode, else zeros."""
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
            _quantize_nf4(module)
        elif kind is bnb.nn.Linear8bitLt:
            _quantize_int8(module)


def _quantize_nf4(linear: Any) -> None:
    """Add what bitsandbytes keeps beside an NF4 weight (functional.py, quantize_4bit)."""
    from bitsandbytes.functional import QuantState

    shape = (linear.out_features, linear.in_features)
    scales = -(-shape[0] * shape[1] // NF4_BLOCK)

    def zeros(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device="cpu")

    second = QuantState(
        absmax=zeros(-(-scales // NF4_SCALE_BLOCK)),
        code=zeros(256),
        blocksize=NF4_SCALE_BLOCK,
        dtype=torch.float32,
    )
    linear.weight.quant_state = QuantState(
        absmax=zeros(scales, torch.uint8),
        shape=torch.Size(shape),
        code=zeros(16),
        blocksize=NF4_BLOCK,
        quant_type=NF4_QUANT_TYPE,
        dtype=linear.compute_dtype,
        offset=zeros(1)[0],
        state2=second,
    )
    linear.compute_type_is_set = True


def _quantize_int8(linear: Any) -> None:
    """Prepare a layer for LLM.int8(): CUDA's autograd function (bitsandbytes has another for CPUs), no outliers."""
    from bitsandbytes.autograd._functions import MatMul8bitLt

    state, weight = linear.state, linear.weight
    state.CB, state.SCB = weight.data, torch.zeros(linear.out_features, device="cpu")
    state.threshold, state.has_fp16_weights = 0.0, False
    linear.forward = lambda x: MatMul8bitLt.apply(x, weight, None, linear.bias, state)


def sizes_of(recipe: Recipe, model: Any) -> Sizes:
    """What there is to divide among ranks, counted on a model that is on the meta device."""
    low = compute_dtype(recipe).itemsize
    blocks, embedding, head = blocks_of(model), model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight

    def size(p: Any) -> int:
        return _stored_bytes(p) or low * p.numel()

    def unit(parameters: list[Any]) -> Unit:
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
        block=max((unit(list(block.parameters())) for block in blocks), key=lambda unit: (unit.bytes, unit.trained)),
        tail=unit([p for p in everything if id(p) not in inside]),
        largest_module=max(sum(size(p) for p in module.parameters(recurse=False)) for module in model.modules()),
        small_bytes=low * sum(p.numel() for p in everything if p.numel() < PERSISTENT),
        bnb_bytes=sum(memory.bnb_state_bytes(recipe.training.optim, p.numel(), p is embedding.weight) for p in trained),
        tied=tied,
        largest_tensor=max(p.numel() for p in everything),
        stored_quantized=bool(disk_quantization(read_config(recipe))),
        muon=Muon.of((tuple(p.shape) for p in (muon.matrices(model) if recipe.training.optim == "muon" else ())), low),
        low_rank=memory.low_rank_of(recipe, [tuple(p.shape) for p in _low_rank(recipe, model)]),
        wide=memory.wide_bytes(recipe),
        block_inputs=(len(blocks), getattr(model.config.get_text_config(), "hidden_size", 0)),
    )


def _low_rank(recipe: Recipe, model: Any) -> list[Any]:
    return low_rank.matrices(model, recipe.training.optim_target_modules) if recipe.low_rank else []


def states_of(recipe: Recipe, model: Any, sizes: Sizes) -> Counter[str]:
    """Bytes of the states under DDP, of buffers, and of what an optimizer's step needs besides (planner/memory.py)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    buffers = {id(b): b.numel() * b.element_size() for b in model.buffers()}
    shapes = [tuple(p.shape) for p in trained]
    return Counter(
        {
            **memory.ddp_states(recipe, sizes, shapes),
            "buffers": sum(buffers.values()),
            "optimizer step": memory.optimizer_step_bytes(recipe.training.optim, sizes),
        }
    )


def _stored_bytes(parameter: Any) -> int | None:
    """Bytes of a quantized weight; None for any other parameter."""
    kind = {"Params4bit": "nf4", "Int8Params": "int8"}.get(type(parameter).__name__)
    return stored_bytes(kind, parameter.numel(), parameter.shape[0]) if kind else None
