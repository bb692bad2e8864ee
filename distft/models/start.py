"""The adapter that lora.start_from names: whether its weights mean the same in this recipe's adapter."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from distft.config.recipe import Oft, Recipe
from distft.errors import PlanError
from distft.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXPERTS
from distft.models.oft import peft_fields
from distft.models.shapes import STARTABLE, ModelShape, read_safetensors_header

# Fields of peft's LoraConfig and OFTConfig that say where an adapter came from, how it was trained or which layers it
# is on: the last is told by its tensors. Any other field that is set changes what the same tensors compute.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type"),
    *("inference_mode", "runtime_config", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "fan_in_fan_out", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("init_weights", "module_dropout"),
}
DEFAULTS = {"bias": "none"}  # of fields whose default is something
SAME = ("r", "lora_alpha", "use_rslora", "use_dora")
PATTERNS = ("rank_pattern", "alpha_pattern")
# Initial weights that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take the adapter's part out of
# it, and such an adapter belongs to what was left (peft tuners/lora/layer.py, pissa_init, olora_init, ...).
INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
PREFIX, BASE_LAYER = "base_model.model.", ".base_layer."  # of names in peft's files
WHOLE = re.compile(r"\.(embed_tokens|lm_head|wte|embed_in|embed_out|word_embeddings|tok_embeddings)\.weight$")
MERGE = "merge it into its base (distft merge, or peft's merge_and_unload) and train on the result"


def check_start(folder: Path, recipe: Recipe, model: ModelShape) -> None:
    """Check the adapter in `folder`, which `lora.start_from` names.

    Raises:
        PlanError: it is not an adapter like this recipe's, or computes something else than peft would with it.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        header = read_safetensors_header(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, PlanError) as error:
        raise PlanError(f"lora.start_from: {folder} is not a peft adapter in safetensors ({error})") from None
    lora = recipe.lora
    assert lora is not None
    kind, ours = config.get("peft_type"), "OFT" if lora.oft else "LORA"
    if kind not in STARTABLE:
        raise PlanError(
            f"lora.start_from: {folder} is an adapter of the kind {kind}, and only {' and '.join(STARTABLE)} can be "
            "started from"
        )
    if kind != ours:
        fix = "leave lora.oft out" if lora.oft else "add lora.oft with its settings"
        raise PlanError(f"lora.start_from: {folder} is an adapter of the kind {kind}, and this one's is {ours}; {fix}")
    wanted = peft_fields(lora.oft) if lora.oft else {name: getattr(lora, name) for name in SAME}
    group = "lora.oft" if lora.oft else "lora"
    for name, value in wanted.items():
        if config.get(name, False) != value:
            raise PlanError(
                f"lora.start_from: the adapter has {name} {json.dumps(config.get(name))}, and {group}.{name} is "
                f"{json.dumps(value)}; set it to the adapter's"
            )
    if lora.oft and lora.oft.use_cayley_neumann and not config.get("peft_version"):
        # peft/tuners/oft/config.py, check_kwargs
        raise PlanError(f"lora.start_from: {folder} was made before peft 0.18, whose series was another; {MERGE}")
    layers = sorted(config.get("modules_to_save") or [])
    if layers != sorted(lora.modules_to_save):
        raise PlanError(
            f"lora.start_from: the adapter has modules_to_save {json.dumps(layers)[:80]}, and lora.modules_to_save is "
            f"{json.dumps(lora.modules_to_save)[:80]}; set it to the adapter's"
        )
    experts = _expert_fields(recipe, model)
    for name in PATTERNS:
        theirs, ours = config.get(name) or {}, getattr(lora, name)
        if list(theirs.items()) != list(ours.items()) and theirs != experts.get(name):  # the first that matches counts
            raise PlanError(
                f"lora.start_from: the adapter has {name} {json.dumps(theirs)[:80]}, and lora.{name} is "
                f"{json.dumps(ours)[:80]}; set it to the adapter's"
            )
    _check_fields(config, recipe, model)
    # peft saves an embedding that has an adapter beside it: train/base_files.py compares it with the base's.
    found = sum(prod(shape) for name, shape in header.items() if BASE_LAYER not in name)
    parameters = model.trainable_parameters
    if found != parameters:
        resized = [name for name in header if WHOLE.search(name) and not _is_saved(name, layers)]
        if resized:
            raise PlanError(
                f"lora.start_from: {folder} has the whole of {resized[0].removeprefix(PREFIX)}, as peft saves it where "
                f"the vocabulary was resized, and adapters here do not; {MERGE}"
            )
        on = config.get("layers_to_transform")
        blocks = f" (it is on the blocks {json.dumps(on)}: see lora.layers_to_transform)"
        some = blocks if on not in (None, lora.layers_to_transform) else ""
        raise PlanError(
            f"lora.start_from: the adapter has {found:,} parameters, and this recipe's would have {parameters:,}: "
            f"it is for another model, or has other lora.target_modules{some}"
        )


def _is_saved(name: str, layers: Sequence[str]) -> bool:
    """Whether a tensor is of one of modules_to_save."""
    return any(f".{layer}." in f".{name}" for layer in layers)


def _check_fields(config: Mapping[str, Any], recipe: Recipe, model: ModelShape) -> None:
    """Raises PlanError for a field that this recipe's adapter would not have."""
    experts = _expert_fields(recipe, model)
    compared = {
        *HARMLESS,
        *SAME,
        *PATTERNS,
        "modules_to_save",
        *(Oft.model_fields if config.get("peft_type") == "OFT" else ()),
    }
    for name, value in config.items():
        if name in compared or value == DEFAULTS.get(name) or not (value or name in DEFAULTS):
            continue
        if name == "trainable_token_indices" and recipe.model.add_tokens:
            continue  # compared when they are loaded (train/new_rows.py)
        if name == "init_lora_weights" and value in INITIAL:
            continue
        if name in experts:
            continue
        fix = "name its tokens in model.add_tokens, or " if name == "trainable_token_indices" else ""
        raise PlanError(
            f"lora.start_from: the adapter has {name} {json.dumps(value)[:80]}, with which no training can start here; "
            f"{fix}{MERGE}"
        )


def _expert_fields(recipe: Recipe, model: ModelShape) -> dict[str, Any]:
    """What peft itself writes for the experts of a mixture: two old layers in one parameter have twice the rank."""
    lora, experts = recipe.lora, EXPERTS.get(model.peft_experts or "", {})
    if lora is None or lora.oft or not experts:
        return {}
    twice = [new for new, number in Counter(experts.values()).items() if number > 1]
    patterns = {rf".*\.{re.escape(new)}" for new in twice}
    return {
        "target_parameters": None,  # told by the tensors
        "rank_pattern": dict.fromkeys(patterns, 2 * lora.r),
        "alpha_pattern": dict.fromkeys(patterns, 2 * lora.lora_alpha),
    }
