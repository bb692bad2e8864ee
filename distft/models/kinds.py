"""What a model is, by its config.json: a causal language model, or what it is instead.

The installed transformers is not imported: the tables of its auto classes are read as text, so that they are those of
the version that will run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from distft import extras
from distft.models.families import FAMILIES

# Types whose class for AutoModelForCausalLM sees the tokens that it predicts, unless config.json sets this key (seen in
# transformers 5.23: with tiny models the last token was changed, and the outputs before it compared; tests/unit/
# test_kinds.py does so for some).
CAUSAL_IF = {
    **dict.fromkeys(
        (
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
            *("reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"),
            *("xlm-roberta-xl", "xmod"),
        ),
        ("is_decoder", True),
    ),
    "xlm": ("causal", True),
    "xlnet": ("attn_type", "uni"),
}
# Types that have a class there but do not write text after text.
NOT_TEXT = {
    "cpmant": "it sees the whole prompt, in a format of its own",
    "fuyu": "it reads images",
    "gemma4_assistant": "it drafts tokens for another model, whose states it reads",
    "gemma4_unified_assistant": "it drafts tokens for another model, whose states it reads",
    "git": "it describes images",
    "got_ocr2": "it reads images",
    "moshi": "it speaks",
    "moss_transcribe_diarize": "it transcribes speech",
    "musicgen": "it makes music",
    "musicgen_melody": "it makes music",
    "trocr": "it reads images",
}
# Types of images and text whose class writes text alone as well, each token seeing those before it (tests/unit/
# test_kinds.py tries each). Those that AutoModelForCausalLM has, such as gemma3, are not among them.
IMAGES_AND_TEXT = frozenset(
    (
        *("aya_vision", "cohere2_vision", "exaone4_5", "glm46v", "glm4v", "glm4v_moe", "idefics2", "idefics3"),
        *("internvl", "lfm2_vl", "llava", "llava_next", "llava_onevision", "mistral3", "ovis2"),
        *("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "vipllava"),
    )
)
# The other auto classes (modeling_auto.py), and what their models are; the first that has the type says it.
OTHERS = {
    "SPEECH_SEQ_2_SEQ": "a speech model",
    "IMAGE_TEXT_TO_TEXT": "a model of images and text, which is not known to write text alone",
    "MULTIMODAL_LM": "a model of audio or images and text, which AutoModelForCausalLM does not load",
    "SEQ_TO_SEQ_CAUSAL_LM": "an encoder-decoder",
    "MASKED_LM": "an encoder, which sees the tokens that it would predict",
    "TEXT_ENCODING": "an encoder of text",
}


def not_causal(config: Mapping[str, Any]) -> str | None:
    """What this config.json is instead of a causal language model, as a sentence; None where it may be one."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        if config.get("is_encoder_decoder"):
            return "it is an encoder-decoder"
        return "its config.json has no model_type, so it is not in the format of transformers"
    if kind in FAMILIES:
        return None
    if config.get("is_encoder_decoder") or ("is_encoder_decoder" not in config and _is_seq2seq(kind)):
        return f"{kind} is {OTHERS['SPEECH_SEQ_2_SEQ'] if kind in _table('SPEECH_SEQ_2_SEQ') else 'an encoder-decoder'}"
    if kind in NOT_TEXT:
        return f"{kind} is no language model: {NOT_TEXT[kind]}"
    if kind in CAUSAL_IF:
        key, wanted = CAUSAL_IF[kind]
        if config.get(key) == wanted:
            return None
        return f"{kind} is an encoder, which sees the tokens that it would predict (no {key} in its config.json)"
    types = _table("CAUSAL_LM")
    # The text part of a model that has a class for it alone (mllama, emu3).
    if (
        types & {kind, kind.removesuffix("_text_model")}
        or has_own_code(config)
        or (kind in IMAGES_AND_TEXT and kind in _table("IMAGE_TEXT_TO_TEXT"))
    ):
        return None
    found = next((text for name, text in OTHERS.items() if kind in _table(name)), None)
    if found:
        return f"{kind} is {found}"
    classes = config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    if name.endswith("ForMaskedLM"):
        return f"{kind} is an encoder ({name})"
    if not types or unknown_type(config):
        return None
    return f"the installed transformers has no causal language model of type {kind}"


def unknown_type(config: Mapping[str, Any]) -> str | None:
    """The type of a model, where neither the installed transformers knows it nor code that comes with the model."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind in FAMILIES or isinstance(config.get("auto_map"), Mapping):
        return None
    return kind if _types() and kind not in _types() else None


def is_causal_type(model_type: str) -> bool:
    """Whether the installed transformers has a causal language model of this type; those of families.py are known."""
    if model_type in IMAGES_AND_TEXT:
        return model_type in _table("IMAGE_TEXT_TO_TEXT")
    return model_type in FAMILIES or model_type in _table("CAUSAL_LM")


def has_own_code(config: Mapping[str, Any]) -> bool:
    """Whether the model comes with its own Python code."""
    own = config.get("auto_map")
    return isinstance(own, Mapping) and "AutoModelForCausalLM" in own


def _is_seq2seq(kind: str) -> bool:
    """Whether a type is an encoder-decoder unless its config says otherwise, although its decoder alone has a class."""
    return kind in _table("CAUSAL_LM") and kind in _table("SEQ_TO_SEQ_CAUSAL_LM") | _table("SPEECH_SEQ_2_SEQ")


@cache
def _table(task: str) -> frozenset[str]:
    """The model types of an auto class; none where transformers is not installed."""
    text = extras.source("transformers", "models/auto/modeling_auto.py") or ""
    table = text.partition(f"\nMODEL_FOR_{task}_MAPPING_NAMES = ")[2].partition("\n)")[0]
    return frozenset(re.findall(r'\("([\w-]+)", ', table))


@cache
def _types() -> frozenset[str]:
    """All model types, whatever they are for; none where transformers is not installed."""
    texts = (
        extras.source("transformers", f"models/auto/{name}.py") for name in ("auto_mappings", "configuration_auto")
    )
    return frozenset(re.findall(r'\("([\w-]+)", "\w+"\)', "".join(text or "" for text in texts)))
