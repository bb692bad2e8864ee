"""How many of other tools' training files `distft import` takes over, and what stands in the way of the rest.

    python benchmarks/import_configs.py FOLDER [--kind axolotl] [--gpus 8] [--list] [--json]

FOLDER has their example files, such as a checkout's examples/. Every .yaml and .yml below it that is a training file of
one tool counts:

    whole       nothing is refused; "with warnings" are those of them where the user should know of a difference
    refused     distft cannot train the same: what stands in the way, and how often it does so alone
    unreadable  it is incomplete, or names files that are not there

Each whole recipe is loaded as `validate` loads it, and planned on --gpus H100s, or on as many of them as share the
global batch evenly. Models are not downloaded: the plan is made with the config.json of a published model of the same
family (benchmarks/model_configs.py). For families that distft plans from the headers of their weights alone, these are
written as transformers builds the model from the defaults of its config class. Where there is neither, the recipe
counts apart. Data sets on the hub are not read.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from model_configs import CONFIGS

from distft.commands.import_recipe import recipe_text
from distft.errors import DistftError, first_line
from distft.importers.draft import Draft
from distft.importers.kinds import KINDS, read_file
from distft.jobs.target import Target, plan_recipe

# A published model of the same family, by the name of the imported one; the first that matches.
FAMILIES = (
    (r"phi-(1_5|2)", "phi-2"),
    (r"gpt-j", "gpt-j-6b"),
    (r"command-r7b", "command-r7b"),
    (r"gpt-oss", "gpt-oss-20b"),
    (r"seed-oss", "seed-oss-36b"),
    (r"qwen3-\d+b-a\d+b", "qwen3-30b-a3b"),
    (r"qwen1\.5-moe", "qwen1.5-moe"),
    (r"cerebras-gpt", "gpt2-xl"),
    (r"orpheus-3b|llama-?3.*3b", "llama-3.2-3b"),
    (r"deepcoder-14b|cogito.*qwen", "qwen2.5-7b"),
    (r"plano-orchestrator-4b", "qwen3-4b"),
    (r"llama-?3.*(70|405)b", "llama-3.1-70b"),
    (r"llama-?3.*1b|tiny-?llama|smol", "llama-3.2-1b"),
    (r"code-?llama|llama-?2|open_?llama|yi-|solar|vicuna|deepseek-coder", "llama-2-7b"),
    (r"llama-?4|vision|-vl-|pixtral|voxtral|gemma-?3n|moe|replit|qwen-7b|kimi", None),
    (r"llama", "llama-3.1-8b"),
    (r"mixtral", "mixtral-8x7b"),
    (r"qwen-?3", "qwen3-8b"),
    (r"qwen-?2", "qwen2.5-7b"),
    (r"gemma-?3", "gemma-3-1b"),
    (r"gemma", "gemma-2-2b"),
    (r"phi-?[34]", "phi-3-mini"),
    (r"(mistral|ministral).*7b|mistral-7b|mathstral", "mistral-7b"),
    (r"falcon-7b", "falcon-7b"),
    (r"pythia|gpt-neox|redpajama", "pythia-1.4b"),
    (r"starcoder2", "starcoder2-3b"),
    (r"granite-3|granite3", "granite-3.1-2b"),
    (r"stablelm", "stablelm-3b"),
    (r"olmo-?[23]", "olmo-2-7b"),
    (r"smollm3", "smollm3-3b"),
)


# By transformers' model_type: families that distft plans from the headers of the weights.
BY_WEIGHTS = (
    (r"lfm2-\d+m", "lfm2"),
    (r"hunyuan-[\d.]+b", "hunyuan_v1_dense"),
    (r"nemotron-mini", "nemotron"),
    (r"kimi-linear", "kimi_linear"),
    (r"apertus", "apertus"),
    (r"afm-4", "arcee"),
    (r"mpt-", "mpt"),
    (r"deepseek-v2", "deepseek_v2"),
    (r"deepseek-v3", "deepseek_v3"),
    (r"falcon-h1", "falcon_h1"),
    (r"gemma-4", "gemma4"),
    (r"glm-4-", "glm4"),
    (r"glm-4\.5", "glm4_moe"),
    (r"glm-4\.7-flash", "glm4_moe_lite"),
    (r"granite-4", "granitemoehybrid"),
    (r"jamba", "jamba"),
    (r"nemotron-3", "nemotron_h"),
    (r"qwen3-next", "qwen3_next"),
    (r"qwen3\.5-\d+b-a", "qwen3_5_moe"),
    (r"qwen3\.5", "qwen3_5"),
    (r"trinity", "afmoe"),
)
NO_DEFAULT = {  # as in tencent/Hunyuan-0.5B-Instruct, nvidia/Nemotron-Mini-4B-Instruct
    "hunyuan_v1_dense": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}


@dataclass
class Result:
    """What became of the files of one tool."""

    files: int = 0
    whole: list[str] = field(default_factory=list)
    with_warnings: int = 0
    warnings: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    alone: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)
    planned: int = 0
    fits: int = 0
    no_stand_in: int = 0
    plan_errors: dict[str, str] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=KINDS, help="only files of this tool")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--list", action="store_true", help="name the files")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, Result] = defaultdict(Result)
    with tempfile.TemporaryDirectory() as temporary:
        for file in sorted(p for p in arguments.folder.rglob("*.y*ml") if p.suffix in (".yaml", ".yml")):
            look_at(file, str(file.relative_to(arguments.folder)), arguments, Path(temporary), results)
    if arguments.json:
        print(json.dumps({"commit": commit(arguments.folder), **{k: vars(v) for k, v in results.items()}}, indent=1))
        return
    print(f"{arguments.folder}, commit {commit(arguments.folder)}")
    for kind, result in results.items():
        print("\n".join(page(kind, result, arguments.list)))


def look_at(file: Path, name: str, arguments: argparse.Namespace, target: Path, results: dict[str, Result]) -> None:
    try:
        draft, gpus = read(file, target, arguments.gpus)
    except DistftError as error:
        if "not a training file of" not in str(error) and arguments.kind:
            results[arguments.kind].files += 1
            results[arguments.kind].unreadable[name] = first_line(error)
        return
    if arguments.kind and draft.kind != arguments.kind:
        return
    result = results[draft.kind]
    result.files += 1
    try:
        if not draft.problems and not draft.refused:
            draft.check()
    except DistftError as error:
        draft.problems.append(first_line(error))
    if draft.refused:
        result.refused.append(name)
        reasons = {re.sub(r"\[\d+\]|\"[^\"]*\"\.?[\w]*", "", item.option).strip(".") for item in draft.refused}
        result.reasons.update(reasons)
        result.alone.update(reasons if len(reasons) == 1 else ())
    elif draft.problems:
        result.unreadable[name] = draft.problems[0]
    else:
        result.whole.append(name)
        result.with_warnings += bool(draft.warnings)
        result.warnings.update({text.partition(":")[0] for text in draft.warnings})
        plan(draft, name, gpus, target, result)


def read(file: Path, target: Path, gpus: int) -> tuple[Draft, int]:
    """A file, and for how many GPUs: twice or four times as many where its groups of GPUs need them."""
    draft = read_file(file, target, gpus)
    if any(text.startswith("--gpus: got") for text in draft.problems) and gpus < 32:
        return read(file, target, 2 * gpus)
    return draft, gpus


def plan(draft: Draft, name: str, gpus: int, target: Path, result: Result) -> None:
    """Plan the recipe as it would be written, with the config.json of a model of the same family."""
    if draft.is_part:
        return
    recipe: dict[str, Any] = yaml.safe_load(recipe_text(draft))
    folder = stand_in(str(recipe["model"]["name_or_path"]), target)
    if folder is None:
        result.no_stand_in += 1
        return
    recipe["model"]["name_or_path"] = folder.name
    recipe["model"].pop("revision", None)
    (recipe.get("lora") or {}).pop("start_from", None)
    file = target / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    try:
        ranks = math.gcd(gpus, recipe["training"]["global_batch_size"])
        nodes = math.ceil(ranks / 8)
        _, planned = plan_recipe(str(file), (), Target(nodes, ranks // nodes, gpu="H100"))
    except DistftError as error:
        result.plan_errors[name] = first_line(error)
        return
    result.planned += 1
    result.fits += bool(planned.fits)


def stand_in(model: str, target: Path) -> Path | None:
    """A folder below `target` with a model of the same family as far as a plan reads it; None where there is none."""
    text = model.lower()
    name, kind = ((found for pattern, found in table if re.search(pattern, text)) for table in (FAMILIES, BY_WEIGHTS))
    if (family := next(kind, None)) is not None:
        return write_weights(target / family)
    config = next(name, None)
    if config is None:
        return None
    folder = target / config
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[config]))
    return folder


def write_weights(folder: Path) -> Path:
    """config.json, and the header of the weights, of the model_type that the folder is named after."""
    if folder.exists():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(folder.name, **NO_DEFAULT.get(folder.name, {}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(folder)
    entry = {"dtype": "BF16", "data_offsets": [0, 0]}
    header = json.dumps({name: {**entry, "shape": list(p.shape)} for name, p in model.named_parameters()}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def commit(folder: Path) -> str:
    done = subprocess.run(["git", "-C", folder, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def page(kind: str, result: Result, names: bool) -> list[str]:
    whole = len(result.whole)
    lines = [
        f"{kind}: {result.files} files",
        f"  whole       {whole:4}   with warnings {result.with_warnings}",
        f"  refused     {len(result.refused):4}",
        f"  unreadable  {len(result.unreadable):4}",
        f"  of the whole: planned {result.planned} ({result.fits} fit on the GPUs), no model of the family "
        f"{result.no_stand_in}, refused by the plan {len(result.plan_errors)}",
        "  what stands in the way (in how many files; in how many alone):",
        *(f"    {count:4} {result.alone[name]:4}  {name}" for name, count in result.reasons.most_common(20)),
        "  warnings (in how many files):",
        *(f"    {count:4}  {name}" for name, count in result.warnings.most_common(12)),
    ]
    if names:
        lines += ["  whole:", *(f"    {name}" for name in result.whole)]
        lines += ["  refused by the plan:", *(f"    {name}: {why}" for name, why in result.plan_errors.items())]
        lines += ["  unreadable:", *(f"    {name}: {why}" for name, why in result.unreadable.items())]
    return lines


if __name__ == "__main__":
    main()
