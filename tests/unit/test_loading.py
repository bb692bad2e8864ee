"""YAML → Recipe: the exact words of every problem, all at once, each with its line."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from distft.config.document import MAX_BYTES, Document, load_yaml
from distft.config.loading import DATA_FILES, dump_recipe, load_recipe, read_recipe, validate
from distft.config.recipe import EXCLUSIVE_FIELDS, Recipe
from distft.config.schema_text import documented_schema, documented_schema_of
from distft.errors import RecipeError

GOOD = """\
name: demo
model: {name_or_path: base}
data: {train: data/train.jsonl}
"""

NAME = "need a string of letters, digits, `.`, `_` and `-`, not starting with `.` or `-` and at most 100 characters"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, with what recipes here point to."""
    for name in ("data/train.jsonl", "data/heldout.jsonl", "template.jinja", "base/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str | bytes, *sets: str, needed: tuple[str, ...] = ()) -> Recipe:
    Path("recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe("recipe.yaml", sets, needed)


def notes(text: str, *sets: str) -> list[str]:
    """What is worth telling of a recipe that can be read."""
    Path("recipe.yaml").write_text(text)
    return list(read_recipe("recipe.yaml", sets).notes)


def problems(text: str | bytes, *sets: str) -> list[str]:
    """Of a recipe whose data must be here."""
    with pytest.raises(RecipeError) as caught:
        load(text, *sets, needed=DATA_FILES)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def problem(text: str | bytes, *sets: str) -> str:
    (only,) = problems(text, *sets)
    return only


# ---- scalars


NOT_SPECIAL = "no off yes on y n NO 1_000 1:30 12:30:45 2024-01-01 0b11 1e 1.2.3 tRUE << ="


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(word, word) for word in NOT_SPECIAL.split()],
        *[("true", True), ("False", False), ("TRUE", True), ("~", None), ("Null", None), ("", None)],
        *[("1e-4", 1e-4), ("2E5", 2e5), ("1.", 1.0), (".5", 0.5), ("-1.5e+3", -1500.0), ("+1", 1), ("-0", 0)],
        *[("007", 7), ("0o17", 15), ("0x1F", 31), ("9" * 40, int("9" * 40)), ("9" * 41, float("9" * 41))],
        *[("'1'", "1"), ('"true"', "true"), ("!!str 1", "1"), ("!!int '7'", 7), ("!!float 1", 1.0), ('"\\u00e9"', "é")],
    ],
)
def test_scalars_of_yaml_1_2(text, value):
    got = load(f"{GOOD}trainer: {{overrides: {{key: {text}}}}}").trainer.overrides["key"]
    assert (got, type(got)) == (value, type(value))
    got = load(GOOD, f"trainer.overrides.key={text}").trainer.overrides["key"]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize("text", [".inf", "-.INF", ".nan", "1e999", "9" * 400])
def test_numbers_are_finite(text):
    shown = text if len(text) < 60 else "9" * 56 + "...9"
    expected = f"training.learning_rate: got {shown}, need a finite number (recipe.yaml:4)"
    assert problem(f"{GOOD}training: {{learning_rate: {text}}}") == expected
    assert problem(f"{GOOD}trainer: {{overrides: {{deep: [{text}]}}}}").startswith("trainer.overrides.deep[0]: got")


def test_an_integer_is_a_number_but_not_the_other_way_round():
    assert load(f"{GOOD}lora: {{lora_alpha: 8}}").lora.lora_alpha == 8
    expected = "lora.r: got 8.0 (a number), need an integer >= 1 (recipe.yaml:4)"
    assert problem(f"{GOOD}lora: {{r: 8.0}}") == expected


# ---- the words of a problem


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("lora.r", "0", "got 0, need >= 1"),
        ("lora.r", "true", "got true (a boolean), need an integer >= 1"),
        ("lora.lora_dropout", "1", "got 1, need >= 0 and < 1"),
        ("lora.lora_dropout", "-0.5", "got -0.5, need >= 0 and < 1"),
        (
            "lora.target_modules",
            "all_linear",
            'got "all_linear", need all-linear, a list or a regular expression; did you mean all-linear?',
        ),
        (
            "lora.target_modules",
            "q_proj",
            'got "q_proj", need all-linear, a list or a regular expression; for layers of that name, write [q_proj]',
        ),
        (
            "lora.target_modules",
            "'.*('",
            'got ".*(", which is no regular expression '
            "(missing ), unterminated subpattern at position 2)",
        ),
        ("lora.target_modules", "[]", "got [] (empty), need all-linear, a string or a list of strings"),
        ("lora.target_modules", "{a: 1}", 'got {"a": 1} (a mapping), need all-linear, a string or a list of strings'),
        (
            "lora.exclude_modules",
            "q_proj",
            'got "q_proj", need a list or a regular expression; for layers of that name, write [q_proj]',
        ),
        ("lora.rank_pattern", "[8]", "got [8] (a list), need a mapping"),
        ("lora.rank_pattern", "{3: 4}", "got 3 for a key, need a string (in quotes)"),
        ("lora", "8", "got 8 (an integer), need a group (r, lora_alpha, lora_dropout, ...) or null"),
        ("training", "", "got null, need a group (global_batch_size, micro_batch_size, max_steps, ...)"),
        ("training.max_steps", "ten", 'got "ten" (a string), need an integer >= 1'),
        ("training.max_steps", "0", "got 0, need >= 1"),
        ("training.seed", "", "got null, need an integer >= 0"),
        ("training.max_grad_norm", "-1", "got -1, need >= 0"),
        ("training.learning_rate", "0", "got 0, need auto or a number > 0"),
        ("training.learning_rate", "[1]", "got [1] (a list), need auto or a number > 0"),
        ("training.micro_batch_size", "atuo", 'got "atuo", need auto or an integer >= 1; did you mean auto?'),
        ("training.micro_batch_size", "0", "got 0, need auto or an integer >= 1"),
        ("training.mixed_precision", "BF16", 'got "BF16", need one of bf16, fp16, no; did you mean bf16?'),
        ("training.mixed_precision", "false", "got false (a boolean), need one of bf16, fp16, no"),
        (
            "training.optim",
            "adam",
            'got "adam", need one of adamw_torch_fused, adamw_torch, adamw_bnb_8bit, paged_adamw_8bit, '
            "paged_adamw_32bit, adafactor, muon, galore_adamw, apollo_adamw; did you mean adamw_torch?",
        ),
        ("training.gradient_checkpointing", "1", "got 1 (an integer), need one of auto, true, false"),
        ("training.report_to", "wandb", 'got "wandb" (a string), need a list of strings'),
        ("data.packing", "yes", 'got "yes", need one of auto, true, false'),
        ("data.max_length", "7", "got 7, need >= 8 and <= 1e+08"),
        ("parallelism.hsdp_shard_size", "1", "got 1, need auto or an integer >= 2"),
        (
            "parallelism.strategy",
            "zero4",
            'got "zero4", need one of auto, ddp, zero1, zero2, zero3, fsdp, hsdp; did you mean zero3?',
        ),
        ("model.quantization", "nf8", 'got "nf8", need nf4 or int8; did you mean nf4?'),
        ("trainer.overrides", "[]", "got [] (a list), need a mapping"),
        ("output_dir", '""', 'got "" (empty), need a string'),
        ("name", "../x", f'got "../x", {NAME}'),
        ("name", "x" * 101, f'got "{"x" * 55}...", {NAME}'),
        ("output_dir", r'["a\n\e[31m\u202e\x7f"]', r'got ["a\n\u001b[31m\u202e\x7f"] (a list), need a string'),
        ("output_dir", r'"a\ud800"', r'got "a\ud800", which has half a character'),
    ],
)  # fmt: skip
def test_words(key, value, expected):
    text, line = recipe_with(key, value)
    assert problem(text) == f"{key}: {expected} (recipe.yaml:{line})"
    assert problem(GOOD, f"{key}={value}").startswith(f"{key}: {expected} (--set {key}=")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("exclude_modules='.*('", 'exclude_modules: got ".*(", which is no regular expression (missing )'),
        ("rank_pattern={'q(': 4}", 'rank_pattern."q(": got "q(", which is no regular expression (missing )'),
        ("rank_pattern={q_proj: 0}", "rank_pattern.q_proj: got 0, need >= 1"),
        ("alpha_pattern={q_proj: 0}", "alpha_pattern.q_proj: got 0, need > 0"),
        ("layers_to_transform=[-1]", "layers_to_transform[0]: got -1, need >= 0"),
    ],
)
def test_patterns_of_lora(setting, expected):
    text, _ = recipe_with("lora.r", "8")
    assert problem(text, f"lora.{setting}").startswith(f"lora.{expected}")


def test_initial_weights(folder):
    text, _ = recipe_with("lora.init_lora_weights", "eva")
    need = "true or a string that is gaussian, orthogonal, olora, pissa or pissa_niter_N (steps)"
    assert problem(text).startswith(f'lora.init_lora_weights: got "eva", need {need}')
    (folder / "adapter").mkdir()
    assert problem(text, "lora.init_lora_weights=pissa", "lora.start_from=adapter").startswith(
        "lora.init_lora_weights: cannot be given with lora.start_from"
    )


def test_a_rate_that_would_have_no_effect():
    text, _ = recipe_with("lora.loraplus_lr_embedding", "1e-5")
    assert problem(text).startswith("lora.loraplus_lr_embedding: needs lora.loraplus_lr_ratio")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["lora.r=8", "lora.oft={}"], "lora.r: is of LoRA, and cannot be given with lora.oft; the number of blocks is"),
        (["lora.use_dora=true", "lora.oft={}"], "lora.use_dora: is of LoRA, and cannot be given with lora.oft"),
        (["lora.oft={oft_block_size: 8, r: 2}"], "lora.oft.r: cannot be given with lora.oft.oft_block_size"),
        (["lora.oft={oft_block_size: 1}"], "lora.oft.oft_block_size: got 1, need >= 2"),
        (["lora.oft={eps: 0.1}"], "lora.oft.eps: needs lora.oft.coft: true"),
        (
            ["lora.oft={num_cayley_neumann_terms: 6, use_cayley_neumann: false}"],
            "lora.oft.num_cayley_neumann_terms: needs lora.oft.use_cayley_neumann: true",
        ),
        (["lora.oft={module_dropout: 0.1}"], "lora.oft.module_dropout: unknown key; allowed: oft_block_size"),
    ],
)
def test_what_does_not_go_with_oft(settings, expected):
    text, _ = recipe_with("lora.target_modules", "all-linear")
    assert problem(text, *settings).startswith(expected)


def test_oft_without_settings():
    text, _ = recipe_with("lora.oft", "")
    assert problem(text).startswith("lora.oft: has nothing below it; write {} for peft's defaults")


def test_a_recipe_of_oft_is_written_without_what_it_lacks(folder):
    from distft.config.document import dump_yaml

    text, _ = recipe_with("lora.oft", "{coft: true}")
    (folder / "recipe.yaml").write_text(text)
    recipe = load_recipe(folder / "recipe.yaml")
    (folder / "again.yaml").write_text(dump_yaml(recipe))
    assert load_recipe(folder / "again.yaml") == recipe
    lora = yaml.safe_load((folder / "again.yaml").read_text())["lora"]
    assert set(lora) == {
        *("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save", "start_from", "oft")
    }


def test_a_pattern_names_blocks_itself():
    text, _ = recipe_with("lora.target_modules", "'.*q_proj'")
    assert problem(text, "lora.layers_to_transform=[1]").startswith(
        "lora.layers_to_transform: cannot be given with a regular expression in lora.target_modules"
    )


def recipe_with(key: str, value: str) -> tuple[str, int]:
    """A good recipe in blocks, but for `key`, and the line that has it."""
    groups = {"name": {"": "demo"}, "model": {"name_or_path": "base"}, "data": {"train": "data/train.jsonl"}}
    group, _, name = key.partition(".")
    groups[group] = {**groups.get(group, {}), name: value} if name else {"": value}
    lines = []
    for each, rows in groups.items():
        lines += [f"{each}:"] if "" not in rows else []
        lines += [f"  {row}: {rows[row]}" if row else f"{each}: {rows[row]}" for row in rows]
    return "\n".join(lines), lines.index(f"  {name}: {value}" if name else f"{key}: {value}") + 1


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("training.learning_rte", "unknown key; did you mean learning_rate?"),
        ("training.Learning-Rate", "unknown key; did you mean learning_rate?"),
        ("trainig", "unknown key; did you mean training?"),
        ("learning_rate", "unknown key; it belongs in training"),
        ("training.r", "unknown key; it belongs in lora"),
        ("training.output_dir", "unknown key; it belongs in the top level"),
        ("deepspeed.zero_optimization", "unknown key; allowed: overrides"),
        ("checkpoint.xyz", "unknown key; allowed: save_steps, save_total_limit"),
    ],
)
def test_unknown_keys(key, expected):
    text, line = recipe_with(key, "1")
    assert problem(text) == f"{key}: {expected} (recipe.yaml:{line})"
    assert problem(GOOD, f"{key}=1") == f"{key}: {expected} (--set {key}=1)"


def test_missing_keys_are_where_their_parent_is():
    assert problems("# a comment\n\nlora: null\nmodel:\n  revision: main\ndata: {}\n") == [
        f"name: missing, {NAME} (recipe.yaml:3)",
        "model.name_or_path: missing, need a string (recipe.yaml:4)",
        "data.train: missing, need a string or a list of strings or groups (path, config, weight, ...) (recipe.yaml:6)",
    ]
    assert problems("name: a\n")[0].startswith("model: missing, need a group (name_or_path, revision, ")
    assert problem("name: a\ndata: {train: data}", "model.revision=main") == (
        "model.name_or_path: missing, need a string (--set model.revision=main)"
    )


def test_odd_keys_are_quoted():
    assert problem(f'{GOOD}"a b\\e[0m": 1\n').startswith(r'"a b\u001b[0m": unknown key; allowed: name, model')
    assert problem(f"{GOOD}trainer: {{overrides: {{a.b: {{1: 2}}}}}}") == (
        'trainer.overrides."a.b": got 1 for a key, need a string (in quotes) (recipe.yaml:4)'
    )


@pytest.mark.parametrize("key", ["1", "true", "null", "1.5", "", "[1]", "{a: 1}"])
def test_keys_are_strings(key):
    shown = {"": "null", "[1]": "a list or mapping", "{a: 1}": "a list or mapping"}.get(key, key)
    expected = f"training: got {shown} for a key, need a string (in quotes) (recipe.yaml:6)"
    assert problem(f"{GOOD}training:\n  seed: 1\n  ? {key}\n  : 2\n") == expected


# ---- all at once, in the right lines


def test_all_problems_at_once_in_the_order_of_the_file():
    text = """\
# comment
name: demo
model:
  revison: main
data: {train: [data/trian.jsonl, data/train.jsonl,
    ./gone.csv], eval: data/heldout.jsonl, format: messages,
  long_rows: split}
lora:
  target_modules:
    - q_proj
    - 3
  r: 0
training:
  learning_rte: 1e-4
  max_steps: 10
  num_train_epochs: 1
  seed: 1
  seed: 1.5
"""
    here = Path.cwd()
    assert problems(text, "training.learning_rate=ten", "foo", "lora.r=-1") == [
        "model.name_or_path: missing, need a string (recipe.yaml:3)",
        "model.revison: unknown key; did you mean revision? (recipe.yaml:4)",
        f"data.train[0]: no such file: {here}/data/trian.jsonl; did you mean train.jsonl? (recipe.yaml:5)",
        f"data.train[2]: no such file: {here}/gone.csv (recipe.yaml:6)",
        "data.long_rows: split needs format text, got messages; use error, truncate or drop (recipe.yaml:7)",
        "lora.target_modules[1]: got 3 (an integer), need a string (recipe.yaml:11)",
        "training.learning_rte: unknown key; did you mean learning_rate? (recipe.yaml:14)",
        "training.num_train_epochs: cannot be given with training.max_steps; set one of them to null (recipe.yaml:16)",
        "training.seed: given twice, first in line 17 (recipe.yaml:18)",
        "no = in it, need dotted.key=value (--set foo)",
        "lora.r: got -1, need >= 1 (--set lora.r=-1)",
        'training.learning_rate: got "ten", need auto or a number > 0 (--set training.learning_rate=ten)',
    ]


def test_lines_through_anchors_and_merge_keys():
    text = """\
name: demo
model: {name_or_path: base}
data: {train: &t [data/train.jsonl, gone.csv], eval: *t}
deepspeed:
  overrides: &base
    r: 0
    use_dora: 1
fsdp:
  overrides: &more
    r: 1
    lora_alpha: 0
lora:
  <<: [*more, *base]
  lora_dropout: 2
"""
    here = Path.cwd()
    assert problems(text) == [
        f"data.train[1]: no such file: {here}/gone.csv (recipe.yaml:3)",
        f"data.eval[1]: no such file: {here}/gone.csv (recipe.yaml:3)",
        "lora.use_dora: got 1 (an integer), need true or false (recipe.yaml:7)",
        "lora.lora_alpha: got 0, need > 0 (recipe.yaml:11)",
        "lora.lora_dropout: got 2, need >= 0 and < 1 (recipe.yaml:14)",
    ]


def test_merge_keys():
    text = f"""{GOOD}
deepspeed: {{overrides: &a {{x: 1, y: 1}}}}
fsdp: {{overrides: &b {{<<: *a, y: 2, z: 2}}}}
trainer: {{overrides: {{z: 3, <<: *b}}}}
"""
    recipe = load(text)
    assert recipe.fsdp.overrides == {"x": 1, "y": 2, "z": 2}
    assert recipe.trainer.overrides == {"x": 1, "y": 2, "z": 3}
    assert load(text.replace("<<: *b", "<<: [*a, *b]")).trainer.overrides == {"x": 1, "y": 1, "z": 3}
    assert load(text.replace("<<: *b", '"<<": 4')).trainer.overrides == {"z": 3, "<<": 4}
    expected = "trainer.overrides: << needs a mapping or a list of mappings (recipe.yaml:7)"
    assert problem(text.replace("<<: *b", "<<: 3")) == expected
    assert problem(text.replace("<<: *b", "<<: [*a, x]")) == expected


def test_half_a_character_in_a_key():
    assert problems(f'{GOOD}"\\udfff": 1\nlora: {{r: 0}}') == [
        r'got "\udfff", which has half a character (recipe.yaml:4)',
        f'"?": unknown key; allowed: {", ".join(Recipe.model_fields)} (recipe.yaml:4)',
        "lora.r: got 0, need >= 1 (recipe.yaml:5)",
    ]


def test_duplicate_keys():
    assert problems(f"{GOOD}lora: {{r: 1,\n r: 2, r: 3}}\nname: again\n") == [
        "lora.r: given twice, first in line 4 (recipe.yaml:5)",
        "lora.r: given twice, first in line 4 (recipe.yaml:5)",
        "name: given twice, first in line 1 (recipe.yaml:6)",
    ]


# ---- what is no YAML mapping


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty, need a mapping of keys to values (recipe.yaml:1)"),
        ("# only this\n", "empty, need a mapping of keys to values (recipe.yaml:1)"),
        ("\n- a\n", "got a list, need a mapping of keys to values (recipe.yaml:2)"),
        ("hello", 'got "hello", need a mapping of keys to values (recipe.yaml:1)'),
        (
            "a: 1\n---\nb: 1\n",
            "not valid YAML: expected a single document in the stream in line 1, but found another document "
            "(recipe.yaml:2)",
        ),
        (
            "a:\n\tb: 1\n",
            r"not valid YAML: while scanning for the next token, found character '\t' that cannot start any token; "
            "indent with spaces (recipe.yaml:2)",
        ),
        (
            "a: [1\nb: 2\n",
            "not valid YAML: while parsing a flow sequence in line 1, expected ',' or ']', but got ':' (recipe.yaml:2)",
        ),
        ("a: 1\nb: c: d\n", "not valid YAML: mapping values are not allowed here (recipe.yaml:2)"),
        ("a: 1\nb: *x\n", "not valid YAML: found undefined alias 'x' (recipe.yaml:2)"),
        ("a: 1\nb: \x01\n", "not valid YAML: character U+0001 is not allowed (recipe.yaml:2)"),
        ('a: "\\UFFFFFFFF"', "not valid YAML: a number in it is too large (recipe.yaml:1)"),
        (b"\x7fELF\x02\x01\x01\x00", "not valid YAML: character U+007F is not allowed (recipe.yaml:1)"),
        (b"a: 1\n\x89PNG\r\n", "not a text file in UTF-8 (recipe.yaml:2)"),
        ("name: a\n".encode("utf-16"), "not a text file in UTF-8 (recipe.yaml:1)"),
        ("a: " + "[" * 10000, "not valid YAML: nested too deeply (recipe.yaml:1)"),
        ("a:\n  " + "[" * 60 + "]" * 60, "nested more than 50 deep, or an alias inside its own anchor (recipe.yaml:2)"),
        ("a: &a [*a]", "nested more than 50 deep, or an alias inside its own anchor (recipe.yaml:1)"),
        ("a: &a {b: *a}", "nested more than 50 deep, or an alias inside its own anchor (recipe.yaml:1)"),
        ("a: &a {<<: *a}", "nested more than 50 deep, or an alias inside its own anchor (recipe.yaml:1)"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)),
            "more than 20000 values with all aliases unfolded (recipe.yaml:1)",
        ),
        (
            "a0: &a0 {}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12)),
            "more than 20000 values with all aliases unfolded (recipe.yaml:1)",
        ),
        ("a: 1\n" * MAX_BYTES, "cannot read recipe.yaml: larger than 256 KiB"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_not_a_yaml_mapping(text, expected):
    assert problem(text) == expected


def test_files_that_cannot_be_read(folder):
    Path("recipe.yaml").write_text(GOOD)
    for path, expected in {
        "recpe.yaml": "cannot read recpe.yaml: no such file or directory; did you mean recipe.yaml?",
        "gone/recipe.yaml": "cannot read gone/recipe.yaml: no such file or directory",
        "data": "cannot read data: is a directory",
        "./data": "cannot read ./data: is a directory",
        "a\nb\0": r"cannot read a\nb\x00: embedded null byte",
        Path("recipe.yaml/x"): "cannot read recipe.yaml/x: not a directory",
    }.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert caught.value.problems == [expected]


def test_the_file_is_named_as_it_was_given(folder):
    Path("recipe.yaml").write_text(f"{GOOD}lora: {{r: 0}}")
    for name in ("./recipe.yaml", "data/../recipe.yaml", str(folder / "recipe.yaml")):
        with pytest.raises(RecipeError) as caught:
            load_recipe(name)
        assert str(caught.value) == f"lora.r: got 0, need >= 1 ({name}:4)"


def test_tags():
    assert problems(
        f"{GOOD}lora: !!set {{r}}\ntraining: !mine {{seed: !!int x}}\ncheckpoint: {{save_steps: !\n  mine 1}}"
    ) == [
        "lora: tag !!set is not supported (recipe.yaml:4)",
        "lora.r: got null, need an integer >= 1 (recipe.yaml:4)",
        "training: tag !mine is not supported (recipe.yaml:5)",
        'training.seed: cannot read "x" as !!int (recipe.yaml:5)',
        'checkpoint.save_steps: got "mine 1" (a string), need an integer >= 1 (recipe.yaml:6)',
    ]
    assert problem(f"{GOOD}output_dir: !!python/object/apply:os.system ['touch pwned']").startswith(
        "output_dir: tag !!python"
    )
    assert not Path("pwned").exists()


def test_files_of_other_systems():
    assert load(GOOD.replace("\n", "\r\n")).name == "demo"
    assert load(b"\xef\xbb\xbf" + GOOD.encode()).name == "demo"
    assert problem(f"{GOOD}lora: {{r: 0}}".replace("\n", "\r\n")) == "lora.r: got 0, need >= 1 (recipe.yaml:4)"


# ---- overrides


@pytest.mark.parametrize(
    ("sets", "key", "value"),
    [
        (["lora=null"], "lora", None),
        (["lora=null", "lora.r=8"], "lora.r", 8),
        (["lora.r=8", "lora.r=4"], "lora.r", 4),
        (["lora={r: 3, use_dora: true}"], "lora.use_dora", True),
        (["training.mixed_precision=no"], "training.mixed_precision", "no"),
        (["training.learning_rate=1e-4"], "training.learning_rate", 1e-4),
        ([" training . seed = 7 "], "training.seed", 7),
        (["name=007"], "name", "007"),
        (["name=1e5"], "name", "1e5"),
        (["name=true"], "name", "true"),
        (["name='007'"], "name", "007"),
        (["model.revision=1234567"], "model.revision", "1234567"),
        (["model.revision=null"], "model.revision", None),
        (["model.revision=a=b"], "model.revision", "a=b"),
        (["trainer.overrides.run_name=007"], "trainer.overrides", {"run_name": 7}),
        (["training.report_to=[a,b]"], "training.report_to", ["a", "b"]),
        (
            ["deepspeed.overrides.zero_optimization.stage=2", "deepspeed.overrides.zero_optimization.x={y: no}"],
            "deepspeed.overrides",
            {"zero_optimization": {"stage": 2, "x": {"y": "no"}}},
        ),
        (["trainer.overrides.a=1", "trainer.overrides.a.b=2"], "trainer.overrides", {"a": {"b": 2}}),
    ],
)
def test_overrides(sets, key, value):
    got = load(GOOD, *sets)
    for step in key.split("."):
        got = getattr(got, step)
    assert (got, type(got)) == (value, type(value))


def test_an_override_below_a_null_starts_a_fresh_group():
    assert load(f"{GOOD}lora: null", "lora.r=8").lora.model_dump() == {
        **Recipe.model_fields["lora"].default.model_dump(),
        "r": 8,
    }
    assert load(f"{GOOD}lora: {{r: 1, use_dora: true}}", "lora.r=8").lora.use_dora


@pytest.mark.parametrize(("path", "escape"), [(r"C:\x", r"\x"), (r"C:\Users", r"\U"), (r"\_\d", r"\d")])
def test_a_backslash_in_double_quotes(path: str, escape: str) -> None:
    said = (
        f"in double quotes a backslash begins an escape, as in \\n, and {escape} is none; write the backslash twice, "
    )
    given = f'name="{path}"'
    assert problem(GOOD, given) == f"not valid YAML: {said}or leave the quotes out (--set {given})"
    assert problem(f'a: 1\nb: "{path}"') == f"not valid YAML: {said}or leave the quotes out (recipe.yaml:2)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("foo", "no = in it, need dotted.key=value (--set foo)"),
        ("", "no = in it, need dotted.key=value (--set )"),
        ("=1", "empty key, need dotted.key=value (--set =1)"),
        ("a..b=1", "empty key, need dotted.key=value (--set a..b=1)"),
        (".=1", "empty key, need dotted.key=value (--set .=1)"),
        ("name=a: b: c", "not valid YAML: mapping values are not allowed here (--set name=a: b: c)"),
        ("name=*a", "not valid YAML: found undefined alias 'a' (--set name=*a)"),
        ("name=\x00", r"not valid YAML: character U+0000 is not allowed (--set name=\x00)"),
        ("name=", f"name: got null, {NAME} (--set name=)"),
        ("lora={r: 1, r: 2}", "lora.r: given twice, first in line 1 (--set lora={r: 1, r: 2})"),
        ("lora={1: 2}", "lora: got 1 for a key, need a string (in quotes) (--set lora={1: 2})"),
        ("lora.r.x=1", 'lora.r: got {"x": 1} (a mapping), need an integer >= 1 (--set lora.r.x=1)'),
        ("trainer.overrides=1", "trainer.overrides: got 1 (an integer), need a mapping (--set trainer.overrides=1)"),
        (
            "data.eval.0=x",
            'data.eval: got {"0": "x"} (a mapping), need a string, a number > 0 and < 1 or a list of strings or groups '
            "(path, config, weight, ...) (--set data.eval.0=x)",
        ),
        ("lora={r: 1, lora_alpha: 0}", "lora.lora_alpha: got 0, need > 0 (--set lora={r: 1, lora_alpha: 0})"),
        (
            "training.max_steps=" + "x" * 99,
            f'training.max_steps: got "{"x" * 55}..." (a string), need an integer >= 1 '
            f"(--set training.max_steps={'x' * 37}...x)",
        ),
    ],
)  # fmt: skip
def test_overrides_that_are_wrong(text, expected):
    assert problem(GOOD, text) == expected


def test_an_override_fixes_what_is_wrong_in_the_file():
    assert load(f"{GOOD}lora: {{r: 0}}", "lora.r=2").lora.r == 2
    assert load(f"{GOOD}lora: 5", "lora.r=2").lora.r == 2
    assert load(GOOD.replace("train.jsonl", "gone.jsonl"), "data.train=data").data.train == str(Path("data").resolve())


# ---- paths


def test_paths_are_relative_to_the_recipe(folder, monkeypatch):
    text = """\
name: demo
model: {name_or_path: ./base}
data:
  train: [data, ../FOLDER/data/train.jsonl, owner/name, owner/name:train]
  eval: ~/held.jsonl
  chat_template: template.jinja
output_dir: out
""".replace("FOLDER", folder.name)
    (folder / "home").mkdir()
    (folder / "home/held.jsonl").touch()
    (folder / "recipe.yaml").write_text(text)
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.chdir("/")
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.model.name_or_path == f"{folder}/base"
    assert recipe.data.train == [f"{folder}/data", f"{folder}/data/train.jsonl", "owner/name", "owner/name:train"]
    assert recipe.data.eval == f"{folder}/home/held.jsonl"
    assert recipe.data.chat_template == f"{folder}/template.jinja"
    assert recipe.output_dir == "out"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("model.name_or_path", hub) for hub in ("gpt2", "Qwen/Qwen2.5-7B", "data.train", "owner/jsonl")],
        *[("data.train", hub) for hub in ("owner/name", "o-1/n_2.x", "owner/name:train", "owner/name:train[:10%]")],
    ],
)
def test_hub_ids_stay(key, value):
    group, name = key.split(".")
    assert getattr(getattr(load(GOOD, f"{key}='{value}'"), group), name) == value


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.name_or_path", "./bse", "no such folder: {here}/bse; did you mean base?"),
        ("model.name_or_path", "a/b/c", "no such folder: {here}/a/b/c"),
        ("model.name_or_path", "/nowhere", "no such folder: /nowhere"),
        ("model.name_or_path", "~nobody-here/x", "no such folder: {here}/~nobody-here/x"),
        ("model.name_or_path", "./template.jinja", "no such folder: {here}/template.jinja"),
        ("model.name_or_path", "my model", "no such folder: {here}/my model; a hub id is owner/name"),
        ("data.train", "alpaca", "no such file: {here}/alpaca; a hub id is owner/name"),
        ("data.train", "dat", "no such file: {here}/dat; did you mean data?"),
        ("data.train", "data/train.json", "no such file: {here}/data/train.json; did you mean train.jsonl?"),
        ("data.eval", "data/train.jsonl:x", 'got "data/train.jsonl:x", but {here}/data/train.jsonl is no folder or hub '
            "id, so it has no split x; name another file, or hold rows out with a fraction such as 0.05, or name the "
            "folder with all splits, as in data:x"),
        ("data.train", "data/train.jsonl@a:x", 'got "data/train.jsonl@a:x", but {here}/data/train.jsonl is no folder '
            "or hub id, so it has no configuration a; leave @a:x out, or name the folder with all splits, as in "
            "data@a:x"),
        ("data.eval", ":test", 'got ":test", which names nothing; write it after the folder or hub id that has it, '
            "as in owner/name:test"),
        ("data.eval", "data/trian.jsonl:x", "no such file: {here}/data/trian.jsonl; did you mean train.jsonl?"),
        ("data.train", "owner/x.parquet", "no such file: {here}/owner/x.parquet"),
        ("data.train", "../x\x1b[31m", r"no such file: {here.parent}/x\x1b[31m"),
        ("data.train", "/" + "x" * 400, "no such file: /" + "x" * 295 + "...x"),
        (
            "data.eval",
            "https://hub.co/x.jsonl",
            'got "https://hub.co/x.jsonl", URLs are not supported: download it and give its path',
        ),
        ("data.chat_template", "owner/name", "no such file: {here}/owner/name"),
        ("data.chat_template", "data", "no such file: {here}/data"),
    ],
)  # fmt: skip
def test_paths_that_are_not_there(key, value, expected):
    text, line = recipe_with(key, json.dumps(value))
    assert problem(text) == f"{key}: {expected.format(here=Path.cwd())} (recipe.yaml:{line})"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.train", "/lustre/x.jsonl", "/lustre/x.jsonl is not here; its rows are not checked"),
        ("data.train", "data/train.json", "{here}/data/train.json is not here; its rows are not checked; "
            "did you mean train.jsonl?"),
        ("data.train", "alpaca", "{here}/alpaca is not here; its rows are not checked; a hub id is owner/name"),
        ("data.eval", "held.jsonl", "{here}/held.jsonl is not here; its rows are not checked"),
        ("data.chat_template", "templat.jinja", "{here}/templat.jinja is not here; launch needs it; "
            "did you mean template.jinja?"),
    ],
)  # fmt: skip
def test_data_that_is_not_here_is_a_note_unless_it_is_needed(key, value, expected):
    text, _ = recipe_with(key, json.dumps(value))
    assert notes(text) == [f"{key}: {expected.format(here=Path.cwd())}"]
    group, name = key.split(".")
    assert getattr(getattr(load(text), group), name) == str(Path(value).absolute())
    with pytest.raises(RecipeError, match="no such file"):
        load(text, needed=(key,))
    load(text, needed=tuple({*DATA_FILES} - {key}))


def test_each_of_several_files_has_its_note():
    assert notes(GOOD, "data.train=[data/train.jsonl,/a.jsonl,owner/name,/b.jsonl]") == [
        "data.train[1]: /a.jsonl is not here; its rows are not checked",
        "data.train[3]: /b.jsonl is not here; its rows are not checked",
    ]
    assert notes(GOOD) == []


@pytest.mark.parametrize("value", ["https://hub.co/x.jsonl", "./base/gone", "/nowhere"])
def test_what_is_always_an_error(value):
    """Planning reads the model; a URL is nowhere; a folder is no template."""
    key = "data.train" if "https" in value else "model.name_or_path"
    with pytest.raises(RecipeError, match=r"URLs are not supported|no such folder"):
        load(GOOD, f"{key}={value}")
    with pytest.raises(RecipeError, match=r"data\.chat_template: no such file: .*/data \("):
        load(GOOD, "data.chat_template=data")


def test_a_folder_beside_the_recipe_comes_before_a_hub_id(folder):
    (folder / "owner/name").mkdir(parents=True)
    (folder / "gpt2").touch()  # a file is no model
    recipe = load(GOOD, "model.name_or_path=owner/name", "data.train=owner/name")
    assert recipe.model.name_or_path == recipe.data.train == f"{folder}/owner/name"
    assert load(GOOD, "model.name_or_path=gpt2").model.name_or_path == "gpt2"


def test_a_link_keeps_its_name(folder):
    """In the hub's cache train.jsonl links to a blob without a suffix, and the suffix tells the format."""
    (folder / "blob").touch()
    (folder / "real").mkdir()
    (folder / "real/link.jsonl").symlink_to("../blob")
    (folder / "data/in").symlink_to("../real")
    assert load(GOOD, "data.train=data/in/link.jsonl").data.train == f"{folder}/real/link.jsonl"
    assert load(GOOD, "data.train=data/in/..").data.train == str(folder)
    (folder / "loop").symlink_to("loop")
    assert problem(GOOD, "data.train=loop/x.jsonl").startswith(f"data.train: no such file: {folder}/loop/x.jsonl (")


# ---- together


def test_steps_or_epochs():
    assert load(f"{GOOD}training: {{max_steps: 5, num_train_epochs: null}}").training.max_steps == 5
    both = "training.num_train_epochs: cannot be given with training.max_steps; set one of them to null "
    assert problem(f"{GOOD}training: {{max_steps: 5, num_train_epochs: 2}}") == f"{both}(recipe.yaml:4)"
    sets = ["training.max_steps=5", "training.num_train_epochs=2"]
    for text in (GOOD, f"{GOOD}training: {{max_steps: 5}}", f"{GOOD}training: {{max_steps: 5, num_train_epochs: 2}}"):
        assert problem(text, *sets) == f"{both}(--set {sets[1]})"
    assert problem(GOOD, "training={max_steps: 5, num_train_epochs: 2}").startswith(both)


@pytest.mark.parametrize("file", ["num_train_epochs: 2", "max_steps: 9, num_train_epochs: 2"])
def test_an_override_replaces_an_exclusive_field(file):
    text, sets = f"{GOOD}training: {{{file}}}", ["training.max_steps=5"]
    training = load(text, *sets).training
    assert (training.max_steps, training.num_train_epochs) == (5, None)
    assert notes(text, *sets) == [
        "training.num_train_epochs: 2 (recipe.yaml:4) is replaced by --set training.max_steps=5"
    ]
    # Nothing is replaced where the user resolved it, or where the group was replaced as a whole.
    assert notes(text, *sets, "training.num_train_epochs=null") == []
    assert notes(text, "training={max_steps: 5}") == []
    assert load(text, "training.max_steps=null").training.num_train_epochs == 2


def test_epochs_replace_steps():
    text, sets = f"{GOOD}training:\n  max_steps: 5\n", ["training.num_train_epochs=1.5"]
    training = load(text, *sets).training
    assert (training.max_steps, training.num_train_epochs) == (None, 1.5)
    assert notes(text, *sets) == [
        "training.max_steps: 5 (recipe.yaml:5) is replaced by --set training.num_train_epochs=1.5"
    ]


@pytest.mark.parametrize("names", EXCLUSIVE_FIELDS)
def test_exclusive_fields_exist_and_are_unset_by_default(names):
    recipe = load(GOOD, "lora.oft={}")
    for name in names:
        assert functools.reduce(getattr, name.split("."), recipe) in (None, "auto")


@pytest.mark.parametrize("below", ["", "  # r: 8\n"])
def test_a_blank_lora_is_not_full_fine_tuning(below):
    expected = "lora: has nothing below it; write null to train all weights, or leave the key out (recipe.yaml:4)"
    assert problem(f"{GOOD}lora:\n{below}") == expected
    assert load(f"{GOOD}lora:\n{below}", "lora.r=8").lora.r == 8
    assert load(f"{GOOD}lora: null\n").lora is None
    assert load(f"{GOOD}lora: {{}}\n").lora.r == 16


@pytest.mark.parametrize("kind", ["auto", "text", "messages", "prompt_completion"])
def test_split_is_for_text(kind):
    sets = ["data.long_rows=split", f"data.format={kind}"]
    if kind in ("auto", "text"):
        assert load(GOOD, *sets).data.long_rows == "split"
    else:
        expected = f"data.long_rows: split needs format text, got {kind}; use error, truncate or drop (--set {sets[0]})"
        assert problem(GOOD, *sets) == expected


# ---- there and back

HOSTILE = [
    *["no", "1e-4", "2E5", "0o17", "007", "1_0", "null", "~", "", " ", "true", "yes", "2024-01-01", "<<", "=", ".inf"],
    *[
        "a'; echo foo",
        "$(id)",
        "a\nb\n",
        "\t",
        "# x",
        "a: b",
        "- a",
        "{x}",
        "*a",
        "&a",
        "!x",
        "%y",
        "@z",
        "`",
        "'",
        '"',
    ],
    *["é", "😀", "\u2028", "\x85", "\ufeff", "\u202e", "\x1b[0m", "\xa0", "x " * 300, "\\", "---", "..."],
]


def test_dump_is_read_back_the_same_anywhere(folder):
    overrides = {text or "empty": [text, {text: text}] for text in HOSTILE} | {"numbers": [1e-5, 1e300, -0.0, 2**80]}
    recipe = load(GOOD, "model.revision=1e5", "training.learning_rate=1e-05", "data.eval=[data,owner/name]")
    recipe = recipe.model_copy(update={"trainer": type(recipe.trainer)(overrides=overrides)})
    text = dump_recipe(recipe)
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/r.yaml").write_text(text)
    again = load_recipe("elsewhere/r.yaml")
    assert again == recipe
    (folder / "r.yaml").write_text(dump_recipe(again))
    assert dump_recipe(load_recipe("r.yaml")) == dump_recipe(again)


def test_dump_has_every_field():
    text = dump_recipe(load(GOOD, "lora=null"))
    assert "lora: null\n" in text
    assert "mixed_precision: bf16\n" in text
    assert f"train: {Path.cwd()}/data/train.jsonl\n" in text
    assert "mixed_precision: 'no'\n" in dump_recipe(load(GOOD, "training.mixed_precision=no"))


def test_mutated_recipes_load_or_have_problems():
    rng = random.Random(0)
    source = """\
# a recipe
name: demo
model: &m {name_or_path: base, revision: "main"}
data:
  train: [data/train.jsonl, owner/name:train]
  eval: data/heldout.jsonl
lora: {r: 8, target_modules: [q_proj, 'v_proj'], lora_alpha: 1.6e1}
training:
  max_steps: 10
  learning_rate: 1e-4
  mixed_precision: no
deepspeed: {overrides: &o {a: {b: [1, 2]}}}
fsdp: {overrides: {<<: *o, c: 3}}
checkpoint: {save_steps: 5}
"""
    tokens = [
        *":-[]{},&*!|>'\"#%@`?~\n\t\\ ",
        *HOSTILE,
        *source.split(),
        "\\UFFFFFFFF",
    ]
    loaded = 0
    for _ in range(600):
        text = source
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            start = rng.randrange(len(text))
            end = start + rng.choice([0, 0, 1, 5, 30])
            text = text[:start] + rng.choice([*tokens, ""]) + text[end:]
        sets = [rng.choice(source.split()) + rng.choice(["", "=", ".r="]) + rng.choice(tokens)] * rng.choice([0, 0, 1])
        try:
            recipe = load(text.encode("utf-8", "surrogatepass"), *sets)
        except RecipeError as error:
            for line in error.problems:
                assert line.isprintable() and line.endswith(")") and len(line) < 600, line
        else:
            loaded += 1
            Path("again.yaml").write_text(dump_recipe(recipe))
            assert load_recipe("again.yaml") == recipe
    assert 10 < loaded < 400  # the loop reaches both ends


# ---- another model


class Site(BaseModel):
    """As a cluster profile will be."""

    model_config = ConfigDict(extra="forbid", strict=True)

    partition: str
    limits: dict[str, int] = {}
    setup: list[str] = []

    @model_validator(mode="after")
    def _check(self):
        if self.partition == "none":
            raise ValueError("partition none is not a partition")
        return self


def test_another_model(folder):
    (folder / "site.yaml").write_text("partition: 7\nlimits:\n  gpu: many\nsetup: [1]\nlimit: {}\n")
    document = load_yaml("site.yaml", Site, ["partition=8"])
    assert document.places == {(): 1, ("partition",): "--set partition=8", ("limits",): 2, ("limits", "gpu"): 3} | {
        ("setup",): 4, ("setup", 0): 4, ("limit",): 5,
    }  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        validate(document)
    assert caught.value.problems == [
        'limits.gpu: got "many" (a string), need an integer (site.yaml:3)',
        "setup[0]: got 1 (an integer), need a string (site.yaml:4)",
        "limit: unknown key; did you mean limits? (site.yaml:5)",
    ]
    document = Document("--set", Site)  # without a file
    document.override("partition=none")
    with pytest.raises(RecipeError, match=r"^partition none is not a partition \(--set\)$"):
        validate(document)


# ---- the schema and the imports


def test_json_schema():
    schema = documented_schema(Recipe)
    assert json.loads(json.dumps(schema)) == schema
    keywords = {
        *(
            "$defs",
            "$ref",
            "additionalProperties",
            "anyOf",
            "const",
            "default",
            "description",
            "enum",
            "items",
            "title",
        ),
        *(
            "exclusiveMaximum",
            "exclusiveMinimum",
            "maxLength",
            "maximum",
            "minItems",
            "minLength",
            "minimum",
            "pattern",
            "x-pattern",
        ),
        *("properties", "required", "type"),
    }

    def check(node: dict) -> None:
        assert set(node) <= keywords
        assert node.get("type", "null") in ("array", "boolean", "integer", "null", "number", "object", "string")
        assert set(node.get("required", ())) <= set(node.get("properties", ()))
        for group in ("properties", "$defs"):
            for below in node.get(group, {}).values():
                check(below)
        for below in [*node.get("anyOf", ()), *([node["items"]] if "items" in node else [])]:
            check(below)
        if "$ref" in node:
            assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]

    check(schema)


def test_every_field_has_a_description():
    def fields(node, path=()):
        for name, below in node.get("properties", {}).items():
            members = [below, *below.get("anyOf", ())]
            yield ".".join([*path, name]), [text for member in members if (text := member.get("description"))]
            for member in members:
                yield from fields(member, (*path, name))

    found = dict(fields(documented_schema_of(Recipe)))
    assert len(found) > 50
    assert [path for path, texts in found.items() if not texts] == []


@pytest.mark.parametrize("module", ["distft.config.loading", "distft.strategies.deepspeed", "distft.schedulers.slurm"])
def test_light_imports(module):
    code = f"import sys, {module}; print({{'torch', 'transformers', 'jinja2', 'rich', 'deepspeed'}} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")


# ---- the data's fields


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.eval=0.05", 0.05),
        ("data.train=[{path: data, weight: 2}, {path: o/n, config: main, weight: 1}]", None),
        ("data.train=[{path: data, rows: 10}, o/n@abc:train, {path: o/n, epochs: 0.5}]", None),
        ("data.format=alpaca", "alpaca"),
        ("data.columns={prompt: question, completion: answer}", {"prompt": "question", "completion": "answer"}),
        ("data.columns.messages=dialog", {"messages": "dialog"}),
        ("data.roles.developer=system", {"developer": "system"}),
        ("data.train_on=last", "last"),
        ("data.ignore_fields=[tools]", ["tools"]),
    ],
)
def test_fields_of_the_data(override, expected, tmp_path):
    Path("data").mkdir(exist_ok=True)
    recipe = load(GOOD, override)
    if expected is not None:
        assert getattr(recipe.data, override.removeprefix("data.").partition("=")[0].partition(".")[0]) == expected
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "dumped.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.eval=1.5", "data.eval: got 1.5, need a string, a number > 0 and < 1 or a list"),
        ("data.train=[{path: data, wieght: 2}]", "data.train[0].wieght: unknown key; did you mean weight?"),
        ("data.train=[{weight: 2}]", "data.train[0].path: missing, need a string"),
        ("data.train=[{path: data, weight: 0}]", "data.train[0].weight: got 0, need > 0"),
        ("data.train=[{path: data, weight: 1, rows: 2}]", "data.train[0].rows: cannot be given with weight"),
        ("data.train=[{path: data, weight: 1}, o/n]", "data.train[1]: has no weight, and others have"),
        ("data.train=[{path: ./nowhere, rows: 1}, '*.jsonl', b.csv]", None),
        ("data.columns={prmpt: x}", "data.columns.prmpt: not a column that can be given another name; did you mean"),
        ("data.columns={prompt: x, text: y}", "data.columns: no format has all of prompt, text"),
        ("data={format: text, columns: {prompt: x}, train: o/n}", "data.columns.prompt: not a column of format text"),
        ("data={format: tokens, long_rows: split, train: o/n}", "data.long_rows: split needs format text, got tokens"),
        ("data.train_on=first", "data.train_on: got"),
    ],
)
def test_fields_of_the_data_that_are_wrong(override, expected):
    Path("data").mkdir(exist_ok=True)
    if expected is None:  # none of the three is here
        places = [text.partition(":")[0] for text in problems(GOOD, override)]
        assert places == ["data.train[0].path", "data.train[1]", "data.train[2]"]
    else:
        assert problem(GOOD, override).startswith(expected)


@pytest.mark.parametrize(
    ("text", "loaded"),
    [
        ("data", "{here}/data"),
        ("data:validation", "{here}/data:validation"),
        ("data@small:train", "{here}/data@small:train"),
        ("od@d:d", "{here}/od@d:d"),
        ("data/*.jsonl", "{here}/data/*.jsonl"),
        ("owner/name", "owner/name"),
        ("owner/name@refs/convert/parquet:test", "owner/name@refs/convert/parquet:test"),
        ("hf://datasets/owner/name/a.jsonl", "hf://datasets/owner/name/a.jsonl"),
        ("https://huggingface.co/datasets/owner/name", "https://huggingface.co/datasets/owner/name"),
        ("here/local", "{here}/here/local"),
        ("gone/train.jsonl.gz", "{here}/gone/train.jsonl.gz"),
    ],
)
def test_forms_of_a_path(text, loaded):
    """A file that is there always wins over something on the hub."""
    for name in ("data", "od@d:d", "here/local"):
        Path(name).mkdir(exist_ok=True, parents=True)
    Path("data/a.jsonl").touch()
    assert load(GOOD, f"data.train='{text}'").data.train == loaded.format(here=Path.cwd())


def test_the_name_of_a_chat_template():
    assert load(GOOD, "data.chat_template=tool_use").data.chat_template == "tool_use"
