"""What the model is, from its files alone: names and shapes in the safetensors headers, sizes in config.json.

Reading a header takes no torch: 8 bytes of length, then JSON (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from distft.errors import MissingPartError, PlanError
from distft.recipe import Lora, Recipe

# A header is JSON of some hundred bytes a tensor; what claims more is not a safetensors file.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class ModelShape:
    """Counts in elements. The sizes are None where config.json has no such entry."""

    name: str
    parameters: int
    trainable_parameters: int
    linear_parameters: int  # weights of the linear layers inside the blocks: what quantization stores in fewer bits
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    vocab_size: int | None = None
    head_dim: int | None = None


def read_model_shape(recipe: Recipe) -> ModelShape:
    """The model of a recipe, from its local folder or the hub.

    Raises:
        PlanError: no config.json, no safetensors weights, or a file that is neither.
        MissingPartError: a hub id, without huggingface_hub installed.
    """
    folder = Path(recipe.model.name_or_path)
    local = folder.is_dir()
    tensors, config = _read_folder(folder) if local else _read_hub(recipe)
    linear = {name: shape for name, shape in tensors.items() if _is_block_linear(name, shape)}
    parameters = sum(map(prod, tensors.values()))
    text = config.get("text_config") or config  # multimodal configs nest the language model's
    heads, hidden = _first(text, "num_attention_heads", "n_head"), _first(text, "hidden_size", "n_embd", "d_model")
    return ModelShape(
        name=recipe.model.name_or_path,
        parameters=parameters,
        trainable_parameters=lora_parameters(recipe.lora, linear) if recipe.lora else parameters,
        linear_parameters=sum(map(prod, linear.values())),
        hidden_size=hidden,
        num_hidden_layers=_first(text, "num_hidden_layers", "n_layer"),
        vocab_size=_first(text, "vocab_size"),
        head_dim=_first(text, "head_dim") or (hidden // heads if hidden and heads else None),
    )


def lora_parameters(lora: Lora, linear: Mapping[str, tuple[int, ...]]) -> int:
    """Trainable parameters of an adapter: r x (in + out) a matrix, and DoRA's magnitude vector of `out`.

    A matrix belongs to it if its name ends with one of target_modules (peft's rule for a list of names).

    Raises:
        PlanError: nothing matches.
    """
    targets = lora.target_modules
    chosen = {
        name: shape
        for name, shape in linear.items()
        if targets == "all-linear" or any(f".{name}".removesuffix(".weight").endswith(f".{t}") for t in targets)
    }
    if not chosen:
        known = sorted({name.removesuffix(".weight").rsplit(".", 1)[-1] for name in linear})
        raise PlanError(
            f"lora.target_modules: got {', '.join(targets)}, no layer of the model is called so; "
            f"it has {', '.join(known)}"
        )
    return sum(lora.r * sum(shape) + (shape[0] if lora.use_dora else 0) for shape in chosen.values())


def _is_block_linear(name: str, shape: tuple[int, ...]) -> bool:
    """A matrix inside a numbered block: not the embedding, not the output layer (peft's all-linear leaves it out)."""
    return len(shape) == 2 and any(part.isdigit() for part in name.split(".")) and name.endswith(".weight")


def _first(config: Mapping, *names: str) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _read_folder(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict]:
    """Tensor shapes and config of a local model folder."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise PlanError(f"model.name_or_path: {folder} has no config.json; it is not a transformers model") from None
    except ValueError as error:
        raise PlanError(f"model.name_or_path: {folder / 'config.json'} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise PlanError(f"model.name_or_path: {folder / 'config.json'} is not a JSON object")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        found = (
            f"found {', '.join(other[:3])}, which is a pickle and is not loaded: convert it" if other else "add them"
        )
        raise PlanError(f"model.name_or_path: {folder} has no weights (*.safetensors); {found}")
    tensors: dict[str, tuple[int, ...]] = {}
    for file in files:
        tensors |= read_safetensors_header(file)
    return tensors, config


def read_safetensors_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a file.

    Raises:
        PlanError: the file is not safetensors, or is cut short.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if path.stat().st_size != end:
            raise ValueError(f"it has {path.stat().st_size:,} bytes and should have {end:,}: a broken copy?")
        return {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"model.name_or_path: {path} is not a whole safetensors file ({error})") from None


def _read_hub(recipe: Recipe) -> tuple[dict[str, tuple[int, ...]], dict]:
    """The same from the hub's cache where the model lies there, else the headers alone from the hub itself."""
    try:
        import huggingface_hub as hub
    except ImportError:
        raise MissingPartError(
            f"model.name_or_path: {recipe.model.name_or_path} is a hub id; reading it needs "
            'pip install "distft[train]" (or name a local folder)'
        ) from None
    name, revision = recipe.model.name_or_path, recipe.model.revision
    try:
        cached = hub.try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str) and any(Path(cached).parent.glob("*.safetensors")):
            return _read_folder(Path(cached).parent)
        if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            raise OSError("HF_HUB_OFFLINE is set, and it is not in the hub's cache")
        metadata = hub.get_safetensors_metadata(name, revision=revision)
        config = json.loads(Path(hub.hf_hub_download(name, "config.json", revision=revision)).read_text())
    except PlanError:
        raise
    except Exception as error:
        # huggingface_hub raises its own, httpx's and OSError's errors here; all mean the same to the user.
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise PlanError(
            f"model.name_or_path: {name} is neither a folder beside the recipe nor a hub model that can be read "
            f"({reason})"
        ) from None
    tensors = {n: tuple(t.shape) for f in metadata.files_metadata.values() for n, t in f.tensors.items()}
    return tensors, config
