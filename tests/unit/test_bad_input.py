"""What a person gets wrong: one clear error, exit status 2, nothing started, nothing written, no traceback."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from running import distft
from tiny import Tiny, make_tokenizer, write_jsonl

from distft.cli import main

ROW = {"messages": [{"role": "user", "content": "read file"}, {"role": "assistant", "content": "open path"}]}


@pytest.fixture
def refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Launches a recipe that must be refused; returns what was printed."""
    monkeypatch.chdir(tmp_path)

    def check(*arguments: str, recipe: dict[str, Any] | str | None = None, ranks: int = 1, **changes: Any) -> str:
        recipe = tiny.recipe(**changes) if recipe is None else recipe
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
        before = set(tmp_path.rglob("*"))
        done = CliRunner().invoke(main, ["launch", "recipe.yaml", "--gpus-per-node", str(ranks), *arguments])
        assert done.exit_code == 2, done.output + repr(done.exception)
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.output
        assert set(tmp_path.rglob("*")) == before, "something was written"
        return done.stderr

    return check


def data_file(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    write_jsonl(folder / name, rows)
    return str(folder / name)


def test_unknown_key_and_wrong_type_at_once(refused: Callable[..., str], tiny: Tiny) -> None:
    said = refused(recipe=tiny.recipe(training__learning_rte=1.0, training__max_steps="ten"))
    assert "training.learning_rte: unknown key; did you mean learning_rate? (recipe.yaml:" in said
    assert 'training.max_steps: got "ten"' in said


def test_hostile_run_name(refused: Callable[..., str]) -> None:
    for name in ("a'; echo foo", "$(id)", "../up", "-rf", "two words", "new\nline", "", "a/b", ".hidden"):
        assert "name: " in refused(name=name)


def test_missing_files(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "data.train: no such file" in refused(data__train="nowhere.jsonl")
    assert "model.name_or_path: no such" in refused(model__name_or_path="./nowhere")
    done = distft("launch", "nowhere.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr


def test_empty_data(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "data.train: no rows" in refused(data__train=str(tmp_path / "empty.jsonl"))


def test_malformed_line_7(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(ROW) + "\n" for _ in range(6)) + '{"messages": [}\n')
    assert f"{path}:7: not JSON" in refused(data__train=str(path))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": 5}]}, ":2: messages[0].content: got 5, need a string"),
        ({"messages": [{"content": "x"}]}, ":2: messages[0].role: got nothing, need a string"),
        ({"messages": [{"role": "user", "content": "x"}]}, ":2: messages: no assistant turn"),
        ({"messages": "hello"}, ':2: messages: got "hello", need a list of {role, content}'),
        ({"text": "hello"}, ":2: messages: got nothing, need a list"),
    ],
)
def test_row_that_does_not_fit(refused: Callable[..., str], tmp_path: Path, row: dict[str, Any], said: str) -> None:
    path = data_file(tmp_path, [ROW, row])
    answer = refused(data__train=path)
    assert f"{path}{said}" in answer
    assert "1 of 2 rows do not fit" in answer


def test_other_kinds_of_rows(refused: Callable[..., str], tmp_path: Path) -> None:
    said = refused(data__train=data_file(tmp_path, [{"quest": "x", "reward": "y"}]))
    assert ":1: got the fields quest, reward; need messages, prompt + completion, instruction + output" in said
    said = refused(data__train=data_file(tmp_path, [{"prompt": "x", "completion": None}]))
    assert ":1: completion: got nothing, need a string" in said
    (tmp_path / "rows.csv").write_text('prompt,completion\na,b\n"c\n')
    assert "rows.csv" in refused(data__train=str(tmp_path / "rows.csv"))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 not really")
    assert "not parquet" in refused(data__train=str(tmp_path / "rows.parquet"))
    (tmp_path / "folder").mkdir()
    assert "no data file in this folder" in refused(data__train=str(tmp_path / "folder"))


def test_row_longer_than_max_length(refused: Callable[..., str], tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "list " * 80}, {"role": "assistant", "content": "dict"}]}
    path = data_file(tmp_path, [ROW, ROW, long])
    said = refused(data__train=path)
    assert f"{path}:3: " in said
    assert "data.train: 1 row is longer than data.max_length (64 tokens), the longest has " in said
    assert "data.long_rows: truncate or drop" in said


def test_tokenizer_without_pad_or_chat_template(refused: Callable[..., str], tiny: Tiny, tmp_path: Path) -> None:
    for folder, options in (("nopad", {"pad": False}), ("nochat", {"chat": False})):
        shutil.copytree(tiny.path / "model", tmp_path / folder)
        (tmp_path / folder / "chat_template.jinja").unlink()
        make_tokenizer(tmp_path / folder, **options)
    said = refused(model__name_or_path=str(tmp_path / "nopad"))
    assert 'has no padding token; set model.pad_token: "<eos>"' in said
    said = refused(model__name_or_path=str(tmp_path / "nochat"))
    assert "messages need a chat template" in said
    assert "data.chat_template" in said
    assert "not in the tokenizer's vocabulary" in refused(model__pad_token="<nope>")


def test_model_folder_without_weights(refused: Callable[..., str], tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.path / "model", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is not a complete safetensors file" in refused(model__name_or_path=str(folder))
    weights.rename(folder / "pytorch_model.bin")
    said = refused(model__name_or_path=str(folder))
    assert "has no weights (*.safetensors); found pytorch_model.bin, which is a pickle and is not loaded" in said
    (folder / "config.json").write_text("{")
    assert "is not JSON" in refused(model__name_or_path=str(folder))
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(model__name_or_path=str(folder))


def test_hub_model_without_network(tiny: Tiny, tmp_path: Path) -> None:
    """In another process: the hub's client reads HF_HUB_OFFLINE when it is imported."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(model__name_or_path="owner/missing")))
    done = distft("launch", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "owner/missing is neither a folder beside the recipe nor a readable hub model" in done.stderr


def test_batch_that_does_not_divide(refused: Callable[..., str]) -> None:
    said = refused(ranks=3)
    assert "training.global_batch_size: got 8, which 3 ranks cannot share evenly" in said
    assert "nearest that they can: 6 or 9; or run 8 on 1, 2, 4 ranks" in said
    said = refused(ranks=2, training__micro_batch_size=3)
    assert "training.micro_batch_size: got 3, which does not divide the 4 sequences of a rank" in said
    assert "nearest that do: 1, 2, 4" in said


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model__quantization": "nf4", "lora": None}, "quantization-needs-lora"),
        ({"model__quantization": "int8", "parallelism__strategy": "zero3"}, "int8-cannot-be-sharded"),
        ({"model__quantization": "int8", "parallelism__strategy": "fsdp"}, "int8-cannot-be-sharded"),
        ({"parallelism__strategy": "ddp", "parallelism__offload": "optimizer"}, "offload-needs-a-strategy-that-can"),
        ({"parallelism__strategy": "zero2", "parallelism__offload": "all"}, "offload-needs-a-strategy-that-can"),
        ({"parallelism__strategy": "fsdp", "parallelism__offload": "all"}, "fsdp-offload-needs-a-gpu"),
        (
            {"parallelism__strategy": "zero2", "parallelism__offload": "optimizer", "training__optim": "adafactor"},
            "matrix-optimizers-need-whole-matrices",
        ),
        ({"parallelism__strategy": "fsdp", "training__optim": "adamw_bnb_8bit"}, "fsdp-needs-adamw"),
        ({"parallelism__strategy": "zero2", "training__optim": "adafactor"}, "matrix-optimizers-need-whole-matrices"),
        ({"parallelism__strategy": "hsdp"}, "hsdp-needs-whole-groups"),
        ({"training__mixed_precision": "fp16"}, "fp16-needs-a-gpu"),
        ({"model__attn_implementation": "flash_attention_2"}, "flash-attention-needs-ampere"),
        ({"training__use_liger_kernel": True}, "liger-needs-a-gpu"),
    ],
)
def test_what_cannot_be_combined(refused: Callable[..., str], changes: dict[str, Any], rule: str) -> None:
    assert f"[{rule}]" in refused(ranks=2, **changes)


def test_target_modules_that_do_not_exist(refused: Callable[..., str], tiny: Tiny) -> None:
    said = refused(lora={"target_modules": ["query_proj"]})
    assert "got query_proj, and the model has no such layer; it has down_proj, gate_proj, k_proj" in said


def test_recipe_model_and_data_are_checked_at_once(refused: Callable[..., str], tiny: Tiny, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"lora__target_modules": ["qq_proj"], "data__train": str(tmp_path / "gone.jsonl")}
    path, layer = refused(**changes).splitlines()
    assert re.fullmatch(r"error: data.train: no such file: .*gone.jsonl \(recipe.yaml:\d+\)", path)
    assert re.fullmatch(
        r"lora.target_modules: got qq_proj, and the model has no such layer; .* \(recipe.yaml:\d+\)", layer
    )
    changes["data__train"] = data_file(tmp_path, [ROW, {"messages": 5}])
    layer, row, _ = refused(**changes).splitlines()
    assert layer.startswith("error: lora.target_modules: got qq_proj") and "rows.jsonl:2: messages" in row
    given = "--set", "lora.layers_to_transform=[0, 0]"
    lines = refused(*given, **changes).splitlines()
    assert lines == [f"error: lora.layers_to_transform[1]: got 0, which is in the list already ({' '.join(given)})"]


def test_several_nodes_without_a_cluster(refused: Callable[..., str]) -> None:
    assert "--nodes: got 2, but without a cluster distft starts only this machine" in refused("--nodes", "2")
    assert "--gpus-per-node: got 0, need >= 1" in refused(ranks=0)


def test_unwritable_output_dir(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe() | {"output_dir": "file/runs"}))
    done = distft("launch", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "output_dir: " in done.stderr
    assert "Traceback" not in done.stderr


def test_no_recipe_or_both(tiny: Tiny, tmp_path: Path) -> None:
    assert distft("launch", cwd=tmp_path).returncode == 2
    assert distft("launch", "recipe.yaml", "--", "script.py", cwd=tmp_path).returncode == 2
    done = distft("launch", "--", "nowhere.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "no such file: nowhere.py" in done.stderr


def test_a_long_row_can_be_truncated_dropped_or_split(tiny: Tiny, tmp_path: Path) -> None:
    """One launch for each choice would be slow: preparation alone shows it."""
    from distft.config.loading import load_recipe
    from distft.train.data import load_prepared

    path = data_file(tmp_path, [{"text": "list"}, {"text": "dict " * 300}])
    documents = {}
    for how in ("truncate", "drop", "split"):
        recipe = tiny.recipe(data__train=path, data__long_rows=how, data__packing=False)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        prepared = load_prepared(load_recipe(tmp_path / "recipe.yaml"))
        documents[how] = sorted(len(row["input_ids"]) for row in prepared.train)
        assert prepared.counts["train"]["long_rows"] == 1
    whole = sum(documents["split"])
    assert documents["truncate"] == [documents["drop"][0], 64]
    assert documents["drop"] == [documents["truncate"][0]]
    assert whole > 64 * 2
    assert max(documents["split"]) == 64


def test_more_processes_than_cores_is_a_warning(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(training__global_batch_size=512)))
    done = distft("launch", "recipe.yaml", "--gpus-per-node", "512", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    assert "512 processes share " in done.stdout


def test_overrides_are_held_to_the_same_checks(refused: Callable[..., str], tmp_path: Path) -> None:
    said = refused("--set", "training.max_stepz=5", "--set", "lora.r=0")
    assert "did you mean max_steps?" in said
    assert "(--set training.max_stepz=5)" in said
    assert "lora.r: got 0" in said
    (tmp_path / "train.py").write_text("print('hello')")
    done = distft("launch", "--set", "model.name_or_path=x", "--", "train.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown key" in done.stderr
