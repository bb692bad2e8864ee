"""Builds the model of a recipe on every rank: dtype, attention, quantization, adapters."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig, FineGrainedFP8Config, PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
)
from transformers.utils.quantization_config import Mxfp4Config

from distft.config.recipe import NOT_OF_PEFT, Lora, Recipe
from distft.errors import DataError, first_line
from distft.models.adaptable import left_out, reason
from distft.models.attention import FLASH, no_flash_attention, no_varlen, plain_attention
from distft.models.freezing import frozen, named, without_gradient
from distft.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, changes_base, check_options, check_saved, kept, matcher
from distft.models.oft import peft_fields
from distft.models.quantization import NF4
from distft.strategies.kinds import KINDS
from distft.train import varlen
from distft.train.auto_class import auto_class
from distft.train.base_files import base_files, check_base_layers, check_missing, check_shapes, stored_quantization
from distft.train.conversion import Conversion, parameter_shapes, without_weights
from distft.train.initial import InitialAdapter
from distft.train.mergeable import saved_modules
from distft.train.new_rows import add_new_rows, grow, new_rows
from distft.train.special_tokens import new_tokens
from distft.train.streaming import Stream, cast

log = logging.getLogger("distft")

# Classes of modules that peft can put an adapter on.
ADAPTABLE = (torch.nn.Linear, Conv1D, torch.nn.Conv2d, torch.nn.Embedding)
# Of each FlashAttention: whether it is there, its package, and the module that transformers imports.
PACKAGES = {
    "flash_attention_4": (is_flash_attn_4_available, "flash-attn-4", "flash_attn.cute"),
    "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3", "flash_attn_interface"),
    "flash_attention_2": (is_flash_attn_2_available, "flash-attn", "flash_attn"),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype in which matrices are multiplied."""
    return DTYPES[recipe.training.mixed_precision]


def choose_attention(recipe: Recipe, config: Mapping[str, Any]) -> str:
    """The attention implementation; what `auto` means here (models/attention.py) is logged with the reason.

    Raises:
        DataError: `varlen` is asked for, and this GPU cannot run it.
    """
    wanted = recipe.model.attn_implementation
    varlen.register()
    if wanted == "varlen" and (why := varlen.fails(compute_dtype(recipe))):
        raise DataError(f"model.attn_implementation: varlen: {why}; use auto")
    if wanted != "auto":
        return wanted
    device, capability = "cpu", None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        device, capability = "cuda", major + minor / 10
    for name in FLASH:  # the last one can do whatever the others can
        no_kernel = no_flash_attention(device, capability, recipe.training.mixed_precision, config, name)
        why = no_kernel or _missing(name)
        if not why:
            log.info("attention: %s", name)
            return name
    if not no_kernel and recipe.data.packs:
        other = no_varlen(config) or varlen.fails(compute_dtype(recipe))
        if not other:
            log.info("attention: varlen (%s)", why)
            return "varlen"
        why = f"{why}; varlen: {other}"
    kind = config.get("model_type")
    found = plain_attention(kind)
    log.info("attention: %s (%s%s)", found, why, "" if found == "sdpa" else f"; {kind} models have no sdpa")
    return found


def _missing(name: str) -> str | None:
    """Why the package of a FlashAttention cannot be used; None where it can."""
    is_available, package, module = PACKAGES[name]
    if not is_available():
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except ImportError as error:  # built for another torch or CUDA
        return f"{package} cannot be imported: {error}"
    return None


def quantization_config(recipe: Recipe, strategy: str) -> Any:
    """bitsandbytes' settings; for a base that is stored in mxfp4 or FP8, to dequantize it; None for plain weights.

    Strategies that shard parameters need all of them in one dtype, so there the 4-bit weights are stored in the compute
    dtype (peft docs, "bnb_4bit_quant_storage"; accelerate#3983 for what uint8 does under FSDP2).
    """
    dtype = compute_dtype(recipe)
    if recipe.model.quantization == "nf4":
        return BitsAndBytesConfig(
            **NF4,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if KINDS[strategy].shards_parameters else torch.uint8,
        )
    if recipe.model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # Whether transformers dequantizes these by itself depends on the GPU and on packages.
    stored = stored_quantization(recipe).get("quant_method")
    if stored == "mxfp4":
        return Mxfp4Config(dequantize=True)
    return FineGrainedFP8Config(dequantize=True) if stored == "fp8" else None


def build_model(
    recipe: Recipe,
    strategy: str,
    eos_token_id: int | None = None,
    initial: InitialAdapter | None = None,
    stream: Stream | None = None,
) -> PreTrainedModel | Any:
    """Load the base model and wrap it with the adapters.

    Trained weights are float32: they are the optimizer's masters, and autocast or the strategy casts them for use. With
    training.master_weights: none they are bf16.
    Frozen weights are in the compute dtype, including norms and embeddings of a quantized base: the same numbers under
    every strategy, and transformers' norms compute in float32 anyway.

    Args:
        initial: where an adapter that changes the base (PiSSA, OLoRA) has its first weights.
        eos_token_id: the tokenizer's, for the model's configs where the recipe names another than the model's.
        stream: gives the weights later, as the model is sharded; here for ZeRO-3, and in `stream.around` for FSDP2.

    Raises:
        DataError: the weights cannot be read, or some are missing.
    """
    kind = KINDS[strategy]
    # DeepSpeed casts what it does not make itself to the compute dtype: only the peak of loading would be higher.
    low = recipe.lora is not None or kind.zero_stage in (1, 2) or recipe.training.is_pure_bf16
    quantization = quantization_config(recipe, strategy)
    options: dict[str, Any] = {}
    if quantization is not None:
        options["quantization_config"] = quantization
    if kind.zero_stage != 3 and (quantization is not None or not kind.shards_parameters):
        # Straight to this rank's GPU: each rank would have all of the model in host memory. zero.Init does it itself.
        options["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    name = recipe.model.name_or_path
    source = {"revision": recipe.model.revision, "trust_remote_code": recipe.model.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **source)
        with stream.instead() if stream else contextlib.nullcontext():
            found: Any = auto_class(config.model_type).from_pretrained(
                name,
                **source,
                use_safetensors=True,
                dtype=compute_dtype(recipe) if low else torch.float32,
                attn_implementation=choose_attention(recipe, config.to_dict()),
                output_loading_info=True,
                **options,
            )
    except OSError as error:
        raise DataError(f"model.name_or_path: {name} cannot be loaded ({error})") from error
    except RuntimeError:  # transformers says which tensor it is in its log alone, and under ZeRO-3 among all others
        if not stored_quantization(recipe):
            with without_weights():
                whole = auto_class(config.model_type).from_config(config, trust_remote_code=source["trust_remote_code"])
            stored = Conversion(whole, base_files(recipe).shapes()).shapes
            check_shapes(recipe, whole, stored, parameter_shapes(whole))
        raise
    except ValueError as error:
        if "attention implementation" not in str(error):
            raise
        raise DataError(f"model.attn_implementation: {first_line(error).partition('. ')[0]}; use auto") from None
    model, loaded = found
    check_missing(recipe, model, loaded["missing_keys"])
    # Under ZeRO-3 transformers keeps all conversions it knows, also those that did nothing, and would undo them.
    model._weight_conversions = [c for c in getattr(model, "_weight_conversions", None) or () if c.was_used()]
    model.config.use_cache = False
    tokens = new_tokens(recipe)
    if stream and tokens.ids:
        stream.fill_layers(model, model.get_input_embeddings(), model.get_output_embeddings())
    grow(model, tokens)
    if recipe.model.eos_token is not None:
        for config in (model.config.get_text_config(), model.generation_config):
            config.eos_token_id = eos_token_id
    if recipe.lora is None:
        freeze(model, recipe)
        return model
    model = add_adapters(model, recipe, tokens.ids, initial)
    if kind.zero_stage == 3:
        # DeepSpeed does not cast a model of which zero.Init made any part (engine.py, _cast_module_mixed_precision):
        # peft's float32 adapters would compute in float32 and keep a float32 copy of every layer's input.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(compute_dtype(recipe))
        if stream:
            stream.shard_zero3(model)
    return model


def freeze(model: PreTrainedModel, recipe: Recipe) -> None:
    """Freeze what training.train_only leaves out, and what text does not go through or no gradient reaches: DDP would
    wait for gradients of the latter, and AdamW's decay would shrink them.

    Raises:
        PlanError: training.train_only names nothing of this model.
    """
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    shared = {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    kept = without_gradient(parameters)  # in float32: rounded, they would choose other experts
    for name in frozen(parameters, named(parameters, recipe.training.train_only, shared)):
        parameters[name].requires_grad = False
        if name not in kept:
            cast(parameters[name], compute_dtype(recipe))
    if recipe.training.is_pure_bf16:
        for parameter in model.parameters():  # transformers loads some classes' norms in float32
            if parameter.requires_grad and parameter.dtype != torch.bfloat16:
                cast(parameter, torch.bfloat16)


def peft_options(lora: Lora, model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of peft's LoraConfig, or OFTConfig, for a base model without adapters.

    Raises:
        PlanError: an option is about layers that the model lacks.
    """
    options = lora.model_dump(exclude=NOT_OF_PEFT) | {"modules_to_save": lora.modules_to_save or None}
    if lora.oft:
        options |= peft_fields(lora.oft)
    check_saved(lora, [name for name, module in model.named_modules() if any(True for _ in module.parameters(False))])
    modules = {name: module for name, module in model.named_modules() if isinstance(module, ADAPTABLE)}
    if lora.target_modules == "all-linear":
        head = model.get_output_embeddings()
        targets = [name for name, m in modules.items() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
        if lora.layers_to_transform is not None:  # which peft has with a list of parts of names only
            options |= {"target_modules": list(filter(kept(lora), targets)), "layers_to_transform": None}
    else:
        targets = list(filter(matcher(lora.target_modules), modules))
    patterns = left_out(name for name, _ in model.named_parameters())
    check_options(lora, targets, [name for name in targets if reason(name, patterns)])
    if patterns:
        excluded = lora.exclude_modules or []
        if not isinstance(excluded, str):
            excluded = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, excluded))})" if excluded else ""
        options["exclude_modules"] = "|".join(f"(?:{pattern})" for pattern in (*patterns, *filter(None, [excluded])))
    return options


def _train_in_float32(module: torch.nn.Module) -> None:
    """Make a copy of a layer float32, as adapters are, that gives what is around it the dtype that the layer gave."""
    dtype = next(module.parameters()).dtype
    module.float()

    def cast(module: Any, inputs: Any, output: Any) -> Any:
        return output.to(dtype) if dtype != torch.float32 and torch.is_tensor(output) else output

    module.register_forward_hook(cast)


def add_adapters(
    model: PreTrainedModel, recipe: Recipe, tokens: Sequence[int] = (), initial: InitialAdapter | None = None
) -> Any:
    """Freeze the base and wrap it with the adapters of a recipe that has some, initialized from its seed.

    Args:
        tokens: ids of model.add_tokens, whose rows are trained too.
        initial: as build_model; without it, the base stays as it is.

    Raises:
        DataError: lora.start_from holds an adapter of another model, or base.
        PlanError: an option is about layers that the model lacks.
        RecipeError: rows of this model cannot be trained beside adapters.
    """
    from peft import LoraConfig, OFTConfig, get_peft_model

    lora, base = recipe.lora, model
    assert lora is not None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # Loading draws a different number of random values under each strategy; from here on all ranks draw the same.
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    options = peft_options(lora, model)
    if tokens and not lora.modules_to_save:
        add_new_rows(model, tokens)

    def wrap(initialized: bool) -> Any:
        set_seed(recipe.training.seed)
        if lora.oft:  # whose weights are 0 at first
            return get_peft_model(model, OFTConfig(task_type="CAUSAL_LM", **options))
        weights = lora.init_lora_weights if initialized else True
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options | {"init_lora_weights": weights}))

    model = initial.add(wrap) if initial and changes_base(lora) else wrap(not (changes_base(lora) or is_meta))
    for module in saved_modules(model).values():
        _train_in_float32(module)
    rows = new_rows(model)
    if rows is not None:
        rows.requires_grad_(True)  # peft has frozen all but its own
    if lora.start_from:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        tensors = load_file(Path(lora.start_from) / ADAPTER_WEIGHTS)
        if rows is not None:
            rows.load_peft(tensors, json.loads((Path(lora.start_from) / ADAPTER_CONFIG).read_text()))
        check_base_layers(recipe, base, tensors)
        found = set_peft_model_state_dict(model, tensors)
        ours = ("lora_", ".oft_R.", ".modules_to_save.")
        missing = [name for name in found.missing_keys if any(part in name for part in ours)]
        if missing or found.unexpected_keys:
            some = (missing + found.unexpected_keys)[0]
            raise DataError(f"lora.start_from: {lora.start_from} is an adapter of another model ({some})")
        log.info(
            "adapter: starts from the weights of %s, with a new optimizer, schedule and data order", lora.start_from
        )
    return model
