"""The README.md of a trained model: from what it was made, how, and with which result.

Everything in it comes from the run directory: no torch, no clock, no environment. Local paths are shortened to their
names, because a card is meant to be published.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import yaml

from distft import __version__
from distft.config.document import load_yaml
from distft.config.loading import validate
from distft.config.recipe import Recipe
from distft.data.hub import parse_hub
from distft.data.sources import as_sources
from distft.errors import DataError
from distft.models import oft
from distft.models.lora import changes_base
from distft.models.quantization import NF4
from distft.runs.directory import RunDir
from distft.runs.metrics import last_metrics, read_metrics
from distft.runs.status import read_status

PACKAGES = ("torch", "transformers", "peft", "trl", "deepspeed", "accelerate", "bitsandbytes")
FIRST_BYTES = 2**14  # of metrics.jsonl: more than its first line


def text(run: RunDir, *, merged: bool = False, step: int | None = None) -> str:
    """The card as Markdown, with the YAML front matter that the hub reads.

    It describes final/, or the checkpoint of `step`. `merged`: the adapter is merged into the base's weights.
    """
    recipe = validate(load_yaml(run.recipe, Recipe))
    adapter = recipe.lora is not None and not merged
    sections = [
        f"# {recipe.name}",
        _what(recipe, adapter, merged, step),
        "## Use\n\n" + _use(recipe, adapter, read_status(run).base.get("class", "AutoModelForCausalLM")),
        "## Result\n\n" + _table(_result(run, step)),
        "## Data\n\n" + _table(_data(run, recipe)),
        "## Plan\n\n" + _table(_plan(run, recipe)),
        "## Recipe\n\n```yaml\n" + _yaml(_shortened(recipe.model_dump(mode="json"))) + "```",
        "## Versions\n\n" + _table(_versions(run)),
    ]
    return "---\n" + _yaml(_front_matter(run, recipe, adapter, merged)) + "---\n\n" + "\n\n".join(sections) + "\n"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _front_matter(run: RunDir, recipe: Recipe, adapter: bool, merged: bool) -> dict[str, Any]:
    """What the hub reads: which model this is made of, under whose licence, and from which data."""
    base, lora = dict(read_status(run).base), recipe.lora
    base.pop("class", None)
    if not _is_local(recipe.model.name_or_path):
        base["id"] = recipe.model.name_or_path
    found: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if name := base.pop("id", None):
        found |= {"base_model": name, "base_model_relation": "adapter" if adapter else "finetune"}
    found |= base  # license, and the name and the address of one that is not on the hub's list
    if datasets := _datasets(recipe):
        found["datasets"] = datasets
    tags = ["distft", "sft"]
    if lora:
        tags += ["oft" if lora.oft else "lora", *(["dora"] if lora.use_dora else [])]
    quantized = ["qoft" if lora.oft else "qlora"] if lora and recipe.model.quantization else []
    return found | {"tags": [*tags, *quantized, *["merged"] * merged]}


def _datasets(recipe: Recipe) -> list[str]:
    """The data sets of the hub that it was trained on."""
    names = []
    for source in as_sources(recipe.data.train):
        with contextlib.suppress(DataError):
            if not _is_local(source.path):
                names.append(parse_hub(source.path)[0].repo)
    return list(dict.fromkeys(names))


def _what(recipe: Recipe, adapter: bool, merged: bool, step: int | None) -> str:
    base, lora = f"`{_name(recipe.model.name_or_path)}`", recipe.lora
    if lora is None:
        what = f"All weights of {base}, fine-tuned"
        if recipe.training.train_only:
            what = f"{base}, fine-tuned in part (training.train_only below says in which; the rest is as it was)"
    else:
        kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
        on = f", trained on {recipe.model.quantization} weights" if recipe.model.quantization else ""
        rank = f"r {lora.r}"
        if lora.oft:
            kind, rank = oft.kind(lora.oft), oft.blocks_in_words(lora.oft)
        if changes_base(lora):
            rank = f"r {2 * lora.r}: trained from {lora.init_lora_weights} with r {lora.r}, saved for the base as it is"
        whole = f", with {', '.join(lora.modules_to_save)} trained whole" if lora.modules_to_save else ""
        what = f"{kind} adapter ({rank}) of {base}{on}{whole}"
        if merged:
            rounded = " as they are after quantizing and dequantizing" if recipe.model.quantization else ""
            what = f"{what}, merged into its weights{rounded}"
    at = f", at step {step}" if step is not None else ""
    return f"{what}{at}. Made with distft {__version__}."


def _use(recipe: Recipe, adapter: bool, kind: str) -> str:
    """`kind`: transformers' class of the base."""
    package, load = "transformers", f'model = {kind}.from_pretrained("FOLDER")'
    if adapter and kind == "AutoModelForCausalLM":
        package, kind = "peft", "AutoPeftModelForCausalLM"
        load = f'model = {kind}.from_pretrained("FOLDER")'
    elif adapter:
        base = json.dumps(_name(recipe.model.name_or_path))
        load = f"from peft import PeftModel\nmodel = {kind}.from_pretrained({base})\n"
        load += 'model = PeftModel.from_pretrained(model, "FOLDER")'
    code = f"```python\nfrom {package} import {kind}\n{load}\n```"
    if adapter and recipe.model.add_tokens:
        code += (
            "\n\nThe tokenizer in FOLDER has tokens that the base's may lack. AutoPeftModelForCausalLM makes room for "
            "them; before `PeftModel.from_pretrained(base, ...)`, call `base.resize_token_embeddings(len(tokenizer))` "
            "where the base has fewer embeddings than that."
        )
    if adapter and recipe.model.quantization == "nf4":
        words = {name: json.dumps(value) if isinstance(value, str) else value for name, value in NF4.items()}
        settings = ", ".join(f"{name}={word}" for name, word in words.items())
        code += (
            "\n\nIt was trained on 4-bit weights; for the same outputs load the base with "
            f"`BitsAndBytesConfig({settings})`."
        )
    if adapter and recipe.lora and (recipe.lora.use_rslora or recipe.lora.alpha_pattern):
        code += (
            "\n\nFor llama.cpp merge it into its base first (`distft merge`): convert_lora_to_gguf.py reads neither "
            "`use_rslora` nor `alpha_pattern`, so the adapter would get another scale, without a word."
        )
    return code


def _result(run: RunDir, step: int | None) -> list[tuple[str, object]]:
    status, last = read_status(run), last_metrics(run)
    if step is not None and last.get("step") != step:
        last = next((line for line in read_metrics(run.metrics)[0] if line["step"] == step), {})
    first = next(iter(read_metrics(run.metrics, 0, FIRST_BYTES)[0]), {})
    found: list[tuple[str, object]] = []
    if last:
        found += [("steps", f"{last['step']:,}"), ("tokens trained on", f"{last['tokens']:,}")]
        loss = f" ({status.loss_type})" if status.loss_type else ""
        found.append((f"loss{loss}, first and last step", f"{first['loss']:.4f} → {last['loss']:.4f}"))
    before, after = status.eval_loss_before, status.eval_loss_after
    if step is None and before is not None and after is not None:
        found.append((f"eval loss{' (nll)' * bool(status.loss_type)}", f"{before:.4f} → {after:.4f}"))
    return found


def _data(run: RunDir, recipe: Recipe) -> list[tuple[str, object]]:
    status = read_status(run)
    found: list[tuple[str, object]] = []
    for split, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        if isinstance(sources, float):
            found.append((split, f"{sources:.2%} of train, held out by a hash of each row"))
        elif names := [source.path for source in as_sources(sources)]:
            found.append((split, ", ".join(f"`{_name(source)}`" for source in names)))
        if count := status.data.get(split):
            size = f"{count['documents']:,} documents, {count['rows']:,} rows, {count['tokens']:,} tokens"
            found.append((f"{split}, size", size))
    if digest := status.identity.get("data"):
        found.append(("digest of content, tokenizer and settings", f"`{digest}`"))
    return found


def _plan(run: RunDir, recipe: Recipe) -> list[tuple[str, object]]:
    plan = json.loads(run.plan.read_text())
    topology, batch = plan["topology"], plan["batch"]
    offload = f", offload {plan['offload']}" if plan["offload"] != "none" else ""
    parts = f"{batch['micro_batch_size']} micro × {batch['gradient_accumulation_steps']} accumulation"
    return [
        ("strategy", f"{plan['strategy']}{offload}"),
        ("nodes × ranks", f"{topology['nnodes']} × {topology['nproc_per_node']} ({topology['gpu'] or 'CPU'})"),
        ("global batch", f"{batch['global_batch_size']} = {parts} × {topology['world_size']} ranks"),
        (
            "mixed precision",
            recipe.training.mixed_precision + " without float32 masters" * recipe.training.is_pure_bf16,
        ),
        ("gradient checkpointing", "yes" if plan["gradient_checkpointing"] else "no"),
    ]


def _versions(run: RunDir) -> list[tuple[str, object]]:
    """As they were when it was trained."""
    versions = read_status(run).versions
    return [("distft", __version__), *((name, version) for name, version in versions.items() if version)]


def _table(rows: list[tuple[str, object]]) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


def _is_local(source: str) -> bool:
    return Path(source).is_absolute()  # what is local in a run's recipe; the folder itself may be gone


def _name(source: str) -> str:
    return Path(source).name if _is_local(source) else source


def _shortened(value: Any) -> Any:
    """A recipe's values with absolute paths cut to their names."""
    if isinstance(value, dict):
        return {name: _shortened(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shortened(inner) for inner in value]
    return _name(value) if isinstance(value, str) else value
