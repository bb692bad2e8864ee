"""`distft merge`: a run's adapter into the weights of its base, tensor by tensor on the CPU.

What an adapter is merged into is what it was trained beside. For LoRA that is the base's weights as they are stored.
For a quantised base (QLoRA) it is each weight quantised and dequantised again, as the run's layers did: the adapter has
learned to make up for the quantisation's error, which is some percent of every weight, and merged into the original
weights it would make up for an error that is no longer there. So the quantised layers without an adapter are written
dequantised too. All is computed in float32 and written in the dtype of the base's own tensors.

In memory at any time: the adapter, one shard of what is written, and one tensor; in the comparison of logits one
decoder block.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from accelerate import init_empty_weights
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from distft.config.document import load_yaml
from distft.config.loading import validate
from distft.config.recipe import Recipe
from distft.errors import DataError, DistftError, RecipeError, RunError
from distft.models.quantization import NF4_BLOCK, NF4_DOUBLE_QUANTIZATION, NF4_QUANT_TYPE
from distft.runs import checkpoints, model_card
from distft.runs.checkpoints import Checkpoint
from distft.runs.directory import RunDir
from distft.runs.status import read_status
from distft.train.model import add_adapters, compute_dtype, quantization_config
from distft.train.ranges import read_weights
from distft.train.save import Tensors
from distft.train.tokens import load_tokenizer

SHARD_BYTES = 2 << 30
ROWS, TOKENS = 4, 32  # of the logits that are compared
# Largest difference of two float32 results, relative to the root mean square of what they are compared with: sums of
# thousands of products in another order differ by some 1e-6.
TOLERANCE = 1e-4
# Writing in 16 bit moves every merged weight by up to `unit` (half of the dtype's eps) of its size. The errors are
# independent: a layer's outputs move by less than `unit`, the logits by a few, more in a deep model, which amplifies
# them. So many are allowed, of the root mean square of the difference relative to that of the logits: a tensor in the
# wrong place moves them by their own size, and what is wrong within a layer is found in float32, before rounding.
ROUNDING = 16
PEFT = "base_model.model."  # before every name in a peft model
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Merged:
    """What was written and how near it is to what was trained; differences are relative to the compared values."""

    output: str
    source: str  # final, step-N
    merged: int  # weights with an adapter
    dequantised: int  # weights of a quantised base without one
    tensors: int
    bytes: int
    dtype: str  # of the merged weights
    layers_difference: float  # largest, of an adapted layer's outputs in float32
    logits_difference: float | None  # None: they could not be compared, `logits_unknown` says why
    logits_tolerance: float | None
    logits_unknown: str | None


class Files:
    """The tensors of a model's safetensors files, read one by one.

    Raises:
        DataError: a file cannot be read.
    """

    def __init__(self, paths: list[Path]):
        self.place: dict[str, Path] = {}
        for path in paths:
            with _opened(path) as file:
                self.place.update(dict.fromkeys(file.keys(), path))

    def __contains__(self, name: str) -> bool:
        return name in self.place

    def __getitem__(self, name: str) -> torch.Tensor:
        with _opened(self.place[name]) as file:  # not kept open: what was read would stay mapped
            return file.get_tensor(name)

    def named(self, model: Any, name: str) -> str | None:
        """The tensor that transformers loads a parameter from: base models are stored with or without their prefix."""
        name = getattr(model, "all_tied_weights_keys", {}).get(name, name)
        prefix = f"{model.base_model_prefix}."
        return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in self), None)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({_first_line(error)})") from None


class Merge:
    """The trained model of a run: the adapter in memory, the base in its files."""

    def __init__(self, recipe: Recipe, folder: Path, source: Path | Checkpoint):
        self.recipe = recipe
        self.files = _files(recipe)
        self.base = skeleton(folder, recipe)
        self.quantised = _quantised(folder, recipe)
        with init_empty_weights(include_buffers=False):
            self.model = add_adapters(self.base, recipe).eval()
        _load_adapter(self.model, source)
        self.layers: dict[str, tuple[str, LoraLayer]] = {}  # by the stored name of their weight
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                self.layers[self._stored(name)] = (name, module)
        # Stored name → parameter of the quantised layers without an adapter.
        plain = {self._stored(name): f"{name}.weight" for name in self.quantised}
        self.dequantised = {stored: name for stored, name in plain.items() if stored not in self.layers}

    def _stored(self, name: str) -> str:
        """The stored name of a layer's weight.

        Raises:
            RecipeError: it has none of its own.
        """
        weight = f"{name.removeprefix(PEFT)}.weight"
        tied = getattr(self.base, "all_tied_weights_keys", {})
        if weight in tied or weight in tied.values():
            raise RecipeError(f"{weight} is tied to another weight, which a merge would change as well")
        stored = self.files.named(self.base, weight)
        if stored is None:
            raise RecipeError(f"{weight}: the base's files have no such tensor; transformers converts it as it loads")
        return stored

    def as_trained(self, name: str) -> torch.Tensor:
        """A parameter as the adapter was trained beside it, in float32."""
        clean = name.removeprefix(PEFT).replace(".base_layer.", ".")
        tensor = self.files[self.files.named(self.base, clean)]
        module, _, leaf = clean.rpartition(".")
        if module not in self.quantised or leaf != "weight":
            return tensor.float()
        flipped = isinstance(self.base_module(module), Conv1D)  # bitsandbytes' layers have it the other way round
        tensor = tensor.T.contiguous() if flipped else tensor
        tensor = dequantised(tensor.to(compute_dtype(self.recipe)), self.recipe.model.quantization)
        return tensor.T.contiguous() if flipped else tensor

    def base_module(self, name: str) -> Any:
        module = self.model.get_submodule(PEFT + name)
        return module.get_base_layer() if isinstance(module, LoraLayer) else module

    @torch.no_grad()
    def merged(self, stored: str) -> tuple[torch.Tensor, float]:
        """The weight with its adapter in float32, and how far the merged layer's outputs are from the trained one's.

        The formulas are peft's own, those of its forward pass and of its merge; the difference is the largest,
        relative to the root mean square of the trained layer's outputs for random inputs.
        """
        name, layer = self.layers[stored]
        with filled(layer, name, self.as_trained):
            base = layer.get_base_layer()
            inputs = _inputs(base)
            trained = layer(inputs)
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:  # not finite
                raise RunError(f"{stored}: {error}") from None
            layer.merged_adapters.clear()  # the next one to fill this layer has the base's weight
            return base.weight.data, _largest(base(inputs) - trained, trained)


def merge(run: RunDir, output: Path, step: int | None = None) -> Merged:
    """Write the model of a run with its adapter merged in; of `step`, else of final/.

    Raises:
        DistftError: it cannot be merged; nothing was written.
        RunError: what was written is not what was trained; nothing is left of it.
    """
    recipe = validate(load_yaml(run.recipe, Recipe))  # not its paths: the data need not be there any more
    if output.exists():
        raise RecipeError(f"-o: {output} exists already; name a new folder")
    source: Path | Checkpoint = run.final
    if step is not None:
        source = next((found for found in checkpoints.complete(run) if found.step == step), None)
        if source is None:
            raise RecipeError(f"--step: step-{step} is not a complete checkpoint")
        if damage := source.damage():
            raise RecipeError(f"--step: step-{step} is damaged: {damage}")
    folder = _base_folder(recipe)
    _same_base(run, recipe, source)
    model = Merge(recipe, folder, source)
    work = output.with_name(f".{output.name}.partial")
    try:
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            _copy_settings(recipe, folder, work, source)
            (work / "README.md").write_text(model_card.text(run, merged=True, step=step))
            facts = _write(model, work)
        except OSError as error:
            raise RecipeError(f"-o: {output} cannot be written ({error.strerror or error})") from None
        difference, tolerance, unknown = _compare_logits(model, work, facts["dtype"])
        work.rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    facts["dtype"] = str(facts["dtype"]).removeprefix("torch.")
    name = "final" if step is None else f"step-{step}"
    return Merged(str(output), name, len(model.layers), len(model.dequantised), **facts,
                  logits_difference=difference, logits_tolerance=tolerance, logits_unknown=unknown)  # fmt: skip


# ---- the base


def _base_folder(recipe: Recipe) -> Path:
    """The folder with the base's config.json: a local one, or that of the hub's cache."""
    model = recipe.model
    try:
        folder = Path(cached_file(model.name_or_path, "config.json", revision=model.revision)).parent
    except OSError as error:
        raise DataError(f"model.name_or_path: {model.name_or_path} cannot be read ({_first_line(error)})") from None
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        raise RecipeError(f"model.name_or_path: {model.name_or_path} is stored quantised: no weights to merge into")
    return folder


def _files(recipe: Recipe) -> Files:
    model = recipe.model
    options: dict[str, Any] = {"revision": model.revision}
    try:
        single = cached_file(
            model.name_or_path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **options
        )
        if single:
            return Files([Path(single)])
        index = cached_file(model.name_or_path, SAFE_WEIGHTS_INDEX_NAME, **options)
        return Files([Path(path) for path in get_checkpoint_shard_files(model.name_or_path, index, **options)[0]])
    except OSError as error:
        raise DataError(f"model.name_or_path: {model.name_or_path} has no weights ({_first_line(error)})") from None


def _same_base(run: RunDir, recipe: Recipe, source: Path | Checkpoint) -> None:
    """Raises RecipeError where the base is not the one that was trained."""
    identity = source.manifest["identity"] if isinstance(source, Checkpoint) else read_status(run).identity
    saved = {name: value for name, value in identity.items() if name.startswith("model.")}
    if saved and (changed := checkpoints.differences(saved, checkpoints.model_identity(recipe))):
        raise RecipeError([f"{name}: {text}, since the run was trained" for name, text in changed.items()])


def skeleton(folder: Path, recipe: Recipe) -> Any:
    """The model of a folder with its parameters on the meta device and its buffers on the CPU, in float32."""
    trust = recipe.model.trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust)
    return model.eval()


def _quantised(folder: Path, recipe: Recipe) -> set[str]:
    """Names of the layers that transformers quantises for this recipe."""
    if recipe.model.quantization is None:
        return set()
    model = skeleton(folder, recipe)
    quantizer = AutoHfQuantizer.from_config(quantization_config(recipe, "ddp"))
    quantizer.preprocess_model(model, dtype=compute_dtype(recipe), device_map={"": "cpu"})
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def dequantised(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """A weight after bitsandbytes' round trip with the settings of quantization_config, in float32.

    int8 is the weight alone: the layers of LLM.int8() also round what goes into them.
    """
    functional = bitsandbytes.functional
    if quantization == "nf4":
        packed, state = functional.quantize_4bit(
            weight.contiguous(),
            blocksize=NF4_BLOCK,
            compress_statistics=NF4_DOUBLE_QUANTIZATION,
            quant_type=NF4_QUANT_TYPE,
        )
        return functional.dequantize_4bit(packed, state).float()
    values, scales, _ = functional.int8_vectorwise_quant(weight.contiguous().half())  # Int8Params does, too
    return functional.int8_vectorwise_dequant(values, scales)


def _load_adapter(model: Any, source: Path | Checkpoint) -> None:
    """Put the trained tensors into the skeleton.

    Raises:
        RunError: they are not those of the recipe's adapter.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(source, Checkpoint):
        where, tensors = source.path, read_weights(source.path)
    else:
        files = Files([source / "adapter_model.safetensors"])
        where, tensors = source, {name: files[name] for name in files.place}
        names = {id(parameter): name for name, parameter in trained.items()}
        as_saved = get_peft_model_state_dict(model, state_dict=dict(trained))
        tensors = {names[id(as_saved[name])] if name in as_saved else name: tensor for name, tensor in tensors.items()}
    have = {name: tensor.numel() for name, tensor in tensors.items()}
    want = {name: parameter.numel() for name, parameter in trained.items()}
    if have != want:
        some = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))[:5]
        raise RunError(f"{where}: not the recipe's adapter, among others {', '.join(some)}")
    for name, parameter in trained.items():
        owner, leaf = _owner(model, name)
        tensor = tensors[name].view(parameter.shape).float()
        owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)


# ---- one module's weights at a time


def _owner(model: Any, name: str) -> tuple[Any, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


@contextmanager
def filled(module: Any, name: str, read: Read) -> Iterator[None]:
    """`module` with its weights; outside, those that were on the meta device are there again."""
    empty = [(n, p) for n, p in module.named_parameters(remove_duplicate=False) if p.is_meta]
    try:
        for inner, _ in empty:
            owner, leaf = _owner(module, inner)
            owner._parameters[leaf] = torch.nn.Parameter(
                read(f"{name}.{inner}" if name else inner), requires_grad=False
            )
        yield
    finally:
        for inner, parameter in empty:
            owner, leaf = _owner(module, inner)
            owner._parameters[leaf] = parameter


def _blocks(model: Any) -> Iterator[tuple[str, Any]]:
    """The largest modules that are filled at a time: decoder blocks (what accelerate does not split either), and
    whatever else has weights of its own."""
    whole = set(getattr(model, "_no_split_modules", None) or ())

    def walk(name: str, module: Any) -> Iterator[tuple[str, Any]]:
        own = any(True for _ in module.parameters(recurse=False))
        if own or type(module).__name__ in whole or isinstance(module, LoraLayer):
            yield name, module
            return
        for child, inner in module.named_children():
            yield from walk(f"{name}.{child}" if name else child, inner)

    yield from walk("", model)


@torch.no_grad()
def logits(model: Any, read: Read, rows: torch.Tensor) -> torch.Tensor:
    """Logits (rows, tokens, vocabulary) of a skeleton, a block's weights in memory at a time."""
    handles, held = [], {}

    def fill(name: str) -> Callable:
        def hook(module: Any, *_: Any) -> None:
            held[name] = ExitStack()
            held[name].enter_context(filled(module, name, read))

        return hook

    def drop(name: str) -> Callable:
        def hook(*_: Any) -> None:
            held.pop(name).close()

        return hook

    for name, module in _blocks(model):
        handles.append(module.register_forward_pre_hook(fill(name)))
        handles.append(module.register_forward_hook(drop(name)))
    try:
        return model(input_ids=rows, use_cache=False).logits.float()
    finally:
        for handle in handles:
            handle.remove()
        for stack in held.values():
            stack.close()


# ---- writing


def _write(model: Merge, work: Path) -> dict[str, Any]:
    """The weights as safetensors of SHARD_BYTES at most, or one tensor; returns what Merged says of them.

    Every file is read back and compared.
    """
    shards: list[tuple[Path, list[str]]] = []
    pending: Tensors = {}
    total, size, worst, dtypes = 0, 0, 0.0, set()

    def flush() -> None:
        path = work / f"shard-{len(shards)}"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files for their owner alone
        written = Files([path])
        for name, tensor in pending.items():
            if not torch.equal(written[name], tensor):
                raise RunError(f"{name}: other values on disk than in memory")
        shards.append((path, list(pending)))
        pending.clear()

    for name in model.files.place:
        tensor = model.files[name]
        dtype = tensor.dtype
        if name in model.layers:
            tensor, difference = model.merged(name)
            worst = max(worst, difference)
            if not difference <= TOLERANCE:
                raise RunError(
                    f"{name}: the merged layer's outputs differ from the trained one's by {difference:.1e} of their "
                    f"size, more than {TOLERANCE:.0e}"
                )
        elif name in model.dequantised:
            tensor = model.as_trained(model.dequantised[name])
        if name in model.layers or name in model.dequantised:
            tensor = tensor.to(dtype)
            dtypes.add(dtype)
            if not torch.isfinite(tensor).all():
                raise RunError(f"{name}: merged, it has values beyond {dtype}")
        if pending and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        # A copy of its own: what was read maps its whole file.
        pending[name] = tensor.clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    place = {}
    for number, (path, names) in enumerate(shards, 1):
        target = SAFE_WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(work / target)
        place.update(dict.fromkeys(names, target))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        (work / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return {"tensors": len(place), "bytes": total, "dtype": coarsest, "layers_difference": worst}


def _copy_settings(recipe: Recipe, folder: Path, work: Path, source: Path | Checkpoint) -> None:
    """config.json, generation_config.json and code of the model's own from the base; the tokenizer from the run."""
    for path in [*folder.glob("*.py"), folder / "config.json", folder / "generation_config.json"]:
        if path.is_file():
            shutil.copyfile(path, work / path.name)
    if isinstance(source, Checkpoint):
        load_tokenizer(recipe).save_pretrained(work)
        return
    for path in source.iterdir():
        if path.is_file() and path.name not in ADAPTER_FILES:
            shutil.copyfile(path, work / path.name)


# ---- comparing


def _inputs(base: Any) -> torch.Tensor:
    """Random inputs of a layer, always the same."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(base, torch.nn.Embedding):
        return torch.randint(base.num_embeddings, (64,), generator=generator)
    size = base.weight.shape[0 if isinstance(base, Conv1D) else 1]
    return torch.randn(8, size, generator=generator)


def _largest(difference: torch.Tensor, scale: torch.Tensor) -> float:
    return (difference.abs().max() / _root_mean_square(scale)).item()


def _root_mean_square(values: torch.Tensor) -> torch.Tensor:
    return values.double().pow(2).mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def _compare_logits(model: Merge, work: Path, dtype: torch.dtype) -> tuple[float | None, float | None, str | None]:
    """Difference and tolerance, or why they cannot be compared: logits of the base's files with the adapter beside
    them, and of the written files alone, both computed in float32.

    In float32 the largest difference counts, in 16 bit, where weights were rounded, the root mean square.

    Raises:
        RunError: they differ by more.
    """
    written = Files(sorted(work.glob("*.safetensors")))
    merged = skeleton(work, model.recipe)
    missing = [n for n, p in merged.named_parameters() if written.named(merged, n) is None]
    if missing:
        return None, None, f"transformers converts {missing[0]} and {len(missing) - 1} others as it loads them"
    vocabulary = merged.get_input_embeddings().weight.shape[0]
    rows = torch.randint(vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    expected = logits(model.model, model.as_trained, rows)
    found = logits(merged, lambda name: written[written.named(merged, name)].float(), rows)
    if dtype == torch.float32:
        difference, tolerance = _largest(found - expected, expected), TOLERANCE
    else:
        difference = (_root_mean_square(found - expected) / _root_mean_square(expected)).item()
        tolerance = ROUNDING * torch.finfo(dtype).eps / 2
    if not difference <= tolerance:
        raise RunError(
            f"the merged model's logits differ from the trained one's by {difference:.1e} of their size, more than "
            f"{tolerance:.1e} ({dtype})"
        )
    return difference, tolerance, None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
    print(json.dumps(asdict(merged)))
    return 0


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
