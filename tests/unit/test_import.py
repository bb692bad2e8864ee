"""`distft import` as a command: what it prints, writes and refuses, whatever tool the file is for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from importing import AXOLOTL, run, write_tokenizer

from distft import importers
from distft.cli import main
from distft.config.loading import load_recipe
from distft.errors import RecipeError
from distft.models.vocabulary import control_tokens


def test_command(here: Path) -> None:
    (here / "in").mkdir()
    (here / "in" / "rows.jsonl").write_text("")
    options = {**AXOLOTL, "datasets": [{"path": "rows.jsonl", "type": "chat_template"}], "tf32": False}
    (here / "in" / "chat.yml").write_text(yaml.safe_dump(options))
    status, out, error = run("in/chat.yml", "--gpus", "4", "-o", "recipe.yaml")
    assert status == 0, error
    assert out.endswith("wrote recipe.yaml\n")
    recipe = load_recipe("recipe.yaml")
    assert recipe.data.train == str(here / "in" / "rows.jsonl")  # relative to the recipe
    assert (recipe.name, recipe.training.global_batch_size, recipe.lora) == ("chat", 4, None)
    assert Path("recipe.yaml").read_text().startswith("# Imported from axolotl's chat.yml, --gpus 4\nname: chat\n")
    status, out, error = run("in/chat.yml", "--gpus", "4")
    assert status == 2
    assert error.endswith("error: recipe.yaml: already exists; name another file, or remove it\n")
    assert out.startswith("mapped:\n")  # what was found is shown all the same


def test_refused_options_write_nothing(here: Path) -> None:
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "relora": True, "model_config": {"a": "b\nc"}}))
    status, out, error = run("x.yml", "--gpus", "1")
    assert status == 2
    assert "relora: true" in out
    assert "x.yml: 2 options cannot be trained the same way, so nothing was written" in error
    assert not Path("recipe.yaml").exists()
    status, _, _ = run("x.yml", "--gpus", "1", "--partial")
    assert status == 0
    head = Path("recipe.yaml").read_text().splitlines()[:4]
    assert head[1] == "# Not the same training: this recipe lacks"
    assert load_recipe("recipe.yaml").model.name_or_path == "owner/model"
    assert all(line.startswith("#") for line in head)


def test_what_a_part_of_a_recipe_lacks_stands_at_its_top(here: Path) -> None:
    options = {**AXOLOTL, "rl": "dpo", "chat_template": "chatml"}  # its data sets are not those of examples
    (here / "x.yml").write_text(yaml.safe_dump(options))
    status, out, error = run("x.yml", "--gpus", "1", "--partial")
    assert status == 0, error
    mapped, left = out.split("dropped, and what that means:")
    assert "datasets" not in mapped and "chat_template" not in mapped and "datasets" in left
    head = [line for line in Path("recipe.yaml").read_text().splitlines() if line.startswith("#")]
    assert head[-2:] == [
        "# To be filled in, before it is a recipe",
        "#   data.train: a file, a folder, or a hub id: owner/name",
    ]
    with pytest.raises(RecipeError, match=r"data\.train: missing"):
        load_recipe("recipe.yaml")
    assert load_recipe("recipe.yaml", ["data.train=owner/name"]).model.name_or_path == "owner/model"


def test_json(here: Path) -> None:
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "wandb_project": "p", "relora": True}))
    status, out, error = run("x.yml", "--gpus", "2", "--json")
    found = json.loads(out)
    assert status == 2
    assert "nothing was written" in error
    assert set(found) == {"kind", "recipe", "mapped", "dropped", "refused", "warnings", "written"}
    assert found["recipe"]["training"]["global_batch_size"] == 2
    assert [item["option"] for item in found["refused"]] == ["relora"]
    assert found["mapped"][0] == {
        "option": "base_model", "value": "owner/model", "field": "model.name_or_path", "to": "owner/model", "line": 1,
    }  # fmt: skip
    assert found["written"] == []


def test_standard_output(here: Path) -> None:
    (here / "x.yml").write_text(yaml.safe_dump(AXOLOTL))
    status, out, error = run("x.yml", "--gpus", "2", "-o", "-")
    assert status == 0
    assert yaml.safe_load(out)["data"]["train"] == "owner/rows"
    assert "learning_rate: 0.0001" in error
    assert not list(here.glob("recipe*"))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_width(here: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    long = {**AXOLOTL, "optim_args": {"a": "x" * 300}, "chat_template": "cohere", "relora": True}
    (here / "x.yml").write_text(yaml.safe_dump(long))
    _, out, error = run("x.yml", "--gpus", "2")
    assert all(len(line) <= width for line in out.splitlines())
    assert all(len(line) <= width for line in error.splitlines() if line.startswith("warning"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty, need a mapping of keys to values (x.yml:1)"),
        (b"- a\n- b\n", "got a list, need a mapping"),
        (b"just text", 'got "just text", need a mapping'),
        (b"a: [1, 2", "not valid YAML: "),
        (b"\x00\x01\xff\xfe", "not a text file in UTF-8"),
        (b"base_model: a\nbase_model: b\n", "base_model: given twice, first in line 1 (x.yml:2)"),
        (b"base_model: !!python/object:os.system x\n", "cannot read"),
        (b"base_model: &a [*a]\n", "an alias inside its own anchor"),
        (b"# " + b"x" * 300_000, "cannot read x.yml: larger than 256 KiB"),
        (b"a: 1\nb: 2\n", "x.yml: not a training file of axolotl, LLaMA-Factory, TRL, torchtune or accelerate"),
        (
            b"model: o/m\ntrain_dataset: x.yaml\n",
            "train_dataset: no such file: x.yaml; did you mean x.yml? (x.yml:2); download it",
        ),
        (b"base_model: 3\nlearning_rate: fast\n", "base_model: got 3 (an integer), need a string (x.yml:1)"),
        (b"base_model: o/m\nlearning_rate: 1\ndatasets: x\n", 'datasets: got "x" (a string), need a list of mappings'),
    ],
)
def test_bad_files(here: Path, content: bytes, expected: str) -> None:
    (here / "x.yml").write_bytes(content)
    status, _, error = run("x.yml", "--gpus", "2")
    assert status == 2
    assert expected in error
    assert not (here / "recipe.yaml").exists()


def test_a_file_that_is_something_else(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named for what it is, with the command that takes it."""
    (here / "rows.jsonl").write_text('{"text": "x"}\n')
    (here / "rows.json").write_text(' [{"text": "x"}]\n' + " " * 300_000)
    (here / "train.py").write_text("import torch\n")
    for name, data in {
        "recipe.yml": {"name": "x", "model": {"name_or_path": "o/m"}, "data": {"train": "rows.jsonl"}},
        "axolotl.yml": AXOLOTL,
        "profile.yml": {"runs_dir": "/runs", "node": {"gpus_per_node": 8}},
        "config.json": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        "ds.json": {"zero_optimization": {"stage": 3}},
    }.items():
        (here / name).write_text(json.dumps(data))
    rows = "a file of rows; a recipe names it, as data: {train: NAME}, and the commands take the recipe"
    script = "a script; distft launch runs it: distft launch -- train.py"
    for name, text in {
        "rows.jsonl": rows,
        "rows.json": rows,
        "train.py": script,
        "profile.yml": "a site profile; it goes with a recipe: distft plan RECIPE --cluster profile.yml",
        "config.json": "a model's config; a recipe names its folder in model.name_or_path",
        "ds.json": "a DeepSpeed config; a recipe says parallelism.strategy, and deepspeed.overrides for the rest",
    }.items():
        for command in ("import", "validate", "plan", "launch", "data"):
            done = CliRunner().invoke(main, [command, name])
            if (command, name) == ("launch", "train.py"):
                assert done.exit_code == 2 and "is a script: put -- before it" in done.stderr
                continue
            assert (done.exit_code, done.stderr) == (2, f"error: {name}: {text.replace('NAME', name)}\n")
    done = CliRunner().invoke(main, ["import", "recipe.yml"])
    assert done.stderr == "error: recipe.yml: a recipe of distft's already; check it with: distft validate recipe.yml\n"
    done = CliRunner().invoke(main, ["validate", "axolotl.yml"])
    made = "a file of axolotl's, and no recipe; make one of it with: distft import axolotl.yml"
    assert done.stderr == f"error: axolotl.yml: {made}\n"


def test_what_is_missing(here: Path) -> None:
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "micro_batch_size": 2, "gradient_accumulation_steps": 4}))
    status, _, error = run("x.yml")
    assert status == 2
    assert error == (
        "error: --gpus is missing: x.yml says micro_batch_size 2 x gradient_accumulation_steps 4 for each GPU, and not "
        "on how many it was used; with --gpus N, training.global_batch_size is 8 x N\n"
    )
    assert "cannot read none.yml: no such file" in run("none.yml")[2]
    assert "no such option '--gpu'; did you mean one of: '--gpus', '--output'?" in run("x.yml", "--gpu", "2")[2]
    assert "cannot be written" in run("x.yml", "--gpus", "1", "-o", "no/folder/r.yaml")[2]
    assert (
        "--cluster-out: axolotl's file says nothing of the machines"
        in run("x.yml", "--gpus", "1", "--cluster-out", "c.yaml")[2]
    )
    assert "need a multiple of 2 (tensor_parallel_size 2)" in _three_gpus(here)


def _three_gpus(here: Path) -> str:
    (here / "t.yml").write_text(yaml.safe_dump({**AXOLOTL, "tensor_parallel_size": 2}))
    return run("t.yml", "--gpus", "3")[2]


def test_absolute_and_absent_models(here: Path) -> None:
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "base_model": "/nowhere/model"}))
    status, _, error = run("x.yml", "--gpus", "1")
    assert status == 0
    assert "warning: model.name_or_path: /nowhere/model is not on this machine" in error
    assert yaml.safe_load(Path("recipe.yaml").read_text())["model"]["name_or_path"] == "/nowhere/model"


CONVERSATION = [
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Yes\n"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
]
# Written by hand from axolotl's templates of these names; «» marks what is trained.
RENDERED = {
    "chatml": (
        "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n«Yes\n<|im_end|>»\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n"
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«b<|eot_id|>»"
    ),
    "gemma": (
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Yes<end_of_turn>»\n"
        "<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n«b<end_of_turn>»\n"
    ),
    "phi_3": (
        "<s><|user|>\nHi <|end|>\n<|assistant|>\n«Yes\n<|end|>»\n<|user|>\na<|end|>\n<|assistant|>\n«b<|end|>»\n"
    ),
}


def test_templates(here: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    folder = Path(importers.__file__).parent / "templates"
    assert {path.stem for path in folder.iterdir()} == set(RENDERED)
    for name, expected in RENDERED.items():
        write_tokenizer(here / "model", *control_tokens((folder / f"{name}.jinja").read_text()))
        options = {**AXOLOTL, "base_model": "model", "chat_template": name, "warmup_ratio": 0.1, "bf16": False}
        (here / f"{name}.yml").write_text(yaml.safe_dump(options))
        status, _, error = run(f"{name}.yml", "--gpus", "1", "-o", f"{name}.yaml")
        assert (status, error) == (0, "")
        template = Path(load_recipe(f"{name}.yaml").data.chat_template or "")
        assert template == here / f"{name}.jinja"
        rendered, spans = render_jinja_template(
            conversations=[CONVERSATION],
            chat_template=template.read_text(),
            return_assistant_tokens_mask=True,
            bos_token="<s>",
            eos_token="</s>",
        )
        text = rendered[0]
        for start, end in reversed(spans[0]):
            text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
        assert text == expected, name


def test_templates_are_named_after_their_recipe(here: Path) -> None:
    """Imports into one folder keep their own, and nothing is overwritten."""
    Path("chatml.jinja").write_text("mine")
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "chat_template": "chatml"}))
    assert run("x.yml", "--gpus", "1")[1].endswith("wrote recipe.jinja\nwrote recipe.yaml\n")
    Path("recipe.yaml").unlink()
    assert run("x.yml", "--gpus", "1")[0] == 0  # the same template is there already
    Path("recipe.yaml").unlink()
    Path("recipe.jinja").write_text("mine, too")
    status, out, error = run("x.yml", "--gpus", "1")
    assert (status, not Path("recipe.yaml").exists()) == (2, True)
    assert "recipe.jinja: already exists; name another recipe with -o, after which it is called, or remove it" in error
    assert out.startswith("mapped:\n")
    assert run("x.yml", "--gpus", "1", "-o", "other.yaml")[0] == 0
    assert load_recipe("other.yaml").data.chat_template == str(here / "other.jinja")
    assert "name the recipe .yaml" in run("x.yml", "--gpus", "1", "-o", "third.jinja")[2]
    assert (
        "recipe.jinja is written beside a recipe alone: name a file with -o"
        in run("x.yml", "--gpus", "1", "-o", "-")[2]
    )


def test_tokens_that_the_tokenizer_lacks(here: Path) -> None:
    options = {**AXOLOTL, "base_model": "model", "warmup_steps": 0, "chat_template": "chatml", "bf16": False}
    options["special_tokens"] = {"eos_token": "<e>"}
    (here / "x.yml").write_text(yaml.safe_dump(options))
    write_tokenizer(here / "model", "<|im_end|>")
    status, _, error = run("x.yml", "--gpus", "1")
    assert status == 0
    assert load_recipe("recipe.yaml").model.add_tokens == ["<e>", "<|im_start|>"]
    assert "lacks <e>, <|im_start|>, which are added; axolotl would train <|im_start|> in pieces" in error
    write_tokenizer(here / "model", "<|im_end|>", "<|im_start|>", "<e>")
    assert run("x.yml", "--gpus", "1", "-o", "has.yaml")[2] == ""
    assert load_recipe("has.yaml").model.add_tokens == []
    (here / "x.yml").write_text(yaml.safe_dump(options | {"base_model": "owner/model", "tokens": ["<e>"]}))
    _, _, error = run("x.yml", "--gpus", "1", "-o", "absent.yaml")
    assert load_recipe("absent.yaml").model.add_tokens == ["<e>"]
    assert (
        "warning: model.add_tokens: the tokenizer of owner/model is not on this machine, so whether it has "
        "<|im_start|>, <|im_end|> is not known. Where it is, distft validate says which it lacks; add those to the "
        'recipe, at most model.add_tokens: ["<e>", "<|im_start|>", "<|im_end|>"]\n'
    ) in error


def test_what_a_value_means(here: Path) -> None:
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "train_on_inputs": False}))
    out = run("x.yml", "--gpus", "1")[1]
    assert "data.train_on: all (all answers, and no prompts)" in out
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "optim_args": {"a": "x" * 300}, "relora": True}))
    lines = run("x.yml", "--gpus", "1", "--partial", "-o", "y.yaml")[1].splitlines()
    assert any(
        "optim_args" in line and line.endswith("distft passes its optimizer no other arguments") for line in lines
    )


def test_inline_template(here: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "chat_template": "jinja", "chat_template_jinja": template}))
    status, _, error = run("x.yml", "--gpus", "1")
    assert status == 0, error
    assert Path("recipe.jinja").read_text() == template
    assert load_recipe("recipe.yaml").data.chat_template == str(here / "recipe.jinja")


def test_start_up_is_light(here: Path) -> None:
    (here / "x.yml").write_text(yaml.safe_dump({**AXOLOTL, "chat_template": "chatml"}))
    command = [sys.executable, "-X", "importtime", "-m", "distft", "import", "x.yml", "--gpus", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "distft.importers.axolotl" in loaded
    assert not loaded & {"torch", "transformers", "importlib.metadata", "rich", "jinja2", "distft.planner.plan"}
    assert "huggingface_hub.file_download" not in loaded  # of a client that takes as long as all the rest
