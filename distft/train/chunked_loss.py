"""The loss of some tokens at a time, so that the logits of all are never there (training.loss: chunked).

Logits, their float32 copy and its gradient take 10 bytes and more for each token and word of the vocabulary: of a long
row, most of a GPU. Here the output layer sees the trained tokens only, a chunk of them at a time, and the gradient of a
chunk's loss is computed at once: what is kept is the gradient for the hidden states, and the sum of the output layer's
where it is trained (as Liger's fused linear cross entropy does, arXiv 2410.10989, section 3.2). trl's add_fused_lm_head
(1.16) reads the weight of the output layer instead of calling it, which loses adapters on it, lora.modules_to_save, and
the rows of model.add_tokens; and it computes the logits of every chunk twice.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import CausalLMOutput

from distft.config.recipe import Recipe
from distft.data.formats import IGNORE
from distft.models.chunks import asked_for, chunk_tokens
from distft.strategies.kinds import KINDS
from distft.train.losses import WEIGHTS
from distft.train.new_rows import new_rows

log = logging.getLogger("distft")

Head = Callable[[torch.Tensor], torch.Tensor]  # hidden states (tokens, hidden size) -> logits (tokens, vocabulary)


class _Summed(torch.autograd.Function):
    """Sum of the tokens' losses (float32), with its gradients computed on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        head: Head,
        loss_type: str,
        chunk: int,
        training: bool,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        wanted = [needed and training for needed in ctx.needs_input_grad]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden = torch.zeros_like(hidden) if wanted[0] else None
        trained = [p for p, is_wanted in zip(parameters, wanted[6:], strict=True) if is_wanted]
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
        for start in range(0, len(hidden), chunk):
            here = slice(start, start + chunk)
            loss, found = _step(hidden[here], targets[here], head, loss_type, trained, any(wanted), wanted[0])
            total += loss
            if of_hidden is not None:
                of_hidden[here] = found.pop(0)
            while found:
                sums[len(sums) - len(found)] += found.pop(0)
        ctx.wanted = wanted
        ctx.dtypes = [p.dtype for p in trained]
        ctx.save_for_backward(*([] if of_hidden is None else [of_hidden]), *sums)
        return total

    @staticmethod
    def backward(ctx: Any, *scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        of_hidden = next(saved).mul_(scale[0]) if ctx.wanted[0] else None
        dtypes = iter(ctx.dtypes)
        return (
            of_hidden,
            *(None,) * 5,
            *(next(saved).mul_(scale[0]).to(next(dtypes)) if wanted else None for wanted in ctx.wanted[6:]),
        )


def _step(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    loss_type: str,
    trained: list[torch.Tensor],
    training: bool,
    through: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A chunk's loss and gradients: of its hidden states if they are wanted (`through`), then of `trained`. A function
    of its own, so that nothing of a chunk is left when the next one begins."""
    with torch.set_grad_enabled(training):
        states = hidden.detach().requires_grad_(through)
        logits = head(states)
    loss, gradient = _of_chunk(logits.detach(), targets, loss_type, with_gradient=training)
    if gradient is None:
        return loss, []
    return loss, list(torch.autograd.grad(logits, [states] * through + trained, gradient))


def _of_chunk(
    logits: torch.Tensor, targets: torch.Tensor, loss_type: str, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The chunk's loss, and its gradient for the logits: softmax less one at the target, times the token's weight."""
    values = logits.to(torch.float32, copy=True)
    losses = F.cross_entropy(values, targets, reduction="none")
    weights = WEIGHTS[loss_type](losses, values)
    total = (losses * weights).sum()
    if not with_gradient:
        return total, None
    picked = values.gather(1, targets[:, None])
    # log_softmax of the target is -loss: so the sum of exponents is known without another pass.
    values.sub_(picked + losses[:, None]).exp_()
    values.scatter_add_(1, targets[:, None], torch.full_like(picked, -1.0))
    return total, values.mul_(weights[:, None]).to(logits.dtype)


def use(recipe: Recipe, model: Any, strategy: str) -> bool:
    """Whether a model's loss is computed in chunks, for which its forward is prepared; why not is logged."""
    base = model if recipe.lora is None else model.get_base_model()
    why = asked_for(recipe) or obstacle(base, strategy)
    if why is None:
        add(base)
    log.info("loss: %s", "chunked" if why is None else f"full ({why})")
    return why is None


def obstacle(model: Any, strategy: str) -> str | None:
    """Why a base model's loss cannot be computed in chunks under a strategy; None where it can."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or getattr(model, "base_model", model) is model:
        return f"{type(model).__name__} has no output layer that transformers knows"
    if getattr(model.config.get_text_config(), "output_router_logits", False) and not _has_router_loss(model):
        return f"{type(model).__name__} has a router loss of its own"
    if KINDS[strategy].zero_stage == 3 and not _is_plain(model, head):
        return "under ZeRO-3 the output layer would be gathered for every chunk, since it has adapters or new rows"
    return None


def add(model: Any) -> None:
    """Give a base model's forward the arguments `chunked` (a training.loss_type) and `labels` (rows, tokens; its own
    meaning of labels stays without `chunked`). It then returns as `loss` the sum of the trained tokens' losses, over
    `num_items_in_batch`, and in training the router loss of a mixture whose config asks for it.

    Called before the strategy wraps it.
    """
    original = model.forward
    config = model.config.get_text_config()

    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        chunked: str | None = None,
        labels: Any = None,
        num_items_in_batch: Any = None,
        **rest: Any,
    ) -> Any:
        if chunked is None:
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return original(*args, **{name: value for name, value in given.items() if value is not None}, **rest)
        routed = self.training and getattr(config, "output_router_logits", False)
        outputs = self.base_model(*args, **rest, use_cache=False, **({"output_router_logits": True} if routed else {}))
        loss = _loss(self, outputs[0], labels, chunked)
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        if routed:
            loss = loss + config.router_aux_loss_coef * _router_loss(config, outputs, rest.get("attention_mask"))
        return CausalLMOutput(loss=loss)

    model.forward = MethodType(forward, model)


def _loss(model: Any, hidden: torch.Tensor, labels: torch.Tensor, loss_type: str) -> torch.Tensor:
    targets = F.pad(labels, (0, 1), value=IGNORE)[..., 1:].reshape(-1)
    hidden = hidden.reshape(len(targets), -1)
    trained = trained_tokens(targets)
    hidden, targets = hidden[trained], targets[trained]
    layer = model.get_output_embeddings()
    rows = new_rows(model)

    def parameters() -> Iterator[Any]:  # those that a sharding strategy has put there for this call
        yield from layer.parameters()
        yield from rows.predicting.parameters() if rows else ()

    transform = _transform(model.config.get_text_config())
    chunk = chunk_tokens(model.config.get_text_config().vocab_size)
    training = torch.is_grad_enabled()

    original = layer.forward

    def head(states: torch.Tensor) -> torch.Tensor:
        logits = original(states)
        return transform(logits if rows is None else rows.predict(states, logits))

    def summed(states: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = _Summed.apply(
            states, targets, head, loss_type, chunk, training, *dict.fromkeys(parameters())
        )
        return total

    # One call of the layer for all chunks: the hooks of FSDP and ZeRO-3 gather its weights around it.
    layer.forward = summed
    try:
        return layer(hidden)
    finally:
        layer.forward = original


def trained_tokens(targets: torch.Tensor) -> torch.Tensor:
    """Their positions; for the simulation, whose tensors have no values, to replace."""
    return (targets != IGNORE).nonzero().squeeze(1)


def _transform(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a model does to its logits after the output layer, by its config: scale, then cap.

    Names as transformers 5.23 has them: Cohere's logit_scale, Falcon-H1's lm_head_multiplier, Granite's logits_scaling
    (a divisor; HyperCLOVA X multiplies), Gemma's final_logit_softcapping. What is not here,
    RecipeTrainer.check_chunks finds.
    """
    scale = next(
        (v for n in ("logit_scale", "output_multiplier", "lm_head_multiplier") if (v := getattr(config, n, None))), 1.0
    )
    if divisor := getattr(config, "logits_scaling", None):
        scale *= divisor if config.model_type == "hyperclovax" else 1 / divisor
    cap = getattr(config, "final_logit_softcapping", None)

    def transform(logits: torch.Tensor) -> torch.Tensor:
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform


def _has_router_loss(model: Any) -> bool:
    """Whether a model's router loss is `_router_loss`: its module has that function, its config what this reads."""
    config = model.config.get_text_config()
    needed = ("num_experts_per_tok", "router_aux_loss_coef")
    has_number = hasattr(config, "num_local_experts") or hasattr(config, "num_experts")
    has_function = hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")
    return has_function and has_number and all(hasattr(config, name) for name in needed)


def _router_loss(config: Any, outputs: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Load balancing of a mixture's experts: Mixtral's function, which transformers' other mixtures share."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(config, "num_local_experts", None) or config.num_experts
    loss: Any = load_balancing_loss_func(outputs.router_logits, experts, config.num_experts_per_tok, attention_mask)
    return loss


def _is_plain(model: Any, head: Any) -> bool:
    return type(head) is torch.nn.Linear and new_rows(model) is None
