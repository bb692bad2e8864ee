"""The rows of model.add_tokens in the embeddings and the output layer.

Where all weights are trained, these rows are part of them. Beside adapters the embeddings are frozen, and NewRows holds
the rows that are trained: what the frozen layers compute for these tokens is replaced by what the rows give. That is
the arithmetic of peft's trainable_token_indices, in whose form final/ has the rows.

peft's own layer (0.21.2, tuners/trainable_tokens/layer.py) copies the whole embedding matrix in every forward pass and
computes the gradient of the whole output layer, reads sharded weights outside of their layer's forward pass, needs CUDA
under ZeRO-3, and hides from accelerate that input and output share a weight, so that FSDP2 would shard it twice. Here
the frozen layers stay as they are, under every strategy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from distft.errors import DataError, RecipeError
from distft.train.special_tokens import NewTokens

NAME = "new_rows"  # of the module in the base model
_DELTA = "token_adapter.trainable_tokens_delta"  # peft's name for the rows of a layer


class _Rows(torch.nn.Module):
    """Rows (tokens, hidden size) that stand for the same rows of the embeddings."""

    ids: torch.Tensor  # ascending

    def __init__(self, rows: torch.Tensor, ids: torch.Tensor):
        super().__init__()
        self.rows = torch.nn.Parameter(rows)
        self.register_buffer("ids", ids, persistent=False)

    def forward(
        self, tokens: torch.Tensor, embedded: torch.Tensor, scale: Any, *, output: bool = False
    ) -> torch.Tensor:
        """What the layer gives with these rows, from what it gave with its own.

        With `output`, `tokens` are hidden states (..., hidden size) and `embedded` is their logits (..., vocabulary).
        """
        if output:
            logits = F.linear(tokens, self.rows.to(tokens.dtype)).to(embedded.dtype)
            return embedded.index_copy(-1, self.ids, logits)
        index = torch.bucketize(tokens, self.ids).clamp(max=len(self.ids) - 1)
        rows = F.embedding(index, self.rows).to(embedded.dtype)
        if scale is not None:  # Gemma's embeddings are multiplied by the root of their width
            rows = rows * scale.to(rows.dtype)
        return torch.where((self.ids[index] == tokens)[..., None], rows, embedded)


class NewRows(torch.nn.Module):
    """The trained rows of a frozen model: `input`, and `output` unless the two layers share their weight."""

    def __init__(self, model: Any, ids: Sequence[int]):
        super().__init__()
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        self.names = {"input": _name(model, embeddings), "output": _name(model, head)}
        self.token_ids = list(ids)
        self.input = _rows_of(embeddings.weight, ids)
        self.output = None if _tied(model) else _rows_of(head.weight, ids)
        embeddings.register_forward_hook(self._embed)
        head.register_forward_hook(self._predict)

    def _embed(self, module: Any, inputs: tuple[Any, ...], embedded: torch.Tensor) -> torch.Tensor:
        return self.input(inputs[0], embedded, getattr(module, "embed_scale", None))

    @property
    def predicting(self) -> _Rows:
        """The rows of the output layer."""
        return self.output or self.input

    def predict(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The logits of hidden states with these rows, from those of the output layer."""
        return self.predicting(hidden, logits, None, output=True)

    def _predict(self, module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return self.predict(inputs[0], output) if output.dim() else output  # a sum: train/chunked_loss.py

    def layers(self) -> dict[str, str]:
        """Name of the layer, by the side whose rows it has."""
        return {side: name for side, name in self.names.items() if getattr(self, side) is not None}

    def peft_indices(self) -> dict[str, list[int]]:
        """trainable_token_indices of peft's LoraConfig."""
        return {name: list(self.token_ids) for name in self.layers().values()}

    def peft_names(self) -> dict[str, str]:
        """Name of each parameter in the peft model: that in an adapter's file."""
        prefix = "base_model.model."
        return {f"{prefix}{NAME}.{side}.rows": f"{prefix}{name}.{_DELTA}" for side, name in self.layers().items()}

    def to_peft(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The rows among `tensors`, under the names that an adapter's file has for them."""
        return {saved: tensors[name] for name, saved in self.peft_names().items() if name in tensors}

    def load_peft(self, tensors: dict[str, torch.Tensor], config: Mapping[str, Any]) -> None:
        """Take the rows out of the tensors of an adapter's file; `config` is its adapter_config.json.

        Raises:
            DataError: they are not there, or are those of other tokens.
        """
        if config.get("trainable_token_indices") != self.peft_indices():
            raise DataError("lora.start_from: the adapter was trained with other model.add_tokens")
        for name, saved in self.peft_names().items():
            parameter = self.get_parameter(name.partition(f"{NAME}.")[2])
            parameter.data.copy_(tensors.pop(saved))


def new_rows(model: Any) -> NewRows | None:
    """The trained rows of a peft model, or of its base; None where it has none."""
    return next((module for module in model.modules() if isinstance(module, NewRows)), None)


def grow(model: Any, tokens: NewTokens) -> None:
    """Give a loaded model a row for each new token, the same under every strategy.

    A row starts as the mean of the rows of its token's pieces, in float32: near in meaning, and no more likely at the
    output than its likeliest piece. (Where a token had no pieces: the mean of all rows, as in
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html.)

    Raises:
        RecipeError: the model's output layer cannot grow.
    """
    if not tokens.pieces:
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise RecipeError("model.add_tokens: the model has no output layer that transformers can resize")
    layers = [embeddings] if _tied(model) else [embeddings, head]
    have = _rows(embeddings.weight)
    made = []
    for layer in layers:
        with whole_weight(layer.weight):
            made.append({id_: _mean(layer.weight.detach()[:have], pieces) for id_, pieces in tokens.pieces.items()})
    if (tokens.rows or 0) > have:
        model.resize_token_embeddings(tokens.rows, mean_resizing=False)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    for layer, rows in zip((embeddings, head), made, strict=False):
        with whole_weight(layer.weight, write=True), torch.no_grad():
            for token, row in rows.items():
                layer.weight[token] = row.to(layer.weight)


def add_new_rows(model: Any, ids: Sequence[int]) -> None:
    """Put NewRows into a base model without adapters, as its module NAME.

    Raises:
        RecipeError: its output layer has a bias, which peft's form of the rows leaves out.
    """
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise RecipeError("model.add_tokens: the model's output layer has a bias, with which lora cannot train rows")
    model.add_module(NAME, NewRows(model, ids))


def _tied(model: Any) -> bool:
    """Whether embeddings and output layer share their weight. On the meta device each may have its own parameter."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    return head.weight is embeddings.weight or f"{_name(model, head)}.weight" in keys


def _rows_of(weight: torch.Tensor, ids: Sequence[int]) -> _Rows:
    with whole_weight(weight):
        index = torch.tensor(ids, device=None if weight.is_meta else weight.device)
        return _Rows(weight.detach()[index].float(), index)


def _mean(weight: torch.Tensor, pieces: Sequence[int]) -> torch.Tensor:
    return (weight[list(pieces)] if pieces else weight).float().mean(0)


def _rows(weight: Any) -> int:
    return int(getattr(weight, "ds_shape", weight.shape)[0])


@contextlib.contextmanager
def whole_weight(weight: Any, write: bool = False) -> Iterator[None]:
    """Have a weight that ZeRO-3 has partitioned be whole inside the context; what rank 0 writes into it is kept."""
    if not hasattr(weight, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0 if write else None):
        yield


def _name(model: Any, module: Any) -> str:
    return next(name for name, found in model.named_modules() if found is module)
