"""Every model type of transformers' AutoModelForCausalLM, planned with the sizes of its config class (or SIZES).

python benchmarks/plan_sweep.py [NAME...] [--published] [--out FILE.json]   some seconds a model, no weights and no GPU

--published: instead the models of tests/published_configs.jsonl, with their config.json as published.

The truth is an independent count: what transformers builds and peft wraps on the meta device. A model is
  formula   known by its layout: parameters and adapters are those of the truth
  counted   a step was traced on fake tensors; likewise
  refused   it is no causal language model, a rule forbids it, or transformers cannot build it; the reason is printed
  gap       its memory is only a guess (and the plan says so), or a count is wrong: the reason is printed
tests/unit/test_sweep.py runs it for some, and holds what it finds of each published model against the file.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from distft.config.loading import load_recipe
from distft.errors import DistftError, SimulationError
from distft.hardware.devices import named_device
from distft.hardware.topology import Topology
from distft.jobs.planned import plan_any
from distft.models.adaptable import left_out
from distft.planner.search import Where
from distft.train.auto_class import auto_class

PUBLISHED = Path(__file__).parents[1] / "tests" / "published_configs.jsonl"

# Types whose config class has defaults that make no model, or one that does not run: sizes with which it does, as
# published where there is a model of the type.
_ROPE = {"rope_type": "default", "rope_theta": 50_000.0}
_INDEXER = {"n_heads": 4, "kv_heads": 1, "head_dim": 256, "budget": 512, "compress_ratio": 4}
_QWEN4 = {"output_gate_type": "sigmoid", **{f"indexer_{name}": size for name, size in _INDEXER.items()}}
SIZES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 8, "rope_theta": 500_000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 2048, "ffn_hidden_size": 3584, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "deepseek_v2": {"num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": 8 * ["conv", "conv", "full_attention", "conv"]},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
}
KINDS = ("formula", "counted", "refused", "gap")
RANK = 16


@dataclass(frozen=True)
class Found:
    """One model: a name in KINDS, and why."""

    kind: str
    why: str = ""


@dataclass(frozen=True)
class Published:
    """A line of PUBLISHED: config.json without what no plan reads, and what the sweep finds of it.

    `why` is a part of the reason. Parameters and trained parameters are those of `count`, where transformers can build
    the model and distft plans it.
    """

    name: str
    kind: str
    config: dict[str, Any]
    why: str = ""
    parameters: int = 0
    trained: int = 0


def published() -> dict[str, Published]:
    lines = PUBLISHED.read_text().splitlines()
    return {model.name: model for model in (Published(**json.loads(line)) for line in lines)}


def look_at(model_type: str, compare: bool = True) -> Found:
    """Plan a type with the sizes of its config class, on eight H100.

    Args:
        compare: hold what was planned against the truth.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            CONFIG_MAPPING[model_type](**SIZES.get(model_type, {})).save_pretrained(folder)
        except Exception as error:  # each config class checks itself
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}))  # what the type alone says
            found = _look_into(folder, model_type, lambda: None)
            return found if found.kind == "refused" else Found("gap", f"no defaults: {_line(error)}")
        return _look_into(folder, model_type, lambda: count(folder) if compare else None)


def look_at_published(model: Published, compare: bool = True) -> Found:
    """Plan a published model, on eight H100.

    Args:
        compare: hold what was planned against the truth, not only against what the file says.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(model.config))
        recorded = model.parameters, model.trained
        found = _look_into(folder, model.name, lambda: count(folder) if compare else recorded)
        if compare and found.kind in ("formula", "counted") and (truth := count(folder)) != recorded:
            return Found("gap", f"{found.kind}, but the file must say parameters {truth[0]}, trained {truth[1]}")
        return found


def _look_into(folder: Path, name: str, truth: Callable[[], tuple[int, int] | None]) -> Found:
    """Plan the model of a folder, under this name."""
    (folder / "data.jsonl").write_text('{"text": "a"}\n')
    wanted = {
        "name": "sweep",
        "model": {"name_or_path": str(folder)},
        "lora": {"r": RANK},
        "data": {"train": str(folder / "data.jsonl"), "max_length": 64, "packing": False},
        "training": {"global_batch_size": 16, "micro_batch_size": 2, "gradient_checkpointing": False},
        "parallelism": {"strategy": "ddp"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(wanted))
    try:
        recipe = load_recipe(folder / "recipe.yaml")
        plan = plan_any(recipe, Where(Topology(1, 8), named_device("H100", 8)))
    except DistftError as error:
        gap = isinstance(error, SimulationError) and _succeeds(truth)
        return Found("gap" if gap else "refused", _line(error, str(folder), name))
    if plan.guessed:
        return Found("gap", plan.warnings[-1].replace(str(folder), name))
    have, true = (plan.model.parameters, plan.memory.trainable_parameters), truth()
    if true not in (None, have):
        return Found("gap", f"{have[0]:,} parameters and {have[1]:,} trained, not {true[0]:,} and {true[1]:,}")
    return Found("counted" if plan.simulated else "formula")


def count(folder: Path) -> tuple[int, int]:
    """Parameters and trained parameters of all-linear adapters, as transformers and peft make them."""
    from peft import LoraConfig, get_peft_model

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = auto_class(config.model_type).from_config(config, trust_remote_code=False)
        parameters = sum(p.numel() for p in model.parameters())
        excluded = "|".join(left_out(name for name, _ in model.named_parameters())) or None
        adapters = LoraConfig(r=RANK, target_modules="all-linear", exclude_modules=excluded, task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, adapters)
    return parameters, sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def _succeeds(truth: Callable[[], object]) -> bool:
    try:
        truth()
    except Exception:  # whatever a config class or a model's class raises
        return False
    return True


def _line(error: Exception, folder: str = "", name: str = "") -> str:
    lines = str(error).strip().splitlines()
    return lines[0].replace(folder, name)[:240] if lines else type(error).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="types, or published models; without any, all of them")
    parser.add_argument("--published", action="store_true", help=f"the models of {PUBLISHED.name}")
    parser.add_argument("--out", help="also write the result here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    models = published() if arguments.published else {}
    found = {}
    for name in arguments.names or models or sorted(NAMES):
        logging.disable(logging.ERROR)
        found[name] = look_at_published(models[name]) if arguments.published else look_at(name)
        print(f"{name:36} {found[name].kind:8} {found[name].why}", flush=True)
    total = Counter(one.kind for one in found.values())
    print(f"{len(found)} models: " + ", ".join(f"{total[kind]} {kind}" for kind in KINDS))
    if arguments.out:
        text = {name: [one.kind, one.why] for name, one in found.items()}
        Path(arguments.out).write_text(json.dumps(text, indent=1))


if __name__ == "__main__":
    main()
