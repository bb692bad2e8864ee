"""What particular models cannot do: attention, packing, checkpointing, mixtures of experts, quantized checkpoints."""

from __future__ import annotations

import re

from distft.models import kinds
from distft.models.attention import FLASH, NO_FLASH, NO_SDPA, NO_SDPA_FROM_5_21, no_varlen
from distft.models.lora import matcher, module_of, named_but_left_out, saved
from distft.models.packing import why_mixed
from distft.models.quantization import AS_STORED, DEQUANTIZED, bits_in_memory, method
from distft.rules import upstream
from distft.rules.core import RecipeCase, rule


@rule(
    "what is no causal language model: encoders, encoder-decoders, models of speech or images",
    "transformers models/auto/modeling_auto.py, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and the other tables; "
    "models/bert/modeling_bert.py: If you want to use `BertLMHeadModel` as a standalone, add `is_decoder=True.`",
    "use a causal language model",
    of_config=True,
)
def model_must_be_a_causal_lm(case: RecipeCase) -> str | None:
    """Training predicts each token from those before it, with the class that AutoModelForCausalLM has for the model's
    type. An encoder-decoder such as T5 has none; an encoder such as BERT has one that sees the token it predicts. What
    config.json itself does not say is looked up in the installed transformers, where there is one.
    """
    found = kinds.not_causal(case.whole_config)
    return f"model.name_or_path: {found}" if found else None


@rule(
    "a model type that the installed transformers does not know",
    "transformers models/auto/configuration_auto.py: but Transformers does not recognize this architecture",
    "install a transformers that has it, or take a repository that comes with code of its own",
    of_config=True,
)
def model_type_must_be_installed(case: RecipeCase) -> str | None:
    """A model that is newer than the installed transformers, or of a type that transformers never had, cannot be built
    where nothing but config.json and weights came with it. Nothing is said where transformers is not installed.
    """
    found = kinds.unknown_type(case.whole_config)
    return f"model.name_or_path: the installed transformers knows no model of type {found}" if found else None


@rule(
    "a model type that only the model's own code can build, without model.trust_remote_code",
    "transformers dynamic_module_utils.py, resolve_trust_remote_code",
    "read that code, and set model.trust_remote_code: true if you trust its source",
    of_config=True,
)
def remote_code_must_be_trusted(case: RecipeCase) -> str | None:
    """A model that transformers has no class for, but that comes with its own (config.json has an auto_map), is loaded
    by running that code; without permission transformers fails. Types that the installed transformers has are not
    refused; where none is installed, those that are planned from config.json.
    """
    if case.has_remote_code and not case.runs_remote_code and not kinds.is_causal_type(case.model_type):
        return (
            f"model.trust_remote_code: got false, and {case.model_type} models are built by code that comes with them"
        )
    return None


@rule(
    "model.quantization with a model type whose layers transformers does not quantize",
    "transformers 5.23 integrations/bitsandbytes.py, replace_with_bnb_linear: type(module) is nn.Linear",
    "remove model.quantization",
)
def quantization_needs_plain_layers(case: RecipeCase) -> str | None:
    """transformers replaces layers whose class is exactly nn.Linear. Falcon's have a class of their own: the model
    would silently be loaded in 16 bit, in four times the memory.
    """
    if case.quantization and case.model_type in upstream.NOT_QUANTIZED:
        return f"model.quantization: the layers of {case.model_type} models are not quantized"
    return None


@rule(
    "4-bit or 8-bit weights with a model type that computes with the weights of its layers itself",
    "transformers 5.23 models/mamba/modeling_mamba.py:438: self.dt_proj.weight @ time_step.transpose(1, 2)",
    "train the unquantized model, without model.quantization",
    of_config=True,
)
def quantization_needs_layers_that_are_called(case: RecipeCase) -> str | None:
    """The weight of a quantized layer is packed, and only the layer itself unpacks it: Mamba multiplies with dt_proj's
    and fails (RuntimeError: Expected size for first two dimensions of batch2 tensor to be).
    """
    if case.model_type in upstream.READS_WEIGHTS and (case.quantization or bits_in_memory(case.whole_config)):
        return f"model.quantization: {case.model_type} models compute with weights that would be quantized"
    return None


@rule(
    "sdpa with a model type that has none",
    "transformers 5.23 modeling_utils.py:1667: does not support an attention implementation through "
    "torch.nn.functional.scaled_dot_product_attention yet",
    "use model.attn_implementation: auto or eager",
    of_config=True,
)
def sdpa_needs_a_model_that_has_it(case: RecipeCase) -> str | None:
    """Some of transformers' model classes are not written for SDPA and fail when it is requested. With them `auto` is
    eager attention where FlashAttention-2 cannot run.
    """
    if case.attention == "sdpa" and case.model_type in NO_SDPA:
        return f"model.attn_implementation: {case.model_type} models have no sdpa"
    return None


@rule(
    "sdpa with gemma2 or vaultgemma",
    "transformers 5.21 models/gemma2/modeling_gemma2.py: _supports_sdpa = False  # sdpa does not support softcapping",
    "use model.attn_implementation: auto or eager",
    versions=["transformers>=5.21"],
    of_config=True,
)
def sdpa_has_no_softcapping(case: RecipeCase) -> str | None:
    """Gemma 2 and VaultGemma cap the logits of their attention, which SDPA cannot do. From 5.21 on transformers refuses
    SDPA for them.
    """
    if case.attention == "sdpa" and case.model_type in NO_SDPA_FROM_5_21:
        return f"model.attn_implementation: {case.model_type} caps the logits of its attention, which sdpa cannot do"
    return None


@rule(
    "flash_attention_2, 3 or 4 with a model type that has none",
    "transformers 5.23 modeling_utils.py:1594: does not support Flash Attention 2 yet",
    "use model.attn_implementation: auto, sdpa or eager",
    of_config=True,
)
def flash_attention_needs_a_model_that_has_it(case: RecipeCase) -> str | None:
    """Some of transformers' model classes are not written for FlashAttention and fail when it is requested."""
    if case.attention in FLASH and case.model_type in NO_FLASH:
        return f"model.attn_implementation: {case.model_type} models have no {case.attention}"
    return None


@rule(
    "varlen with a model type that cannot use it, or with dropout in attention",
    "torch 2.13 nn/attention/varlen.py, varlen_attn: no mask, dropout, cap of scores or sinks",
    "use model.attn_implementation: auto",
    of_config=True,
)
def varlen_needs_a_model_that_can_use_it(case: RecipeCase) -> str | None:
    """varlen gets the bounds of documents from position ids, which not all of transformers' model classes pass on, and
    neither caps scores nor adds sinks or drops some.
    """
    why = no_varlen(case.whole_config) if case.attention == "varlen" else None
    return f"model.attn_implementation: varlen: {why}" if why else None


@rule(
    "gradient checkpointing with a model type that has none",
    "transformers 5.23 modeling_utils.py:3146: does not support activation checkpointing",
    "use training.gradient_checkpointing: false",
)
def checkpointing_needs_a_model_that_has_it(case: RecipeCase) -> str | None:
    """Some of transformers' model classes have no gradient checkpointing and fail when it is requested."""
    if case.gradient_checkpointing and case.model_type in upstream.NO_CHECKPOINTING:
        return f"training.gradient_checkpointing: {case.model_type} models do not support it"
    return None


@rule(
    "data.packing with a model type in which documents of a row see each other",
    "seen with transformers 5.17 and 5.23: the second document of a packed row changes with the first; e.g. "
    "models/gpt_oss/modeling_gpt_oss.py:460 builds its masks without position_ids",
    "use data.packing: auto or false",
)
def packing_needs_separate_documents(case: RecipeCase) -> str | None:
    """In a packed row, documents are told apart by position ids that start again (transformers masking_utils.py,
    find_packed_sequence_indices). Some models do not build the mask of their attention from them, and a recurrence or a
    convolution runs on through the row, whatever the attention: training would mix documents, and no metric would show
    it. Under FlashAttention-2 the bounds of documents go to the kernels of attention; whether the models that build
    masks of their own respect them could not be tested, and is not refused.
    """
    why = case.recipe.data.packs and why_mixed(case.model_type, case.attention in FLASH)
    return f"data.packing: {why}" if why else None


@rule(
    "data.packing with a model that runs its own code",
    "transformers masking_utils.py, find_packed_sequence_indices: a model's class must call it",
    "use data.packing: auto or false, or check the model's code",
    kind="warning",
)
def packing_relies_on_remote_code(case: RecipeCase) -> str | None:
    """Whether attention stays within a document of a packed row is up to the model's class. For a class that comes with
    the model, this is unknown.
    """
    if case.recipe.data.packs and case.runs_remote_code:
        return "data.packing: the model's own code may let attention cross from one document to the next"
    return None


@rule(
    "zero3 with a mixture of experts that runs its own code, and no leaf_module",
    "https://github.com/deepspeedai/DeepSpeed/pull/4966 and issues/7461; DeepSpeed runtime/zero/leaf_module_config.py",
    "name the block in deepspeed.overrides.zero_optimization.leaf_module.classes, or use zero2 or fsdp",
    kind="warning",
)
def zero3_experts_need_a_leaf_module(case: RecipeCase) -> str | None:
    """ZeRO-3 gathers the weights of the modules that run. Where each expert is a module and only the chosen ones run,
    ranks gather different ones and wait for each other forever; a leaf module is gathered as a whole. In transformers
    5.17 to 5.23 no model has such experts any more (they are one 3-D parameter), but a model's own code may.
    """
    if case.zero_stage == 3 and case.is_moe and case.runs_remote_code and not case.zero_option("leaf_module"):
        return "model.trust_remote_code: experts in the model's own code may hang under zero3"
    return None


@rule(
    "model.quantization with a mixture of experts",
    "transformers 5.23 integrations/bitsandbytes.py:189: type(module) is nn.Linear; seen: Mixtral's "
    "experts.gate_up_proj stays in bfloat16",
    "expect the experts at their full size",
    kind="warning",
)
def experts_are_not_quantized(case: RecipeCase) -> str | None:
    """bitsandbytes replaces linear layers. transformers 5 keeps the experts of a mixture, most of its weights, in 3-D
    parameters, which stay in 16 bit under nf4 and int8.
    """
    if not (case.quantization and case.is_moe):
        return None
    share = ""
    if case.model.parameters:
        share = f" ({100 * case.model.linear_parameters // case.model.parameters}% of the weights)"
    return f"model.quantization: {case.quantization} applies only to layers outside the experts{share}"


@rule(
    "lora.target_modules: all-linear with a mixture of experts whose experts are merged",
    "seen with peft 0.19.0 and 0.19.1: Target modules {'-', 'r', 'n', ...} not found; right in 0.20.0",
    "name the layers in lora.target_modules, or install peft>=0.20",
    versions=["peft<0.20"],
)
def all_linear_fails_on_merged_experts(case: RecipeCase) -> str | None:
    """peft 0.19 splits the word all-linear into letters where it translates the names of experts that transformers 5
    has merged.
    """
    lora = case.recipe.lora
    if lora and not lora.oft and lora.target_modules == "all-linear" and case.model.peft_experts is not None:
        return f"lora.target_modules: all-linear fails on {case.model_type} models with this peft"
    return None


UNQUANTIZED = "take the unquantized repository, with model.quantization: nf4 where memory is short"


@rule(
    "weights that are quantized on disk, without lora",
    "transformers 5.23 trainer_utils.py:131, validate_quantization_for_training",
    "add `lora:`, or take the unquantized repository",
    of_config=True,
)
def quantized_checkpoints_need_lora(case: RecipeCase) -> str | None:
    """Weights that are quantized on disk (config.json has a quantization_config) have no gradient. Those that could be
    dequantized first (mxfp4, fp8) would be saved as what they are not: the config still says that they are quantized.
    """
    stored = method(case.whole_config)
    if stored in (*AS_STORED, *DEQUANTIZED) and not case.recipe.lora:
        return f"model.name_or_path: its weights are quantized ({stored}) and cannot be trained"
    return None


@rule(
    "model.quantization with weights that are quantized another way on disk",
    "transformers 5.23 quantizers/auto.py:263, merge_quantization_configs",
    "leave model.quantization out, or take the unquantized repository",
    of_config=True,
)
def weights_are_quantized_once(case: RecipeCase) -> str | None:
    """Weights that are quantized on disk cannot be quantized another way on loading. transformers fails on configs of
    two classes, and of two bitsandbytes configs it takes the one on disk, whatever the recipe says.
    """
    stored = method(case.whole_config)
    if case.quantization and stored and case.quantization != bits_in_memory(case.whole_config):
        return f"model.quantization: got {case.quantization}, but the weights on disk are quantized ({stored})"
    return None


@rule(
    "weights quantized on disk by another method than bitsandbytes, mxfp4 or fp8",
    "transformers 5.23 quantizers/*.py, is_trainable; quantizers/auto.py: Unknown quantization type, ... Hence, we "
    "will skip the quantization (modelopt's FP8 values were trained on without their scales)",
    UNQUANTIZED,
    of_config=True,
)
def quantized_checkpoints_must_be_trainable(case: RecipeCase) -> str | None:
    """Adapters are trained on bitsandbytes' weights as they are, and on mxfp4 and fp8 dequantized. The others (AWQ,
    GPTQ, compressed-tensors, ...) need packages that distft does not install, and no strategy that shards parameters
    takes their packed integers. Of methods that it does not know, transformers loads the numbers without the scales.
    """
    stored = method(case.whole_config)
    if stored and stored not in (*AS_STORED, *DEQUANTIZED):
        return f"model.name_or_path: its weights are quantized ({stored}), and nothing is trained on top of these"
    return None


@rule(
    "fp8 weights with a training.mixed_precision other than bf16",
    "seen with transformers 5.23: what is not in fp8 stays in bfloat16 whatever dtype is asked for, and RuntimeError: "
    "expected m1 and m2 to have the same dtype",
    "use training.mixed_precision: bf16",
    of_config=True,
)
def fp8_checkpoints_need_bf16(case: RecipeCase) -> str | None:
    """fp8 weights are dequantized on loading, beside norms and embeddings that are stored in bfloat16."""
    if method(case.whole_config) == "fp8" and case.mixed_precision != "bf16":
        return f"training.mixed_precision: got {case.mixed_precision}, and beside fp8 weights are bf16 ones"
    return None


@rule(
    "weights that are dequantized on loading: mxfp4, fp8",
    "transformers 5.23 quantizers/quantizer_mxfp4.py and quantizer_finegrained_fp8.py: dequantize",
    "expect them at 16 bit",
    kind="warning",
)
def checkpoints_are_dequantized(case: RecipeCase) -> str | None:
    """Weights in mxfp4 and fp8 are dequantized as they are loaded, since their kernels have no backward pass."""
    if (stored := method(case.whole_config)) in DEQUANTIZED:
        return f"model.name_or_path: its {stored} weights are trained on in the compute dtype"
    return None


@rule(
    "4-bit weights that are stored as uint8 on disk, under fsdp or hsdp",
    "accelerate 1.14 and 1.15 utils/fsdp_utils.py (Excluding from FSDP2 sharding), seen; accelerate#3983 for 1.13",
    "take the model in full precision with model.quantization: nf4, or use zero3",
)
def fsdp_does_not_shard_uint8(case: RecipeCase) -> str | None:
    """FSDP2 can shard 4-bit weights that are stored as floats, as distft stores them when it quantizes. But a
    checkpoint has its own storage dtype, uint8 by default: accelerate leaves such weights whole on every rank, and
    before 1.14 broke them. ZeRO-3 shards uint8 as it is (seen with deepspeed 0.19.8 on 2 ranks: the losses of a single
    process).
    """
    storage = str(case.disk_quantization.get("bnb_4bit_quant_storage", "uint8"))
    if case.fsdp and case.disk_quantization.get("load_in_4bit") and storage == "uint8":
        return f"model.name_or_path: its 4-bit weights are stored as uint8, which {case.strategy} does not shard"
    return None


@rule(
    "weights that are int8 on disk, under zero3, fsdp or hsdp",
    "bitsandbytes 0.50 nn/modules.py:1159, Linear8bitLt.init_8bit_state",
    "take the model in full precision with model.quantization: nf4, or use ddp, zero1 or zero2",
)
def int8_checkpoints_cannot_be_sharded(case: RecipeCase) -> str | None:
    """As int8-cannot-be-sharded, for weights that are int8 on disk."""
    if case.shards_parameters and case.disk_quantization.get("load_in_8bit"):
        return f"model.name_or_path: {case.strategy} cannot shard its int8 weights"
    return None


@rule(
    "data.max_length beyond the model's positions, without rotary scaling",
    "transformers models/gpt2/modeling_gpt2.py: self.wpe = nn.Embedding(config.max_position_embeddings, ...)",
    "use a data.max_length within them",
    kind="warning",
)
def max_length_beyond_positions(case: RecipeCase) -> str | None:
    """A document longer than the positions that a model was made for crashes the run where positions are learned
    (GPT-2, OPT), and is beyond everything the model was trained on where they are rotary. Configs with rotary scaling
    are not checked.
    """
    most = case.config.get("max_position_embeddings") or case.config.get("n_positions")
    scaling = case.config.get("rope_scaling") or case.config.get("rope_parameters") or {}
    longest = case.recipe.data.max_length
    if type(most) is int and most < longest and "factor" not in scaling:
        return f"data.max_length: got {longest}, and the model has {most} positions"
    return None


@rule(
    "layers that lora.target_modules names and that cannot have an adapter",
    "distft/models/adaptable.py; peft 0.21.2 tuners/tuners_utils.py, _check_lora_target_modules_mamba",
    "the others have theirs",
    kind="warning",
)
def some_layers_get_no_adapter(case: RecipeCase) -> str | None:
    """Parts of a model that text does not go through (image and audio encoders) get no gradients from it; routers that
    return tuples and state-space mixers, whose weights are read by kernels, would fail or ignore the adapter.
    """
    lora, model = case.recipe.lora, case.model
    if not lora:
        return None
    texts = [f"{_names(paths)}: {why}" for why, paths in named_but_left_out(lora, model.left_out_layers).items()]
    return f"lora.target_modules: no adapter on {'; on '.join(texts)}" if texts else None


@rule(
    "lora.modules_to_save with a layer that lora.target_modules names too",
    "peft 0.21.2 tuners/tuners_utils.py, check_target_module_exists",
    "name it in one of the two",
    kind="warning",
)
def modules_to_save_have_no_adapter(case: RecipeCase) -> str | None:
    """What is trained whole gets no adapter beside it: peft passes it over."""
    lora = case.recipe.lora
    if not lora or not lora.modules_to_save or lora.target_modules == "all-linear":
        return None
    is_target = matcher(lora.target_modules)
    both = {path: None for tensor in saved(lora, case.model.tensors) if is_target(path := module_of(tensor))}
    return f"lora.modules_to_save: {_names(list(both))} trained whole, so without an adapter" if both else None


@rule(
    "lora: null with a model that has other inputs than text",
    "distft/models/adaptable.py",
    "they stay as they are",
    kind="warning",
)
def only_the_language_model_is_trained(case: RecipeCase) -> str | None:
    """Rows are text, so image and audio encoders get no gradients: they stay as they are."""
    model = case.model
    if case.recipe.lora or not model.other_inputs:
        return None
    names = model.other_inputs if model.train_only is None else model.other_inputs & model.train_only
    size = sum(tensor.size for tensor in model.tensors if tensor.name in names)
    field = "lora" if model.train_only is None else "training.train_only"
    return f"{field}: {size:,} weights, which text does not go through, are not trained" if size else None


def _names(paths: list[str]) -> str:
    """Their number, and where they are: the names that differ, with stars for numbers."""
    found = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", path) for path in paths})
    return f"{len(paths)} layers ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})"
