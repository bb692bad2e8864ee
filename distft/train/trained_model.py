"""The model that a LoRA run has trained, weight by weight: its adapter in memory, its base in files.

An adapter belongs to the weights that it was trained with. For LoRA those are the base's weights as they are stored.
For a quantized base (QLoRA) they are the weights quantized and dequantized, as the run's layers had them: the adapter
has learned to make up for the quantization error, which is some percent of every weight, and in the original weights
there is no such error. So the quantized layers without an adapter are dequantized ones here, too. Everything is
computed in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from accelerate import init_empty_weights
from peft.tuners.lora.layer import ParamWrapper
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from distft.config.recipe import Recipe
from distft.errors import RecipeError, RunError
from distft.models.lora import changes_base
from distft.models.quantization import NF4_BLOCK, NF4_DOUBLE_QUANTIZATION, NF4_QUANT_TYPE
from distft.runs.checkpoints import Checkpoint
from distft.runs.directory import RunDir
from distft.train.base_files import base_config, base_files, stored_quantization
from distft.train.conversion import Conversion
from distft.train.initial import InitialAdapter, plain_recipe
from distft.train.merge_check import largest_difference, layer_inputs
from distft.train.mergeable import ADAPTED, PEFT, adapted, obstacles, plain_name, saved_weights
from distft.train.model import add_adapters, compute_dtype, quantization_config
from distft.train.new_rows import new_rows
from distft.train.ranges import read_weights
from distft.train.save import adapter_tensors
from distft.train.skeleton import fill_buffers, filled, logits, set_parameter, skeleton
from distft.train.special_tokens import new_tokens
from distft.train.tensor_files import TensorFiles


class TrainedModel:
    """The model of a run whose base is in `folder`; `source` has the adapter: final/ or a checkpoint.

    Raises:
        DataError: the base or the adapter cannot be read.
        RecipeError: it cannot be merged.
        RunError: the adapter is not the recipe's.
    """

    def __init__(self, recipe: Recipe, folder: Path, source: Path | Checkpoint):
        initial = None
        if changes_base(recipe.lora) and isinstance(source, Checkpoint):
            initial = InitialAdapter(RunDir(source.path.parent.parent).initial_adapter)
        self.recipe = recipe = plain_recipe(recipe)
        self.files = base_files(recipe)
        self.tokens = new_tokens(recipe)
        self.base = skeleton(folder, recipe, self.tokens.rows)
        self.conversion = Conversion(self.base, self.files.shapes())
        if missing := self.conversion.missing():
            raise RecipeError(f"model.name_or_path: {recipe.model.name_or_path} has no {missing[0]}")
        fill_buffers(self.base, self.conversion, self.files.__getitem__)
        self.quantized = _quantized_layers(folder, recipe)
        with init_empty_weights(include_buffers=False):
            self.model = add_adapters(self.base, recipe, self.tokens.ids).eval()
        _load_adapter(self.model, source, initial)
        self.adapted = adapted(self.model)
        self.saved = saved_weights(self.model)  # of lora.modules_to_save
        if why := obstacles(self.conversion, [*self.adapted, *self.saved]):
            raise RecipeError(why)
        # Weights of the quantized layers without an adapter.
        self.dequantized = {name for layer in self.quantized if (name := f"{layer}.weight") not in self.adapted}
        # Rows of new tokens by the weight that they are in. Of tied weights, both may be stored.
        self.rows: dict[str, torch.Tensor] = {}
        if rows := new_rows(self.model):
            for side, layer in rows.names.items():
                trained = (rows.output if side == "output" else None) or rows.input
                self.rows[f"{layer}.weight"] = trained.rows
        self.changed = {*self.adapted, *self.saved, *self.dequantized, *self.rows}

    def as_trained(self, name: str) -> torch.Tensor:
        """A parameter of the base in float32, as it was beside the adapter."""
        clean = plain_name(name)
        tensor = self.conversion.parameter(clean, self.files.__getitem__)
        if clean in self.rows:
            tensor = self._grown(tensor)
        module, _, leaf = clean.rpartition(".")
        quantization = self.recipe.model.quantization
        if quantization is None or module not in self.quantized or leaf != "weight":
            return tensor.float()
        transposed = isinstance(self._base_layer(module), Conv1D)  # bitsandbytes' layers have it the other way round
        tensor = tensor.T.contiguous() if transposed else tensor
        tensor = dequantized(tensor.to(compute_dtype(self.recipe)), quantization)
        return tensor.T.contiguous() if transposed else tensor

    def _grown(self, tensor: torch.Tensor) -> torch.Tensor:
        """A weight of which new tokens have rows, these still empty."""
        return torch.nn.functional.pad(tensor, (0, 0, 0, max(0, (self.tokens.rows or 0) - len(tensor))))

    def _base_layer(self, name: str) -> Any:
        module = self.model.get_submodule(PEFT + name)
        return module.get_base_layer() if isinstance(module, ADAPTED) else module

    @torch.no_grad()
    def merged(self, name: str) -> tuple[torch.Tensor, float]:
        """A weight with its adapter merged in, in float32, and how far it is from the trained one.

        Both are peft's own arithmetic: that of its merge, and that of its forward pass. Of a layer the outputs for
        random inputs are compared; of the experts of a mixture, whose inputs a router makes, the weights themselves.
        The difference is the largest, relative to the root mean square.

        Raises:
            RunError: the merged weight is not finite.
        """
        path, layer = self.adapted[name]
        with filled(layer, path, self.as_trained):
            base, leaf = layer.get_base_layer(), name.rpartition(".")[2]
            if isinstance(layer, ParamWrapper):
                with layer._activate_lora(layer.active_adapters):
                    trained = getattr(base, leaf).detach().clone()
            else:
                inputs = layer_inputs(base)
                trained = layer(inputs)
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:  # not finite
                raise RunError(f"{name}: {error}") from None
            layer.merged_adapters.clear()  # the next time this layer is filled, it holds the base's weight
            weight = getattr(base, leaf).data
            found = weight if isinstance(layer, ParamWrapper) else base(inputs)
            return weight, largest_difference(found, trained)

    def final(self, name: str, stored: torch.Tensor) -> tuple[torch.Tensor, float]:
        """A parameter as it is in the merged model, from the base's, and the difference of `merged`."""
        if name in self.adapted:
            return self.merged(name)
        if name in self.saved:
            return self.saved[name].detach(), 0.0
        if name in self.dequantized:
            return self.as_trained(name), 0.0
        if name in self.rows:
            stored = self._grown(stored)
            stored[list(self.tokens.ids)] = self.rows[name].detach().to(stored.dtype)
        return stored, 0.0

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits (rows, tokens, vocabulary) for token rows."""
        return logits(self.model, self.as_trained, rows)


def base_folder(recipe: Recipe) -> Path:
    """The folder with the base's config.json: a local one, or that of the hub's cache.

    Raises:
        DataError: it cannot be read.
        RecipeError: the base is stored quantized.
    """
    if stored_quantization(recipe):
        name = recipe.model.name_or_path
        raise RecipeError(f"model.name_or_path: {name} is stored quantized: there are no weights to merge into")
    return base_config(recipe).parent


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


def _load_adapter(model: Any, source: Path | Checkpoint, initial: InitialAdapter | None = None) -> None:
    """Put the trained tensors into a peft model without weights; those of a checkpoint as `initial` makes them.

    Raises:
        DataError: they cannot be read.
        RunError: they are not those of the recipe's adapter.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(source, Checkpoint):
        where, tensors = source.path, read_weights(source.path)
        tensors = tensors if initial is None else initial.plain(tensors)
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
