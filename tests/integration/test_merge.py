"""`distft merge`: the written model computes what was trained, or nothing is written. Model cards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import Result, distft
from safetensors.torch import load_file, save_file
from tiny import Tiny, make_model, make_tokenizer

from distft import extras
from distft.commands import merge as merge_command
from distft.config.loading import load_recipe
from distft.data import cache
from distft.errors import DataError, DistftError, MissingPartError, RecipeError, RunError
from distft.runs import model_card
from distft.runs.directory import RunDir
from distft.runs.status import update_status
from distft.train import merge as merging_process
from distft.train.merge import merge
from distft.train.merge_check import ROUNDING
from distft.train.trained_model import TrainedModel

ROWS = torch.arange(64).view(2, 32)


@pytest.fixture(scope="module")
def lora(tiny: Tiny, once: Callable[..., Path], trained: Callable[..., Result]) -> Result:
    """rsLoRA on two ranks, with a base in several files and checkpoints of steps 2 and 4."""
    from transformers import AutoModelForCausalLM

    def make(folder: Path) -> None:
        make_tokenizer(folder)
        AutoModelForCausalLM.from_pretrained(tiny.path / "model").save_pretrained(folder, max_shard_size="50KB")
        assert len(list(folder.glob("*.safetensors"))) > 3
        (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [theirs]\n---\n# A base\n")

    base = str(once("base-in-several-files/base", make))
    changes = {"lora__use_rslora": True, "data__eval": str(tiny.path / "heldout.jsonl"), "checkpoint__save_steps": 2}
    return trained(tiny.recipe(model__name_or_path=base, **changes), 2)


@pytest.fixture(scope="module")
def qlora(tiny: Tiny, trained: Callable[..., Result]) -> Result:
    """DoRA with 4-bit weights, on some of the layers."""
    changes = {"model__quantization": "nf4", "lora__use_dora": True, "lora__target_modules": ["q_proj", "down_proj"]}
    return trained(tiny.recipe(**changes))


@pytest.fixture
def made(lora: Result, tiny: Tiny, tmp_path: Path) -> Callable[..., RunDir]:
    """A run as if it had been trained: the recipe with `changes`, and an adapter of random numbers in final/."""

    def make(base: Path = tiny.path / "model", **changes: Any) -> RunDir:
        from transformers import AutoModelForCausalLM

        from distft.train.model import add_adapters, quantization_config
        from distft.train.ranks import RankGroup
        from distft.train.save import save_trained

        run = RunDir(shutil.copytree(lora.run_dir, tmp_path / "run"))
        run.recipe.write_text(yaml.safe_dump(tiny.recipe(model__name_or_path=str(base), **changes)))
        update_status(run, identity={})
        recipe = load_recipe(run.recipe)
        quantization = quantization_config(recipe, "ddp")
        options = {"quantization_config": quantization, "device_map": {"": "cpu"}} if quantization else {}
        model = add_adapters(AutoModelForCausalLM.from_pretrained(base, **options), recipe)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                torch.nn.init.normal_(parameter, std=0.1)
        save_trained(model, run.final, tokenizer=_Tokenizer(), ranks=RankGroup(), dtype=torch.float32)
        return run

    return make


class _Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(ROWS).logits.float()


def plain(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def with_adapter(run_dir: Path, base: Any) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, run_dir / "final").eval()


def base_of(run_dir: Path) -> Path:
    return Path(yaml.safe_load((run_dir / "recipe.yaml").read_text())["model"]["name_or_path"])


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= tolerance


def merged(run_dir: Path, *arguments: str, cwd: Path) -> dict[str, Any]:
    done = distft("merge", str(run_dir), "--json", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_lora(lora: Result, tmp_path: Path) -> None:
    answer = merged(lora.run_dir, "-o", "out/model", cwd=tmp_path)
    assert (answer["source"], answer["merged"], answer["dequantized"], answer["dtype"]) == ("final", 14, 0, "float32")
    assert answer["output"] == str(tmp_path / "out" / "model")
    assert answer["layers_difference"] < 1e-5
    assert answer["logits_difference"] < answer["logits_tolerance"] == 1e-4
    out = tmp_path / "out" / "model"
    base = plain(base_of(lora.run_dir))
    before, trained = logits(base), logits(with_adapter(lora.run_dir, base))
    assert_same(logits(plain(out)), trained)
    assert (before - trained).abs().max() > 0.05 * trained.abs().max()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not names & {"adapter_config.json", "adapter_model.safetensors"}
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(out).chat_template


def test_a_merged_weight_by_hand(lora: Result, tmp_path: Path) -> None:
    """W + lora_alpha / sqrt(r) B A (rsLoRA, arXiv 2312.03732): the other tests compare peft with peft."""
    merge(RunDir(lora.run_dir), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    adapter = load_file(lora.run_dir / "final" / "adapter_model.safetensors")
    weights = plain(base_of(lora.run_dir)).state_dict()
    for layer in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.1.{layer}"
        a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        expected = weights[f"{name}.weight"] + 8 / 4**0.5 * (b @ a)
        torch.testing.assert_close(found[f"{name}.weight"], expected)
        assert (found[f"{name}.weight"] - weights[f"{name}.weight"]).abs().max() > 1e-3


def test_a_step(lora: Result, tmp_path: Path) -> None:
    """final/ is what the checkpoint of the last step holds."""
    last, first, final = (tmp_path / name for name in ("last", "first", "final"))
    assert merge(RunDir(lora.run_dir), last, 4).source == "step-4"
    assert merged(lora.run_dir, "-o", "first", "--step", "2", cwd=tmp_path)["source"] == "step-2"
    merge(RunDir(lora.run_dir), final)
    assert_same(logits(plain(last)), logits(plain(final)), 0)
    assert (logits(plain(first)) - logits(plain(final))).abs().max() > 1e-3
    assert (first / "tokenizer.json").read_bytes() == (final / "tokenizer.json").read_bytes()
    card = (first / "README.md").read_text()
    assert "at step 2." in card
    assert f"| loss, first and last step | {lora.metrics[0]['loss']:.4f} → {lora.metrics[1]['loss']:.4f} |" in card
    assert "eval loss" not in card


def test_qlora(qlora: Result, tmp_path: Path) -> None:
    """The logits are those of the adapter with 4-bit weights, not with the original ones."""
    from distft.train.model import quantization_config

    answer = merged(qlora.run_dir, "-o", "out", cwd=tmp_path)
    assert (answer["merged"], answer["dequantized"]) == (4, 10)
    quantization = quantization_config(load_recipe(qlora.run_dir / "recipe.yaml"), "ddp")
    base = base_of(qlora.run_dir)
    four = with_adapter(qlora.run_dir, plain(base, quantization_config=quantization, device_map={"": "cpu"}))
    # In evaluation, bitsandbytes packs 4-bit weights anew on CPUs with AVX512-BF16, where DoRA then reads nonsense.
    trained = logits(four.train())
    assert_same(logits(plain(tmp_path / "out")), trained)
    assert (logits(with_adapter(qlora.run_dir, plain(base))) - trained).abs().max() > 0.01 * trained.abs().max()
    assert not hasattr(plain(tmp_path / "out").config, "quantization_config")


def test_int8(made: Callable[..., RunDir], tmp_path: Path) -> None:
    """LLM.int8() rounds the inputs of its layers, too, so the logits are close, but not the same."""
    from distft.train.model import quantization_config

    run = made(model__quantization="int8")
    assert merge(run, tmp_path / "out").weights.dequantized == 0
    quantization = quantization_config(load_recipe(run.recipe), "ddp")
    trained = with_adapter(run.path, plain(base_of(run.path), quantization_config=quantization, device_map={"": "cpu"}))
    assert_same(logits(plain(tmp_path / "out")), logits(trained), 0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_16_bit(made: Callable[..., RunDir], tiny: Tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    """Every merged weight is the float32 one, rounded once."""
    base = tmp_path / "base"
    shutil.copytree(tiny.path / "model", base)
    plain(base, dtype=dtype).save_pretrained(base)
    run = made(base, lora__use_dora=True)
    answer = merge(run, tmp_path / "out")
    unit = torch.finfo(dtype).eps / 2
    assert answer.weights.dtype == dtype
    assert unit / 8 < answer.logits.difference < answer.logits.tolerance == ROUNDING * unit
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = with_adapter(run.path, plain(base, dtype=torch.float32)).merge_and_unload().state_dict()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.float(), expected[name], rtol=1.01 * unit, atol=1e-7)


def test_several_shards(made: Callable[..., RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made()
    one = logits(plain(Path(merge(run, tmp_path / "one").output)))
    monkeypatch.setattr(merging_process, "SHARD_BYTES", 60_000)
    answer = merge(run, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 5
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    sizes = [tensor.nbytes for path in shards for tensor in load_file(path).values()]
    assert index["metadata"]["total_size"] == answer.weights.bytes == sum(sizes)
    largest = max(sizes)
    assert max(path.stat().st_size for path in shards) < max(60_000, largest) + 10_000
    assert_same(logits(plain(tmp_path / "out")), one, 0)


def test_embeddings(made: Callable[..., RunDir], tiny: Tiny, tmp_path: Path) -> None:
    """An adapter of the embeddings; of tied ones it would change the output layer as well."""
    target = {"lora__target_modules": ["embed_tokens", "q_proj"]}
    run = made(**target)
    merge(run, tmp_path / "out")
    trained = with_adapter(run.path, plain(base_of(run.path)))
    assert_same(logits(plain(tmp_path / "out")), logits(trained))
    shutil.rmtree(run.path)
    make_model(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(RecipeError, match=r"embed_tokens.weight is tied to another"):
        merge(made(tmp_path / "tied", **target), tmp_path / "none")
    shutil.rmtree(run.path)
    run = made(tmp_path / "tied")
    assert merge(run, tmp_path / "tied-out").logits.difference < 1e-4
    assert_same(logits(plain(tmp_path / "tied-out")), logits(with_adapter(run.path, plain(tmp_path / "tied"))))


def test_another_architecture(made: Callable[..., RunDir], tmp_path: Path) -> None:
    """GPT-2 stores linear weights transposed, and names without a prefix."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    base = GPT2Model(GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    base.save_pretrained(tmp_path / "base")
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "base" / "model.safetensors")
    run = made(tmp_path / "base")
    assert merge(run, tmp_path / "out").weights.merged == 8
    assert_same(logits(plain(tmp_path / "out")), logits(with_adapter(run.path, plain(tmp_path / "base"))))


def test_memory_is_bounded(made: Callable[..., RunDir], tmp_path: Path) -> None:
    """A model of 250 MB in one file: far less in memory with shards of 8 MiB, all of it with one shard.

    Anonymous memory, as its parent sees it: pages of mapped files are the kernel's to drop.
    """
    make_model(tmp_path / "base", hidden_size=512, intermediate_size=2048, num_hidden_layers=15)
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    made(tmp_path / "base").path.rename(tmp_path / "large")
    made().path.rename(tmp_path / "small")
    code = (
        "import sys; from pathlib import Path; from distft.runs.directory import RunDir\n"
        "from distft.train import merge as m; m.SHARD_BYTES = int(sys.argv[1])\n"
        "m.merge(RunDir(Path('small')), Path('small-' + sys.argv[1]))\n"  # what it imports on the way
        "print('now', flush=True); sys.stdin.readline()\n"
        "m.merge(RunDir(Path('large')), Path('large-' + sys.argv[1]))"
    )

    def growth(shard_bytes: int) -> int:
        command = [sys.executable, "-c", code, str(shard_bytes)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, cwd=tmp_path, text=True, **pipes) as process:
            assert process.stdout.readline() == "now\n"
            status = Path(f"/proc/{process.pid}/status")
            seen = [_anonymous(status)]
            process.stdin.write("\n")
            process.stdin.flush()
            while process.poll() is None:
                seen.append(_anonymous(status))
                time.sleep(0.002)
        assert process.returncode == 0
        return max(seen) - seen[0]

    assert growth(8 << 20) < 0.5 * size < 0.9 * size < growth(1 << 30)


def _anonymous(status: Path) -> int:
    """Anonymous memory of a process in bytes; 0 when it has ended."""
    return int((status.read_text().partition("RssAnon:")[2].split() or ["0"])[0]) * 1024


def copied(lora: Result, folder: Path) -> RunDir:
    return RunDir(shutil.copytree(lora.run_dir, folder / "runs" / "tiny"))


def refused(run: RunDir, message: str, *arguments: str, cwd: Path, status: int = 2) -> None:
    """One error, no traceback, nothing written."""
    before = set(cwd.rglob("*"))
    done = distft("merge", str(run.path), "-o", "out", *arguments, cwd=cwd)
    assert (done.returncode, done.stdout) == (status, ""), done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert set(cwd.rglob("*")) == before, "something was written"


def test_what_cannot_be_merged(lora: Result, tiny: Tiny, tmp_path: Path) -> None:
    run = copied(lora, tmp_path)
    refused(RunDir(tmp_path / "nowhere"), "no run directory of that name", cwd=tmp_path)
    refused(run, "--step: got 3; tiny has complete checkpoints: 2, 4", "--step", "3", cwd=tmp_path)
    (tmp_path / "out").mkdir()
    refused(run, "-o: out already exists", cwd=tmp_path)
    (tmp_path / "out").rmdir()
    shutil.rmtree(run.final)
    refused(
        run, "tiny is completed and has no final/; --step N merges a checkpoint (complete checkpoints: 2, 4)",
        cwd=tmp_path,
    )  # fmt: skip
    shutil.rmtree(run.checkpoints)
    refused(run, "(complete checkpoints: none)", cwd=tmp_path)
    run.recipe.write_text(yaml.safe_dump(tiny.recipe() | {"lora": None}))
    refused(run, "tiny has no adapter", cwd=tmp_path)
    run.recipe.unlink()
    refused(run, "tiny ran your own script", cwd=tmp_path)


def test_without_the_train_part(lora: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingPartError("training needs torch")

    monkeypatch.setattr(extras, "require", missing)
    with pytest.raises(MissingPartError):
        merge_command.merge(RunDir(lora.run_dir), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_files_that_are_damaged_or_have_changed(lora: Result, tiny: Tiny, tmp_path: Path) -> None:
    run = copied(lora, tmp_path)
    for path in run.checkpoint(2).glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-4] + b"\x01\x02\x03\x04")
    refused(run, "--step: step-2 is damaged: ", "--step", "2", cwd=tmp_path)
    adapter = load_file(lora.run_dir / "final" / "adapter_model.safetensors")
    adapter.pop(min(adapter))
    save_file(adapter, run.final / "adapter_model.safetensors")
    refused(
        run,
        "not the recipe's adapter; these differ, among others: base_model.model.model.layers.0.",
        cwd=tmp_path,
        status=1,
    )

    def fails(kind: type[DistftError], message: str) -> None:
        before = set(tmp_path.rglob("*"))
        with pytest.raises(kind, match=message):
            merge(run, tmp_path / "out")
        assert set(tmp_path.rglob("*")) == before

    (run.final / "adapter_model.safetensors").write_bytes(b"0" * 100)
    fails(DataError, "adapter_model.safetensors cannot be read")
    run.recipe.write_text(yaml.safe_dump(tiny.recipe(model__name_or_path=str(tmp_path / "gone"))))
    fails(DataError, f"model.name_or_path: {tmp_path / 'gone'} cannot be read")
    make_model(tmp_path / "gone", initializer_range=0.03)
    fails(RecipeError, "model.weights: its content has changed since the run was trained")
    config = json.loads((tmp_path / "gone" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "gone" / "config.json").write_text(json.dumps(config))
    fails(RecipeError, "is stored quantized")


def test_data_may_be_gone(lora: Result, tmp_path: Path) -> None:
    run = copied(lora, tmp_path)
    recipe = yaml.safe_load(run.recipe.read_text())
    recipe["data"] |= {"train": "/gone/rows.jsonl", "eval": None}
    run.recipe.write_text(yaml.safe_dump(recipe))
    assert merge(run, tmp_path / "out").weights.merged == 14
    assert "| train | `rows.jsonl` |" in (tmp_path / "out" / "README.md").read_text()


def without_adapter(model: Any, stored: str) -> tuple[torch.Tensor, float]:
    return model.files[stored], 0.0


def not_finite(model: Any, stored: str) -> tuple[torch.Tensor, float]:
    return model.files[stored] * torch.nan, 0.0


def another_layer(model: Any, stored: str) -> tuple[torch.Tensor, float]:
    return model.files[stored], 0.01


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (without_adapter, "the merged model's logits differ from the trained one's by "),
        (not_finite, "the merged weight has values beyond torch.float32"),
        (another_layer, "the merged layer's outputs differ from the trained one's by 1.0e-02"),
    ],
)
def test_a_wrong_merge_is_found(
    lora: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable, message: str
) -> None:
    monkeypatch.setattr(TrainedModel, "merged", wrong)
    with pytest.raises(RunError, match=message):
        merge(RunDir(lora.run_dir), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- final/ and its card


def test_final_loads_with_plain_peft(lora: Result, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    final = lora.run_dir / "final"
    expected = logits(with_adapter(lora.run_dir, plain(base_of(lora.run_dir))))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(final).eval()), expected)


def test_programs_that_know_nothing_of_distft(lora: Result, tmp_path: Path) -> None:
    """final/ in a pipeline with its tokenizer and on its base, and the merged folder, all with the same answer."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer, pipeline

    final, out = lora.run_dir / "final", tmp_path / "merged"
    merge(RunDir(lora.run_dir), out)
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    options = {"max_new_tokens": 8, "do_sample": False}
    chat = [[{"role": "user", "content": "list the files"}]]
    answers = [
        pipeline("text-generation", model=made_by, tokenizer=tokenizer)(chat, **options)[0][0]["generated_text"][-1]
        for made_by in (model, model.merge_and_unload(), str(out))
    ]
    assert answers[0]["role"] == "assistant" and answers[0] == answers[1] == answers[2]


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a README.md."""
    start, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), text


def test_card(lora: Result, tiny: Tiny, tmp_path: Path) -> None:
    front, text = card(lora.run_dir / "final")
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",  # the base's; a folder has no name that others could look up
        "tags": ["distft", "sft", "lora"],
    }
    recipe = load_recipe(lora.run_dir / "recipe.yaml")
    status, metrics = lora.status, lora.metrics
    for line in (
        "rsLoRA adapter (r 4) of `base`.",
        "from peft import AutoPeftModelForCausalLM\n",
        "For llama.cpp merge it into its base first",  # rsLoRA
        "| strategy | ddp |",
        "| nodes × ranks | 1 × 2 (CPU) |",
        "| global batch | 8 = 4 micro × 1 accumulation × 2 ranks |",
        "| mixed precision | no |",
        f"| digest of content, tokenizer and settings | `{cache.content_digest(recipe)}` |",
        "| train | `chat.jsonl` |",
        "| eval, size | 11 documents, ",
        "| steps | 4 |",
        f"| tokens trained on | {metrics[-1]['tokens']:,} |",
        f"| loss, first and last step | {metrics[0]['loss']:.4f} → {metrics[-1]['loss']:.4f} |",
        f"| eval loss | {status['eval_loss_before']:.4f} → {status['eval_loss_after']:.4f} |",
        *(f"| {name} | {extras.installed()[name]} |" for name in ("torch", "transformers", "peft", "trl")),
    ):
        assert line in text
    shown = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    full = recipe.model_dump(mode="json")
    assert shown["training"] == full["training"]
    assert shown["data"]["train"] == "chat.jsonl"
    assert not any(str(folder) in str(front) + text for folder in (tiny.path, lora.run_dir.parent, Path.home()))
    merge(RunDir(lora.run_dir), tmp_path / "out")
    front, text = card(tmp_path / "out")
    assert front["library_name"] == "transformers"
    assert (front["tags"], front["license"]) == (["distft", "sft", "lora", "merged"], "apache-2.0")
    assert "from transformers import AutoModelForCausalLM\n" in text
    assert "merged into its weights." in text and "llama.cpp" not in text


def test_card_of_a_hub_id(lora: Result, tiny: Tiny, tmp_path: Path) -> None:
    run = copied(lora, tmp_path)
    data = [
        "owner/chats@1a2b3c:train",
        str(tiny.path / "chat.jsonl"),
        "hf://datasets/owner/texts/a.jsonl",
        "owner/chats",
    ]
    changes = {"model__name_or_path": "owner/model", "model__quantization": "nf4", "data__train": data}
    run.recipe.write_text(yaml.safe_dump(tiny.recipe(**changes)))
    licence = {"license": "other", "license_name": "theirs", "license_link": "LICENSE"}
    update_status(run, base={"id": "owner/model", **licence})
    for merged_in, relation in ((False, "adapter"), (True, "finetune")):
        front = yaml.safe_load(model_card.text(run, merged=merged_in).split("---\n")[1])
        assert (front["base_model"], front["base_model_relation"]) == ("owner/model", relation)
        assert front["datasets"] == ["owner/chats", "owner/texts"] and front | licence == front
        assert front["tags"] == ["distft", "sft", "lora", "qlora", *["merged"] * merged_in]
    run.metrics.unlink()
    run.status.write_text("{}")  # of a run from before there were cards
    text = model_card.text(run)
    assert "bnb_4bit_quant_type" in text and "llama.cpp" not in text
    run.recipe.write_text(yaml.safe_dump(tiny.recipe(lora__alpha_pattern={"q_proj": 64})))
    assert "For llama.cpp merge it into its base first" in model_card.text(run)
    run.recipe.write_text(yaml.safe_dump(tiny.recipe() | {"lora": None}))
    assert "library_name: transformers" in model_card.text(run)
