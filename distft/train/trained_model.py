"""The model that a LoRA run has trained, weight by weight: its adapter in memory, its base in files.

An adapter belongs to the weights that it was trained with. For LoRA those are the base's weights as they are stored.
For a quantized base (QLoRA) they are the weights quantized and dequantized, as the run's layers had them: the adapter
has learned to make up for the quantization error, which is some percent of every weight, and in the original weights
there is no such error. So the quantized layers without an adapter are dequantized ones here, too. Everything is
computed in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from accelerate import init_empty_weights
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from distft.config.recipe import Recipe
from distft.errors import DataError, RecipeError, RunError, first_line
from distft.models.quantization import NF4_BLOCK, NF4_DOUBLE_QUANTIZATION, NF4_QUANT_TYPE
from distft.runs.checkpoints import Checkpoint
from distft.train.merge_check import largest_difference, layer_inputs
from distft.train.model import add_adapters, compute_dtype, quantization_config
from distft.train.new_rows import new_rows
from distft.train.ranges import read_weights
from distft.train.save import adapter_tensors
from distft.train.skeleton import filled, logits, set_parameter, skeleton
from distft.train.special_tokens import new_tokens
from distft.train.tensor_files import TensorFiles

PEFT = "base_model.model."  # before every name in a peft model


class TrainedModel:
    """The model of a run whose base is in `folder`; `source` has the adapter: final/ or a checkpoint.

    Raises:
        DataError: the base or the adapter cannot be read.
        RecipeError: it cannot be merged.
        RunError: the adapter is not the recipe's.
    """

    def __init__(self, recipe: Recipe, folder: Path, source: Path | Checkpoint):
        self.recipe = recipe
        self.files = _base_files(recipe)
        self.tokens = new_tokens(recipe)
        self.base = skeleton(folder, recipe, self.tokens.rows)
        self.quantized = _quantized_layers(folder, recipe)
        with init_empty_weights(include_buffers=False):
            self.model = add_adapters(self.base, recipe, self.tokens.ids).eval()
        _load_adapter(self.model, source)
        # Name and module of the layers with an adapter, by the stored name of their weight.
        self.adapted: dict[str, tuple[str, LoraLayer]] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                self.adapted[self._stored(name)] = (name, module)
        # Weight of the quantized layers without an adapter, by its stored name.
        weights = {self._stored(name): f"{name}.weight" for name in self.quantized}
        self.dequantized = {stored: name for stored, name in weights.items() if stored not in self.adapted}
        # Rows of new tokens by the stored name of the weight that they are in. Of tied weights, both may be stored.
        self.rows: dict[str, torch.Tensor] = {}
        if rows := new_rows(self.model):
            prefix = f"{self.base.base_model_prefix}."
            for side, layer in rows.names.items():
                weight, trained = f"{layer}.weight", (rows.output if side == "output" else None) or rows.input
                found = {weight, weight.removeprefix(prefix), prefix + weight}
                self.rows |= {stored: trained.rows for stored in found if stored in self.files}

    def _stored(self, name: str) -> str:
        """The stored name of a layer's weight.

        Raises:
            RecipeError: it is not stored by itself.
        """
        weight = f"{name.removeprefix(PEFT)}.weight"
        tied = getattr(self.base, "all_tied_weights_keys", {})
        if weight in tied or weight in tied.values():
            raise RecipeError(f"{weight} is tied to another weight, which a merge would change as well")
        stored = self.files.stored_name(self.base, weight)
        if stored is None:
            raise RecipeError(f"{weight}: the base's files have no such tensor; transformers converts it on loading")
        return stored

    def as_trained(self, name: str) -> torch.Tensor:
        """A parameter of the base in float32, as it was beside the adapter."""
        clean = name.removeprefix(PEFT).replace(".base_layer.", ".")
        stored = self.files.stored_name(self.base, clean)
        tensor = self.grown(stored) if stored in self.rows else self.files.parameter(self.base, clean)
        module, _, leaf = clean.rpartition(".")
        quantization = self.recipe.model.quantization
        if quantization is None or module not in self.quantized or leaf != "weight":
            return tensor.float()
        transposed = isinstance(self._base_layer(module), Conv1D)  # bitsandbytes' layers have it the other way round
        tensor = tensor.T.contiguous() if transposed else tensor
        tensor = dequantized(tensor.to(compute_dtype(self.recipe)), quantization)
        return tensor.T.contiguous() if transposed else tensor

    def grown(self, stored: str) -> torch.Tensor:
        """A weight of which new tokens have rows, these still empty."""
        tensor = self.files[stored]
        return torch.nn.functional.pad(tensor, (0, 0, 0, max(0, (self.tokens.rows or 0) - len(tensor))))

    def with_rows(self, stored: str) -> torch.Tensor:
        """That weight with the rows as they were trained."""
        tensor = self.grown(stored)
        tensor[list(self.tokens.ids)] = self.rows[stored].detach().to(tensor.dtype)
        return tensor

    def _base_layer(self, name: str) -> Any:
        module = self.model.get_submodule(PEFT + name)
        return module.get_base_layer() if isinstance(module, LoraLayer) else module

    @torch.no_grad()
    def merged(self, stored: str) -> tuple[torch.Tensor, float]:
        """A weight with its adapter merged in, in float32, and how far the layer's outputs are from the trained one's.

        Both are peft's own arithmetic: that of its merge, and that of its forward pass. The difference is the largest
        for random inputs, relative to the root mean square of the outputs.

        Raises:
            RunError: the merged weight is not finite.
        """
        name, layer = self.adapted[stored]
        with filled(layer, name, self.as_trained):
            base = layer.get_base_layer()
            inputs = layer_inputs(base)
            trained = layer(inputs)
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:  # not finite
                raise RunError(f"{stored}: {error}") from None
            layer.merged_adapters.clear()  # the next time this layer is filled, it holds the base's weight
            return base.weight.data, largest_difference(base(inputs), trained)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits (rows, tokens, vocabulary) for token rows."""
        return logits(self.model, self.as_trained, rows)


def base_folder(recipe: Recipe) -> Path:
    """The folder with the base's config.json: a local one, or that of the hub's cache.

    Raises:
        DataError: it cannot be read.
        RecipeError: the base is stored quantized.
    """
    model = recipe.model
    try:
        config: Any = cached_file(model.name_or_path, "config.json", revision=model.revision)
    except OSError as error:
        raise DataError(f"model.name_or_path: {model.name_or_path} cannot be read ({first_line(error)})") from None
    if "quantization_config" in json.loads(Path(config).read_text()):
        raise RecipeError(
            f"model.name_or_path: {model.name_or_path} is stored quantized: there are no weights to merge into"
        )
    return Path(config).parent


def _base_files(recipe: Recipe) -> TensorFiles:
    model = recipe.model
    options: dict[str, Any] = {"revision": model.revision}
    try:
        single = cached_file(
            model.name_or_path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **options
        )
        if single:
            return TensorFiles([Path(single)])
        index = cached_file(model.name_or_path, SAFE_WEIGHTS_INDEX_NAME, **options)
        return TensorFiles([Path(path) for path in get_checkpoint_shard_files(model.name_or_path, index, **options)[0]])
    except OSError as error:
        raise DataError(f"model.name_or_path: {model.name_or_path} has no weights ({first_line(error)})") from None


def _quantized_layers(folder: Path, recipe: Recipe) -> set[str]:
    """Names of the layers that transformers quantizes for this recipe."""
    config = quantization_config(recipe, "ddp")
    if config is None:
        return set()
    model = skeleton(folder, recipe)
    quantizer = AutoHfQuantizer.from_config(config)
    quantizer.preprocess_model(model, dtype=compute_dtype(recipe), device_map={"": "cpu"})
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def dequantized(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """A weight after bitsandbytes' round trip with the settings of quantization_config, in float32.

    For int8 that is the weight alone: the layers of LLM.int8() round their inputs, too.
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
    values, scales, _ = functional.int8_vectorwise_quant(weight.contiguous().half())  # as Int8Params does
    return functional.int8_vectorwise_dequant(values, scales)


def _load_adapter(model: Any, source: Path | Checkpoint) -> None:
    """Put the trained tensors into a peft model without weights.

    Raises:
        DataError: they cannot be read.
        RunError: they are not those of the recipe's adapter.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(source, Checkpoint):
        where, tensors = source.path, read_weights(source.path)
    else:
        files = TensorFiles([source / "adapter_model.safetensors"])
        names = {id(parameter): name for name, parameter in trained.items()}
        as_saved = adapter_tensors(model, trained)
        where = source
        tensors = {names[id(as_saved[name])] if name in as_saved else name: files[name] for name in files}
    have = {name: tensor.numel() for name, tensor in tensors.items()}
    want = {name: parameter.numel() for name, parameter in trained.items()}
    if have != want:
        some = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))[:5]
        raise RunError(f"{where}: not the recipe's adapter; these differ, among others: {', '.join(some)}")
    for name, parameter in trained.items():
        set_parameter(model, name, tensors[name].view(parameter.shape).float())
