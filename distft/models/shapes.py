"""A recipe's model: its parameters and sizes, from config.json and the headers of its weights.

Reading a header needs no torch: 8 bytes of length, then JSON (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from distft.config.recipe import Recipe
from distft.errors import MissingPartError, NoModelError, PlanError
from distft.models.architecture import Sizes, describe, guess_sizes, is_known
from distft.models.freezing import frozen, named, other_inputs
from distft.models.layout import Tensor, blocks
from distft.models.lora import ADAPTER_CONFIG, left_out_layers, lora_parameters
from distft.models.quantization import BESIDE, disk_quantization, method, unexplained, with_file_beside
from distft.models.vocabulary import new_token_count, rows_needed, vocabulary_tensors

# A header is JSON with some hundred bytes per tensor; a file that claims more is not safetensors.
MAX_HEADER_BYTES = 100_000_000

# peft's kinds of adapters that lora.start_from takes, and those of tokens before the row.
STARTABLE = ("LORA", "OFT")
PROMPTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CPT",
    "ADAPTION_PROMPT",
    "CARTRIDGE",
)

Shapes = Mapping[str, tuple[int, ...]]  # name of a tensor → its shape


@dataclass(frozen=True)
class ModelShape:
    """Parameters, in elements, and sizes, which are None where config.json has no such entry."""

    name: str
    parameters: int
    trainable_parameters: int
    linear_parameters: int  # of linear layers but the output layer: what quantization stores in fewer bits
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    vocab_size: int | None = None
    head_dim: int | None = None
    sizes: Sizes = field(default_factory=Sizes)
    tensors: tuple[Tensor, ...] = field(default=(), repr=False)  # all parameters of the base model, tied ones once
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # config.json
    peft_experts: str | None = None  # see families.Family
    tied: tuple[Tensor, ...] = field(default=(), repr=False)  # weights shared with one of `tensors`
    train_only: frozenset[str] | None = field(default=None, repr=False)  # tensors that training.train_only names

    @property
    def model_type(self) -> str | None:
        return self.config.get("model_type")

    @cached_property
    def left_out_layers(self) -> dict[str, str]:
        """Modules that cannot have an adapter, and why."""
        return left_out_layers((*self.tensors, *self.tied))

    @cached_property
    def other_inputs(self) -> frozenset[str]:
        """Tensors that are never trained: text does not go through them."""
        return other_inputs(tensor.name for tensor in self.tensors)

    @cached_property
    def fixed(self) -> frozenset[str]:
        """Tensors that are not trained where there is no adapter."""
        return frozen([tensor.name for tensor in self.tensors], self.train_only)

    @cached_property
    def backward_blocks(self) -> int:
        """Blocks that gradients go through where there is no adapter: from the lowest that is trained, or has trained
        embeddings below it, to the top."""
        stack = blocks(tensor for tensor in self.tensors if tensor.name not in self.other_inputs)
        inside = {tensor.name for block in stack for tensor in block}
        if any(
            tensor.name not in inside | self.fixed and (tensor.kind == "embedding" or "embed" in tensor.name)
            for tensor in self.tensors
        ):
            return len(stack)
        trained = (n for n, block in enumerate(stack) if any(tensor.name not in self.fixed for tensor in block))
        return len(stack) - next(trained, len(stack))

    @property
    def is_known(self) -> bool:
        """Whether its family is one of families.py."""
        return is_known(self.config)


def read_model_shape(recipe: Recipe, need_weights: bool = False) -> ModelShape:
    """The model of a recipe, from its local folder or the hub.

    For a known family, exactly what transformers builds from config.json: a checkpoint may have other tensors (buffers,
    a tied weight twice, experts one by one). For any other family, what the headers of the weights list.

    Args:
        need_weights: refuse a model that could be planned but not loaded.

    Raises:
        PlanError: no config.json, a file that is not what its name says, or weights that are needed and missing.
        MissingPartError: a hub id, without huggingface_hub installed.
    """
    name = recipe.model.name_or_path
    folder = Path(name)
    config, header = _read_folder(folder, need_weights) if folder.is_dir() else _read_hub(recipe, need_weights)
    tied: tuple[Tensor, ...] = ()
    experts = None
    if is_known(config):
        model = describe(config)
        sizes, tensors, tied, experts = model.sizes, model.tensors, model.tied, model.peft_experts
        if header and not disk_quantization(config):  # quantized weights are packed into other shapes
            tensors = tuple(t._replace(shape=header.get(t.name, t.shape)) for t in tensors)
    elif header is not None and (stored := method(config)):
        raise PlanError(
            f"model.name_or_path: {name} is stored quantized ({stored}), which hides the sizes of its weights, and "
            f"model_type {config.get('model_type')} is not known here; take the unquantized repository, with "
            "model.quantization: nf4 where memory is short"
        )
    elif header is not None:
        sizes, tensors = guess_sizes(config), tuple(Tensor(n, s, _guess_kind(n, s)) for n, s in header.items())
    else:
        kind = config.get("model_type")
        raise PlanError(
            f"model.name_or_path: {name} has no weights (*.safetensors), and "
            f"model_type {kind} is not one of those that are planned from config.json by formula; add the weights, or "
            "plan where distft[train] is installed, which counts any transformers model"
        )
    tensors, tied, sizes = _grown(recipe, tensors, tied, sizes)
    return shape_of(recipe, tensors, tied, sizes, config, experts)


def check_stored(recipe: Recipe) -> None:
    """Check the headers of weights that are on this machine, for a model that is counted and not read.

    Raises:
        PlanError: a file that is not what its name says, or quantized weights that would be loaded as plain ones.
    """
    folder = Path(recipe.model.name_or_path)
    if not folder.is_dir():
        with contextlib.suppress(ImportError):
            import huggingface_hub as hub

            found = hub.try_to_load_from_cache(recipe.model.name_or_path, "config.json", revision=recipe.model.revision)
            folder = Path(found).parent if isinstance(found, str) else folder
    if folder.is_dir():
        _read_folder(folder, need_weights=False)


def read_config(recipe: Recipe) -> dict[str, Any]:
    """The model's config.json.

    Raises:
        PlanError: as read_model_shape.
        MissingPartError: likewise.
    """
    folder = Path(recipe.model.name_or_path)
    return _folder_config(folder) if folder.is_dir() else _read_hub(recipe, need_weights=False, config_only=True)[0]


def _grown(
    recipe: Recipe, tensors: tuple[Tensor, ...], tied: tuple[Tensor, ...], sizes: Sizes
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Sizes]:
    """The model with rows for model.add_tokens."""
    if not recipe.model.add_tokens or not sizes.vocab_size:
        return tensors, tied, sizes
    rows = rows_needed(recipe, sizes.vocab_size)
    old = {tensor.name for tensor in vocabulary_tensors((*tensors, *tied), sizes.vocab_size)}

    def grown(tensor: Tensor) -> Tensor:
        return tensor._replace(shape=(rows, *tensor.shape[1:])) if tensor.name in old else tensor

    return tuple(map(grown, tensors)), tuple(map(grown, tied)), replace(sizes, vocab_size=rows)


def shape_of(
    recipe: Recipe,
    tensors: tuple[Tensor, ...],
    tied: tuple[Tensor, ...],
    sizes: Sizes,
    config: Mapping[str, Any],
    peft_experts: str | None = None,
    trained: int | None = None,
) -> ModelShape:
    """A model with these parameters, counted.

    Args:
        trained: how many are trained, where that was counted on the model itself.

    Raises:
        PlanError: lora.target_modules names none of its layers, or training.train_only none of its parameters.
    """
    chosen = None
    if recipe.lora is None:
        names = [tensor.name for tensor in tensors]
        embedding = next((tensor.name for tensor in tensors if tensor.kind == "embedding"), "")
        chosen = named(names, recipe.training.train_only, {tensor.name: embedding for tensor in tied})
    if trained is None and recipe.lora:
        rows = vocabulary_tensors(tensors, sizes.vocab_size)
        trained = lora_parameters(recipe.lora, (*tensors, *tied), peft_experts)
        trained += new_token_count(recipe) * sum(tensor.shape[1] for tensor in rows)
    elif trained is None:
        fixed = frozen(names, chosen)
        trained = sum(tensor.size for tensor in tensors if tensor.name not in fixed)
    return ModelShape(
        name=recipe.model.name_or_path,
        parameters=sum(tensor.size for tensor in tensors),
        trainable_parameters=trained,
        linear_parameters=sum(tensor.size for tensor in tensors if tensor.is_linear),
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        vocab_size=sizes.vocab_size,
        head_dim=sizes.head_dim,
        sizes=sizes,
        tensors=tensors,
        config=config,
        peft_experts=peft_experts,
        tied=tied,
        train_only=chosen,
    )


def _guess_kind(name: str, shape: tuple[int, ...]) -> str:
    """The kind of a tensor of an unknown family: a matrix in a numbered block is taken for a linear layer's."""
    if name.endswith(".bias"):
        return "bias"
    if len(shape) == 3 and "expert" in name:
        return "experts"
    if len(shape) != 2 or not name.endswith(".weight"):
        return "norm" if len(shape) == 1 else "param"
    if any(part.isdigit() for part in name.split(".")):
        return "linear"
    return "output" if name in ("lm_head.weight", "embed_out.weight") else "embedding"


def _folder_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        if (folder / ADAPTER_CONFIG).is_file():
            raise PlanError(_is_adapter(folder)) from None
        raise PlanError(f"model.name_or_path: {folder} has no config.json; it is not a transformers model") from None
    except ValueError as error:
        raise PlanError(f"model.name_or_path: {folder / 'config.json'} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise PlanError(f"model.name_or_path: {folder / 'config.json'} is not a JSON object")
    return with_file_beside(config, folder)


def _read_folder(folder: Path, need_weights: bool) -> tuple[dict[str, Any], Shapes | None]:
    """The config in a model folder, and the tensors of its weights; None where there are none."""
    config = _folder_config(folder)
    files, missing = _weight_files(folder)
    if (missing or not files) and not need_weights:
        return config, None
    if missing and files:
        raise PlanError(f"model.name_or_path: {folder} lacks {', '.join(missing[:3])}, listed in its index")
    if not files:
        other = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        found = (
            f"found {', '.join(other[:3])}, which is a pickle and is not loaded: convert it" if other else "add them"
        )
        raise PlanError(f"model.name_or_path: {folder} has no weights (*.safetensors); {found}")
    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= _read_header(file)
    _check_dtypes(str(folder), config, {name: tensor["dtype"] for name, tensor in tensors.items()})
    return config, {name: tensor["shape"] for name, tensor in tensors.items()}


def _check_dtypes(name: str, config: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
    """Raises PlanError for quantized weights that would be loaded without their scales."""
    if found := unexplained(config, dtypes):
        raise PlanError(
            f"model.name_or_path: {name} has {found}, and no quantization_config in its config.json: the numbers would "
            "be trained on without their scales; take the unquantized repository, add the quantization_config, or "
            "convert the weights to bf16 if they have no scales"
        )


def _is_adapter(folder: Path) -> str:
    """What to say of a peft adapter in the model's place."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    except (ValueError, AttributeError):
        kind = base = None
    name = "name its base here" + (f" ({base})" if base else "")
    if kind in (None, *STARTABLE):
        return (
            f"model.name_or_path: {folder} is a peft adapter, not a model; to go on with it, {name} and set "
            f"lora.start_from: {folder}; to train on top of it, merge it first (distft merge, or peft's "
            "merge_and_unload)"
        )
    # Virtual tokens are no change of weights.
    fix = "" if kind in PROMPTS else "; to train on top of it, merge it first (peft's merge_and_unload)"
    return (
        f"model.name_or_path: {folder} is a peft adapter of the kind {kind}, not a model, and only "
        f"{' and '.join(STARTABLE)} can be gone on with; to train a new one, {name}{fix}"
    )


def _weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files that transformers loads (model.safetensors, else those in the index, else all), and those missing."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return sorted(folder.glob("model.safetensors")) or sorted(folder.glob("*.safetensors")), []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PlanError(f"model.name_or_path: {index} is not an index of weights") from None
    return [file for file in files if file.exists()], [file.name for file in files if not file.exists()]


def read_safetensors_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a file.

    Raises:
        PlanError: the file is not safetensors, or it is truncated.
    """
    return {name: tensor["shape"] for name, tensor in _read_header(path).items()}


def _read_header(path: Path) -> dict[str, Any]:
    """`dtype` and `shape` of every tensor in a file, by name. Raises as read_safetensors_header."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if path.stat().st_size != end:
            raise ValueError(f"it has {path.stat().st_size:,} bytes and should have {end:,}: an incomplete copy?")
        return {name: {"dtype": str(t["dtype"]), "shape": tuple(t["shape"])} for name, t in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"model.name_or_path: {path} is not a complete safetensors file ({error})") from None


def _read_hub(recipe: Recipe, need_weights: bool, config_only: bool = False) -> tuple[dict[str, Any], Shapes | None]:
    """As _read_folder, from the hub's cache if the model is there, else from the hub itself, without the weights."""
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise MissingPartError(
            f"model.name_or_path: {recipe.model.name_or_path} is a hub id; reading it needs "
            'pip install "distft[train]" (or name a local folder)'
        ) from None
    name, revision = recipe.model.name_or_path, recipe.model.revision
    try:
        cached = hub.try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            if config_only:
                return _folder_config(Path(cached).parent), None
            config, header = _read_folder(Path(cached).parent, need_weights=False)
            if header is not None or (is_known(config) and not need_weights):
                return config, header
        if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            raise OSError("HF_HUB_OFFLINE is set, and it is not in the cache")
        folder = Path(hub.hf_hub_download(name, "config.json", revision=revision)).parent
        for other in BESIDE:
            with contextlib.suppress(EntryNotFoundError):
                hub.hf_hub_download(name, other, revision=revision)
        config = _folder_config(folder)
        if config_only or (is_known(config) and not need_weights):
            return config, None
        metadata = hub.get_safetensors_metadata(name, revision=revision)
    except PlanError:
        raise
    except Exception as error:
        # huggingface_hub raises its own errors, httpx's and OSError here; all mean the same to the user.
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise NoModelError(
            f"model.name_or_path: {name} is neither a folder beside the recipe nor a readable hub model ({reason})"
        ) from None
    tensors = {n: tensor for file in metadata.files_metadata.values() for n, tensor in file.tensors.items()}
    _check_dtypes(name, config, {n: str(tensor.dtype) for n, tensor in tensors.items()})
    return config, {n: tuple(tensor.shape) for n, tensor in tensors.items()}
