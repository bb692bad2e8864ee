"""What particular models cannot do: attention, packing, checkpointing, mixtures of experts, quantised checkpoints."""

from __future__ import annotations

from distft.models.families import FAMILIES
from distft.rules import upstream
from distft.rules.core import Case, rule


@rule(
    "a model type that AutoModelForCausalLM does not have",
    "transformers models/auto/modeling_auto.py, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "use a causal language model",
)
def model_must_be_a_causal_lm(case: Case) -> str | None:
    """Models are loaded with AutoModelForCausalLM, which ends at types that it has no class for: encoder-decoders such
    as T5, vision models, or a type newer than the installed transformers. Checked where transformers is installed.
    """
    if _is_unknown(case) and not case.has_code:
        return f"model.name_or_path: the installed transformers has no causal language model of type {case.model_type}"
    return None


@rule(
    "a model type that only code of its own can make, without model.trust_remote_code",
    "transformers dynamic_module_utils.py, resolve_trust_remote_code",
    "read that code, and set model.trust_remote_code: true if you trust its source",
)
def own_code_must_be_trusted(case: Case) -> str | None:
    """A model that transformers has no class for, and that brings one of its own (config.json has an auto_map), is
    loaded by running that code; without leave, transformers ends. Checked where transformers is installed.
    """
    if case.has_code and not case.own_code and _is_unknown(case):
        return f"model.trust_remote_code: got false, and {case.model_type} models are made by code that comes with them"
    return None


@rule(
    "model.quantization with a model type whose layers transformers does not quantise",
    "transformers 5.23 integrations/bitsandbytes.py, replace_with_bnb_linear: type(module) is nn.Linear",
    "remove model.quantization",
)
def quantization_needs_plain_layers(case: Case) -> str | None:
    """transformers replaces layers that are nn.Linear itself. Falcon's are a class of its own: the model would be
    loaded in 16 bit, in four times the memory, without a word.
    """
    if case.quantization and case.model_type in upstream.NOT_QUANTISED:
        return f"model.quantization: the layers of {case.model_type} models are not quantised"
    return None


@rule(
    "sdpa, asked for or the only one left, with a model type that has none",
    "transformers 5.23 modeling_utils.py:1667: does not support an attention implementation through "
    "torch.nn.functional.scaled_dot_product_attention yet",
    "use model.attn_implementation: eager",
)
def sdpa_needs_a_model_that_has_it(case: Case) -> str | None:
    """Some of transformers' model classes are not written for SDPA and end when asked for it, as `auto` does where
    FlashAttention-2 cannot be.
    """
    asked = case.attention == "sdpa" or (case.attention == "auto" and case.model_type in upstream.NO_FLASH)
    if asked and case.model_type in upstream.NO_SDPA:
        return f"model.attn_implementation: {case.model_type} models have no sdpa"
    return None


@rule(
    "sdpa, asked for or the only one left, with gemma2 or vaultgemma",
    "transformers 5.21 models/gemma2/modeling_gemma2.py: _supports_sdpa = False  # sdpa does not support softcapping",
    "use model.attn_implementation: eager",
    versions=["transformers>=5.21"],
)
def sdpa_has_no_softcapping(case: Case) -> str | None:
    """Gemma 2 and VaultGemma cap their attention's logits, which SDPA cannot. transformers refuses SDPA for them from
    5.21 on.
    """
    if case.attention == "sdpa" and case.model_type in upstream.NO_SDPA_FROM_5_21:
        return f"model.attn_implementation: {case.model_type} caps its attention's logits, which sdpa cannot"
    return None


@rule(
    "flash_attention_2 with a model type that has none",
    "transformers 5.23 modeling_utils.py:1594: does not support Flash Attention 2 yet",
    "use model.attn_implementation: auto, sdpa or eager",
)
def flash_attention_needs_a_model_that_has_it(case: Case) -> str | None:
    """Some of transformers' model classes are not written for FlashAttention-2 and end when asked for it."""
    if case.attention == "flash_attention_2" and case.model_type in upstream.NO_FLASH:
        return f"model.attn_implementation: {case.model_type} models have no flash_attention_2"
    return None


@rule(
    "gradient checkpointing with a model type that has none",
    "transformers 5.23 modeling_utils.py:3146: does not support activation checkpointing",
    "use training.gradient_checkpointing: false",
)
def checkpointing_needs_a_model_that_has_it(case: Case) -> str | None:
    """Some of transformers' model classes have no gradient checkpointing and end when asked for it."""
    if case.gradient_checkpointing and case.model_type in upstream.NO_CHECKPOINTING:
        return f"training.gradient_checkpointing: {case.model_type} models have none"
    return None


@rule(
    "data.packing with a model type whose documents see each other in a row",
    "seen with transformers 5.17 and 5.23: the second document of a packed row changes with the first; e.g. "
    "models/gpt_oss/modeling_gpt_oss.py:460 makes its masks without position_ids",
    "use data.packing: false",
)
def packing_needs_documents_apart(case: Case) -> str | None:
    """Packed rows tell documents apart by position ids that start again (transformers masking_utils.py,
    find_packed_sequence_indices). Some models do not make their attention's mask from them, and a recurrence or a
    convolution runs on through the row: training would mix documents, and no number would show it. Under
    FlashAttention-2 the bounds of documents go to the kernels; whether these models heed them could not be tried, and
    is not refused.
    """
    if not case.recipe.data.packing:
        return None
    flash, kind = case.attention == "flash_attention_2", case.model_type
    if kind in upstream.NO_ATTENTION or (kind in upstream.MIXES_BY_STATE and not flash):
        return f"data.packing: the state of {kind} runs on from one document into the next"
    if kind in upstream.MIXES_BY_MASK and not flash:
        return f"data.packing: {kind}'s attention does not heed where a document of a packed row begins"
    return None


@rule(
    "data.packing with a model whose code comes with it",
    "transformers masking_utils.py, find_packed_sequence_indices: a model's class must ask for it",
    "use data.packing: false, or look into the model's code",
    kind="warning",
)
def packing_trusts_the_models_code(case: Case) -> str | None:
    """Whether attention stays within a document of a packed row is up to the model's class. Of one that comes with the
    model it cannot be known.
    """
    if case.recipe.data.packing and case.own_code:
        return "data.packing: the model's own code may let attention cross from one document to the next"
    return None


@rule(
    "zero3 with a mixture of experts whose code comes with it, and no leaf_module",
    "https://github.com/deepspeedai/DeepSpeed/pull/4966 and issues/7461; DeepSpeed runtime/zero/leaf_module_config.py",
    "name the block in deepspeed.overrides.zero_optimization.leaf_module.classes, or use zero2 or fsdp",
    kind="warning",
)
def zero3_experts_need_a_leaf_module(case: Case) -> str | None:
    """ZeRO-3 gathers the weights of the modules that run. Where experts are modules of their own and only the chosen
    ones run, ranks gather different ones and wait for each other for ever; a leaf module is gathered whole. No model of
    transformers 5.17 to 5.23 has such experts any more (they are one 3-D parameter), but code of a model's own may.
    """
    if case.zero_stage == 3 and case.is_moe and case.own_code and not case.zero_option("leaf_module"):
        return "model.trust_remote_code: experts of the model's own code may hang under zero3"
    return None


@rule(
    "model.quantization with a mixture of experts",
    "transformers 5.23 integrations/bitsandbytes.py:189: type(module) is nn.Linear; seen: Mixtral's "
    "experts.gate_up_proj "
    "stays in bfloat16",
    "count on the experts' full size",
    kind="warning",
)
def experts_are_not_quantized(case: Case) -> str | None:
    """bitsandbytes replaces linear layers. transformers 5 keeps the experts of a mixture, most of its weights, in 3-D
    parameters, which stay in 16 bit under nf4 and int8.
    """
    if not (case.quantization and case.is_moe):
        return None
    share = ""
    if case.model and case.model.parameters:
        share = f" ({100 * case.model.linear_parameters // case.model.parameters}% of the weights)"
    return f"model.quantization: {case.quantization} reaches the layers outside the experts alone{share}"


@rule(
    "lora.target_modules: all-linear with a mixture of experts whose experts are merged",
    "seen with peft 0.19.0 and 0.19.1: Target modules {'-', 'r', 'n', ...} not found; right in 0.20.0",
    "name the layers in lora.target_modules, or install peft>=0.20",
    versions=["peft<0.20"],
)
def all_linear_fails_on_merged_experts(case: Case) -> str | None:
    """peft 0.19 takes the word all-linear apart into letters where it translates the names of experts that transformers
    5 has merged.
    """
    lora = case.recipe.lora
    merged = case.model is not None and case.model.peft_experts is not None
    if lora and lora.target_modules == "all-linear" and merged:
        return f"lora.target_modules: all-linear fails on {case.model_type} models with this peft"
    return None


@rule(
    "weights that are quantised on disk, without lora",
    "transformers 5.23 trainer_utils.py:131, validate_quantization_for_training",
    "add `lora:`, or take the model in full precision",
)
def quantized_checkpoints_need_lora(case: Case) -> str | None:
    """Weights that are quantised on disk (config.json has a quantization_config) have no gradient. Methods that
    transformers undoes on loading where it must (mxfp4, fp8) are not refused.
    """
    if _method(case) in upstream.NEEDS_ADAPTERS and not case.recipe.lora:
        return f"model.name_or_path: its weights are quantised ({_method(case)}) and cannot be trained"
    return None


@rule(
    "model.quantization with weights that are quantised another way on disk",
    "transformers 5.23 quantizers/auto.py:263, merge_quantization_configs",
    "leave model.quantization out, or take the model in full precision",
)
def weights_are_quantized_once(case: Case) -> str | None:
    """Weights that are quantised on disk cannot be quantised another way on loading. transformers ends at configs of
    two classes, and of two bitsandbytes configs it takes the one on disk, whatever the recipe says.
    """
    wanted = {"nf4": "load_in_4bit", "int8": "load_in_8bit"}.get(case.quantization or "")
    if wanted and _method(case) and not case.disk_quantization.get(wanted):
        return f"model.quantization: got {case.quantization}, and the weights on disk are quantised ({_method(case)})"
    return None


@rule(
    "weights quantised on disk by a method that cannot be trained on top of",
    "transformers 5.23 trainer_utils.py:137 and quantizers/*.py, is_trainable",
    "take the model in full precision",
)
def quantized_checkpoints_must_be_trainable(case: Case) -> str | None:
    """On top of weights quantised by some methods transformers does not train even adapters."""
    if _method(case) in upstream.UNTRAINABLE:
        return f"model.name_or_path: transformers does not train on top of {_method(case)} weights"
    return None


@rule(
    "4-bit weights that are stored as uint8 on disk, under fsdp or hsdp",
    "accelerate 1.14 and 1.15 utils/fsdp_utils.py (Excluding from FSDP2 sharding), seen; accelerate#3983 for 1.13",
    "take the model in full precision with model.quantization: nf4, or use zero3",
)
def fsdp_shards_no_uint8(case: Case) -> str | None:
    """FSDP2 can shard 4-bit weights that are stored as floats. distft stores them so when it quantises, but a
    checkpoint brings its own storage, uint8 by default: accelerate leaves such weights whole on every rank, and before
    1.14 broke them. ZeRO-3 shards uint8 as it is (seen with deepspeed 0.19.8 on 2 ranks: the losses of one process).
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
def int8_checkpoints_cannot_be_sharded(case: Case) -> str | None:
    """As int8-cannot-be-sharded, of weights that are int8 on disk."""
    if case.shards_parameters and case.disk_quantization.get("load_in_8bit"):
        return f"model.name_or_path: its int8 weights cannot be sharded by {case.strategy}"
    return None


@rule(
    "data.max_length over the model's positions, without rotary scaling",
    "transformers models/gpt2/modeling_gpt2.py: self.wpe = nn.Embedding(config.max_position_embeddings, ...)",
    "use a data.max_length within it",
    kind="warning",
)
def max_length_beyond_positions(case: Case) -> str | None:
    """A document longer than the positions that a model was made for ends the run where positions are learned (GPT-2,
    OPT), and lies beyond all that was trained where they are rotary. Configs with rotary scaling are left alone.
    """
    most = case.config.get("max_position_embeddings") or case.config.get("n_positions")
    scaling = case.config.get("rope_scaling") or case.config.get("rope_parameters") or {}
    longest = case.recipe.data.max_length
    if type(most) is int and most < longest and "factor" not in scaling:
        return f"data.max_length: got {longest}, and the model has {most} positions"
    return None


def _is_unknown(case: Case) -> bool:
    """Whether the installed transformers has no causal language model of the type; not asked for types known here."""
    if not case.model_type or case.model_type in FAMILIES:
        return False
    types = upstream.causal_lm_types()
    return types is not None and case.model_type not in types


def _method(case: Case) -> str:
    """The method of the weights on disk, in transformers' word; empty for plain weights."""
    found = case.disk_quantization
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    return str(found.get("quant_method") or "")
