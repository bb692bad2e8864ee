"""`distft merge`: a run's adapter merged into the weights of its base, tensor by tensor on the CPU.

trained_model.py says what is merged into what, merge_check.py how the result is compared with what was trained. It is
written in the dtype of the base's own tensors. In memory at any time: the adapter, one shard of what is written, and
one tensor; while logits are compared, one decoder block.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distft.config.document import load_yaml
from distft.config.loading import validate
from distft.config.recipe import Recipe
from distft.errors import DistftError, RecipeError, RunError
from distft.models.loading import SHARD_BYTES
from distft.runs import checkpoints, model_card
from distft.runs.checkpoints import Checkpoint
from distft.runs.directory import RunDir
from distft.runs.status import read_status
from distft.train.as_published import set_tokens, write_tokenizer
from distft.train.merge_check import LogitsCheck, check_layer, check_logits
from distft.train.tensor_files import ShardWriter, name_shards
from distft.train.tokens import load_tokenizer
from distft.train.trained_model import TrainedModel, base_folder

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


@dataclass(frozen=True)
class Weights:
    """What was written. The difference is relative to the size of what is compared."""

    merged: int  # weights with an adapter
    dequantized: int  # weights of a quantized base without one
    tensors: int
    bytes: int
    dtype: torch.dtype  # of the merged weights; of several, the coarsest
    layers_difference: float  # largest, of an adapted layer's outputs in float32


@dataclass(frozen=True)
class Merged:
    """What was written, from what, and how near it is to what was trained."""

    output: str
    source: str  # final, step-N
    weights: Weights
    logits: LogitsCheck

    def to_json(self) -> dict[str, Any]:
        """All fields on one level, as `distft merge --json` prints them."""
        dtype = str(self.weights.dtype).removeprefix("torch.")
        logits = {f"logits_{name}": value for name, value in asdict(self.logits).items()}
        return {"output": self.output, "source": self.source} | asdict(self.weights) | {"dtype": dtype} | logits


def merge(run: RunDir, output: Path, step: int | None = None) -> Merged:
    """Write the model of a run with its adapter merged in; that of `step`, else that of final/.

    Raises:
        DistftError: it cannot be merged; nothing was written.
        RunError: what was written is not what was trained; nothing is left of it.
    """
    recipe = validate(load_yaml(run.recipe, Recipe))  # without its paths: the data need not be there any more
    if output.exists():
        raise RecipeError(f"-o: {output} exists already; name a new folder")
    source = run.final if step is None else _checkpoint(run, step)
    folder = base_folder(recipe)
    _check_base(run, recipe, source)
    model = TrainedModel(recipe, folder, source)
    work = output.with_name(f".{output.name}.partial")
    try:
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            _copy_settings(recipe, folder, work, source)
            (work / "README.md").write_text(model_card.text(run, merged=True, step=step))
            weights = _write(model, work)
        except OSError as error:
            raise RecipeError(f"-o: {output} is not writable ({error.strerror or error})") from None
        compared = check_logits(model.logits, work, recipe, weights.dtype)
        work.rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Merged(str(output), "final" if step is None else f"step-{step}", weights, compared)


def _checkpoint(run: RunDir, step: int) -> Checkpoint:
    """The checkpoint of a step. Raises RecipeError where it is not complete, or damaged."""
    found = next((found for found in checkpoints.complete(run) if found.step == step), None)
    if found is None:
        raise RecipeError(f"--step: step-{step} is not a complete checkpoint")
    if damage := found.damage():
        raise RecipeError(f"--step: step-{step} is damaged: {damage}")
    return found


def _check_base(run: RunDir, recipe: Recipe, source: Path | Checkpoint) -> None:
    """Raises RecipeError where the base is not the one that was trained with."""
    identity = source.manifest["identity"] if isinstance(source, Checkpoint) else read_status(run).identity
    saved = {name: value for name, value in identity.items() if name.startswith("model.")}
    if saved and (changed := checkpoints.differences(saved, checkpoints.model_identity(recipe))):
        raise RecipeError([f"{name}: {text} since the run was trained" for name, text in changed.items()])


def _copy_settings(recipe: Recipe, folder: Path, work: Path, source: Path | Checkpoint) -> None:
    """Copy config.json, generation_config.json and the model's own code from the base; the tokenizer from the run."""
    for path in [*folder.glob("*.py"), folder / "config.json", folder / "generation_config.json"]:
        if path.is_file():
            shutil.copyfile(path, work / path.name)
    if isinstance(source, Checkpoint):
        load_tokenizer(recipe).save_pretrained(work)
        write_tokenizer(recipe, work)
    else:
        for path in source.iterdir():
            if path.is_file() and path.name not in ADAPTER_FILES:
                shutil.copyfile(path, work / path.name)
    set_tokens(recipe, work)


def _write(model: TrainedModel, work: Path) -> Weights:
    """Write the merged weights, each layer compared with the trained one.

    Raises:
        RunError: a layer computes something else, a value does not fit its dtype, or a file cannot be read back.
    """
    writer = ShardWriter(work, SHARD_BYTES)
    worst, dtypes = 0.0, set()
    for group in model.conversion.groups:
        stored = {name: model.files[name] for name in group.stored}
        if model.changed.isdisjoint(group.parameters):
            made = stored
        else:
            parameters = {}
            for name, tensor in model.conversion.load(group, stored.__getitem__).items():
                parameters[name], difference = model.final(name, tensor)
                worst = max(worst, difference)
                check_layer(name, difference)
            made = model.conversion.store([group], parameters)
            made = {name: tensor.to(stored[name].dtype) for name, tensor in made.items()}
            dtypes |= {tensor.dtype for tensor in made.values()}
        for name, tensor in made.items():
            if made is not stored and not torch.isfinite(tensor).all():
                raise RunError(f"{name}: the merged weight has values beyond {tensor.dtype}")
            writer.add(name, tensor)
    for name in model.conversion.unused:  # of parts that the language model lacks
        writer.add(name, model.files[name])
    writer.flush()
    name_shards(work, writer.shards)
    tensors = sum(len(names) for _, names, _ in writer.shards)
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return Weights(
        len(model.adapted), len(model.dequantized), tensors, sum(size for *_, size in writer.shards), coarsest, worst
    )


def main() -> int:
    """`python -m distft.train.merge RUN DIR [STEP]`: prints Merged as JSON, or {"error": what is wrong}."""
    run, output, *step = sys.argv[1:]
    try:
        merged = merge(RunDir(Path(run)), Path(output), int(step[0]) if step else None)
    except DistftError as error:
        print(json.dumps({"error": str(error)}))
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    print(json.dumps(merged.to_json()))
    return 0


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
