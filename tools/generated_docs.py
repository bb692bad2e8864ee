"""docs/recipe.md and docs/profile.md from the docstrings of their fields, docs/rules.md from the rules.

python tools/generated_docs.py docs            write them
python tools/generated_docs.py docs --check    list those that differ; exit status 1 if any does
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from distft.config.cluster import Cluster
from distft.config.recipe import Recipe
from distft.config.schema_text import describe, documented_schema_of, options, show
from distft.rules import RULES, Rule

EXAMPLE = """\
name: my-run                  # becomes runs/my-run

model:
  name_or_path: Qwen/Qwen2.5-7B       # a hub id, or a folder: ./my-model
  revision: null                      # a commit of the hub id, to make the run repeatable
  attn_implementation: auto           # FlashAttention where it works, otherwise SDPA
  quantization: null                  # nf4: QLoRA
  pad_token: null                     # only for a tokenizer without one
  eos_token: null                     # ends a text, instead of the tokenizer's
  add_tokens: []                      # special tokens that the tokenizer lacks: ["<|im_start|>", "<|im_end|>"]
  trust_remote_code: false

lora:                         # null: train all weights
  r: 16
  lora_alpha: 32
  lora_dropout: 0.0
  target_modules: all-linear          # or names: [q_proj, v_proj]
  exclude_modules: null               # [down_proj]: of these, not on
  layers_to_transform: null           # [24, 25, 26, 27]: only in these blocks
  rank_pattern: {}                    # {down_proj: 32}
  alpha_pattern: {}                   # {down_proj: 64}
  modules_to_save: []                 # [embed_tokens, lm_head]: trained whole
  use_rslora: false
  use_dora: false
  init_lora_weights: true             # or gaussian, orthogonal, olora, pissa, pissa_niter_16
  loraplus_lr_ratio: null             # LoRA+: 16
  loraplus_lr_embedding: null         # with it, for adapters on embeddings: 1e-6
  start_from: null                    # the folder of a peft adapter to start from
  oft: null                           # {oft_block_size: 32}: orthogonal fine-tuning, without the fields of LoRA above

data:
  train:                              # or one path: data/train.jsonl, data:train, owner/name@revision
    - data/train.jsonl                # relative to this file
    - path: owner/name                # of the hub
      config: null
      epochs: 0.5                     # or rows: 1000; or weight: 2, for all sources
  eval: data/heldout.jsonl            # or a fraction of the training data: 0.05; null: none
  format: auto                        # detected from the rows
  columns: {}                         # {prompt: question, completion: answer}
  roles: {}                           # {developer: system}
  train_on: all                       # the assistant's turns; or last, all_with_reasoning, everything
  ignore_fields: []                   # [tools]: fields that the chat template does not print
  max_length: 2048                    # tokens
  packing: true
  long_rows: error                    # or truncate, drop, split
  chat_template: null                 # a Jinja file, for a tokenizer without a template; or a template's name

training:
  global_batch_size: 32               # over the whole job, however many GPUs it has
  micro_batch_size: auto              # per GPU: the largest that fits
  num_train_epochs: 3                 # or max_steps: 1000
  learning_rate: auto                 # 2e-4 with LoRA, 2e-5 without
  lr_scheduler_type: cosine
  warmup_ratio: auto                  # or warmup_steps: 100; auto: 0.03, at most a tenth of the steps
  weight_decay: 0.0
  max_grad_norm: 1.0
  optim: adamw_torch_fused
  optim_args: null                    # of galore_adamw, apollo_adamw: {rank: 128, update_proj_gap: 200, scale: 0.25}
  optim_target_modules: all-linear    # of these: or parts of names, [attn, mlp]
  loss_type: nll                      # or dft, eaft
  loss: chunked                       # or full: the logits of all tokens at once
  train_only: []                      # a part, without lora: ['model\\.layers\\.-[12]', lm_head]
  mixed_precision: bf16
  master_weights: float32
  gradient_checkpointing: auto        # only if needed to fit
  activation_offloading: false        # block inputs wait in host memory: longer rows
  use_liger_kernel: false
  compile: false                      # or true: torch.compile, block by block
  eval_steps: 100
  seed: 42
  report_to: [tensorboard]

parallelism:
  strategy: auto                      # the fastest that fits
  offload: none
  hsdp_shard_size: auto               # a node

checkpoint:
  save_steps: 500
  save_total_limit: 2

deepspeed:                    # merged into what distft generates
  overrides: {zero_optimization: {reduce_bucket_size: 100000000}}
fsdp:
  overrides: {}
trainer:
  overrides: {logging_steps: 10}

output_dir: runs              # relative to where distft is run
"""

INTRO = """\
<!-- Generated by tools/generated_docs.py from distft/config/recipe.py. -->
# The recipe

A recipe says what is trained and never names a machine. `name`, `model.name_or_path` and `data.train` are required;
everything else has a default. A key that is not listed here is an error, and so is a value of another type. All
problems are reported at once, with their lines.

The file is YAML 1.2: only `true` and `false` are booleans (`mixed_precision: no` is the word), `1e-4` is a number,
and anchors, aliases and merge keys (`<<`) work. `--set training.max_steps=100` overrides one value: the key with
dots, the value in YAML. An override of `max_steps` replaces the file's `num_train_epochs`, and vice versa, with a
warning.
"""


PROFILE_INTRO = """\
<!-- Generated by tools/generated_docs.py from distft/config/cluster.py. -->
# The site profile

A profile describes a cluster, once, for all recipes; it never names a model. `distft cluster init` writes a first
one, `distft cluster check` compares it with the cluster, [slurm/clusters/](../slurm/clusters) has examples. Pass it
by its path (`--cluster site.yaml`), or by its name if it is in `~/.config/distft/clusters/`; the variable
`DISTFT_CLUSTER` replaces the option. `runs_dir` and `node.gpus_per_node` are required. All errors are reported at
once, as for a recipe.
"""


RULES_INTRO = """\
<!-- Generated by tools/generated_docs.py from distft/rules/. -->
# The rules

What cannot be combined, and what is unwise. `validate`, `render` and `launch` apply all rules to a recipe or to your
own script, without torch. Errors are refused, all of them at once; warnings are printed and recorded in plan.json.
Each ends with the rule's name in brackets, and `distft rules NAME` explains it. Rules for certain versions look at
the packages that are installed where distft runs, and say nothing about a package that is not.
"""
FAMILY_TITLES = {
    "combinations": "Strategy, offload, optimizer, precision, device",
    "adapters": "Adapters and new tokens",
    "models": "Models",
    "overrides": "Overrides of DeepSpeed and FSDP",
    "trainer_overrides": "Overrides of transformers' arguments",
    "advice": "Advice",
}


def files() -> dict[str, str]:
    """File under docs/ → contents."""
    example = ["## Example", "Every field, most at its default.", f"```yaml\n{EXAMPLE}```\n"]
    return {
        "recipe.md": _markdown(Recipe, INTRO, example),
        "profile.md": _markdown(Cluster, PROFILE_INTRO, []),
        "rules.md": _rules(),
    }


def _rules() -> str:
    """A section a family, an entry a rule."""
    parts = [RULES_INTRO]
    for family, title in FAMILY_TITLES.items():
        parts.append(f"## {title}")
        parts += [_rule(rule) for rule in RULES if rule.family == family]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _rule(rule: Rule) -> str:
    kind = rule.kind + (", for scripts too" if rule.for_scripts else "")
    versions = f" Holds for {', '.join(f'`{text}`' for text in rule.versions)}." if rule.versions else ""
    lines = [
        f"### {rule.name}",
        f"*{kind}:* {rule.when}.",
        f"{rule.explanation}{versions}",
        f"- Fix: {rule.fix}.\n- Source: {rule.source}.",
    ]
    return "\n\n".join(lines)


def _markdown(model: type[BaseModel], intro: str, more: list[str]) -> str:
    """The reference of all fields."""
    schema = documented_schema_of(model)
    groups = {name: _group(below) for name, below in schema["properties"].items() if _group(below)}
    plain = {name: below for name, below in schema["properties"].items() if name not in groups}
    parts = [intro, "## Top level", _table({**schema, "properties": plain})]
    for name, group in groups.items():
        about = schema["properties"][name].get("description") or group["description"]
        parts += [f"## {name}", about, _table(group)]
        for key, items in _groups_in_lists(group):
            parts += [f"### A source in {name}.{key}", items["description"], _table(items)]
    return "\n\n".join(part.rstrip("\n") for part in [*parts, *more]) + "\n"


def _group(schema: dict[str, Any]) -> dict[str, Any] | None:
    return next((option for option in options(schema) if "properties" in option), None)


def _groups_in_lists(group: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The fields that hold lists of groups, and such a group; each group once."""
    seen = []
    for name, schema in group["properties"].items():
        for option in options(schema):
            items = _group(option.get("items", {}))
            if items and items not in seen:
                seen.append(items)
                yield name, items


def _table(group: dict[str, Any]) -> str:
    rows = ["| Field | Value | Default | Meaning |", "|---|---|---|---|"]
    for name, schema in group["properties"].items():
        default = "required" if name in group.get("required", ()) else f"`{_plain(schema['default'])}`"
        meaning = schema.get("description", "").replace("\n", " ").replace("|", "\\|")
        rows.append(f"| `{name}` | {describe(schema, '`{}`'.format)} | {default} | {meaning} |")
    return "\n".join(rows)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else show(value)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/generated_docs.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the repository's docs/")
    parser.add_argument("--check", action="store_true", help="write nothing; list what differs")
    options = parser.parse_args(argv)
    status = 0
    for name, text in files().items():
        path = options.folder / name
        if not options.check:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            print(f"{path}: differs from its generator; run: make reference")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
