"""Adapters, layers that are trained whole beside them, and rows of new tokens: what cannot be combined."""

from __future__ import annotations

from distft.models.layout import Tensor
from distft.models.lora import adapters, changes_base, module_of, rank_of, saved
from distft.models.quantization import is_kept
from distft.models.vocabulary import vocabulary_tensors
from distft.rules.core import RecipeCase, rule


@rule(
    "model.add_tokens with a training.train_only that leaves out the embeddings or the output layer",
    "distft/train/new_rows.py: rows of new tokens are part of these layers where there is no adapter",
    "name these layers in training.train_only, too",
)
def new_tokens_must_be_trained(case: RecipeCase) -> str | None:
    """A new token's rows start as the mean of its pieces', and would stay so: the model could not learn what the token
    stands for, nor when to write it.
    """
    model = case.model
    if case.recipe.lora or not case.recipe.model.add_tokens or model.train_only is None:
        return None
    rows = vocabulary_tensors(model.tensors, model.vocab_size)
    frozen = ", ".join(module_of(tensor) for tensor in rows if tensor.name in model.fixed)
    return f"training.train_only: it leaves out {frozen}, which have rows for model.add_tokens" if frozen else None


@rule(
    "model.add_tokens with lora.target_modules that name the embeddings or the output layer",
    "peft 0.21.2 utils/other.py, TrainableTokensWrapper: it takes the place of the layer that the adapter is on",
    "name other layers, or train all weights with lora: null",
)
def new_tokens_need_plain_embeddings(case: RecipeCase) -> str | None:
    """Rows of new tokens are trained beside the adapters, and saved as peft's trainable_token_indices. An adapter on
    the same layer would change these rows as well, and peft could not load the two together.
    """
    lora, model = case.recipe.lora, case.model
    if not lora or not case.recipe.model.add_tokens:
        return None
    adapted = [tensor for tensor, _ in adapters(lora, (*model.tensors, *model.tied), model.peft_experts)]
    named = ", ".join(map(module_of, vocabulary_tensors(adapted, model.vocab_size)))
    return f"lora.target_modules: {named} would have an adapter beside the rows of model.add_tokens" if named else None


@rule(
    "model.add_tokens with lora and an output layer with a bias",
    "peft 0.21.2 tuners/trainable_tokens/layer.py:279, forward_adapters: F.linear without bias",
    "train all weights with lora: null",
)
def new_tokens_need_an_output_layer_without_bias(case: RecipeCase) -> str | None:
    """peft's trainable_token_indices, in whose form rows are saved, compute the logits without the bias that some
    models (Phi-2, GPT-J) add: whoever loads the adapter would get other logits than were trained.
    """
    if not case.recipe.lora or not case.recipe.model.add_tokens or case.recipe.lora.modules_to_save:
        return None
    outputs = {f"{module_of(t)}.bias" for t in (*case.model.tensors, *case.model.tied) if t.kind == "output"}
    biased = any(tensor.name in outputs for tensor in case.model.tensors)
    return "model.add_tokens: the model's output layer has a bias" if biased else None


@rule(
    "model.add_tokens with a lora.modules_to_save that leaves out the embeddings or the output layer",
    "distft/train/model.py, add_adapters: rows of new tokens are trained by themselves, or with their whole layers",
    "name both in lora.modules_to_save (most models: [embed_tokens, lm_head]), or leave modules_to_save out",
)
def new_tokens_need_both_ends(case: RecipeCase) -> str | None:
    """Rows of new tokens are in two layers. Those of a layer that is not trained whole would stay as they start, and
    the model could not learn what the token stands for, or when to write it.
    """
    lora, model = case.recipe.lora, case.model
    if not lora or not lora.modules_to_save or not case.recipe.model.add_tokens:
        return None
    both = vocabulary_tensors((*model.tensors, *model.tied), model.vocab_size)
    whole = saved(lora, both_ends(case))
    left = ", ".join(module_of(tensor) for tensor in both if tensor not in whole)
    return f"lora.modules_to_save: it leaves out {left}, which have rows for model.add_tokens" if left else None


def both_ends(case: RecipeCase) -> list[Tensor]:
    """All parameters, tied ones included."""
    return [*case.model.tensors, *case.model.tied]


@rule(
    "lora.modules_to_save with a layer that model.quantization quantizes",
    "peft 0.21.2 utils/other.py, ModulesToSaveWrapper: a copy of the layer, whose integers have no gradient",
    "put an adapter on it (lora.target_modules), or leave model.quantization out",
)
def saved_layers_are_not_quantized(case: RecipeCase) -> str | None:
    """The copy that is trained is a copy of the quantized weight, which has no gradient. Embeddings, norms and the
    output layer are not quantized.
    """
    if not case.quantization or not case.recipe.lora:
        return None
    layers = [module_of(tensor) for tensor in saved(case.recipe.lora, both_ends(case)) if tensor.is_linear]
    named = next((layer for layer in layers if not is_kept(case.model.config, layer)), None)
    return f"lora.modules_to_save: {named} is quantized" if named else None


@rule(
    "lora.init_lora_weights: pissa, olora or orthogonal, where peft's are not for this adapter",
    "peft 0.21.2 tuners/lora/layer.py, pissa_init, olora_init, orthogonal_init; LLaMA-Factory's hparams/parser.py "
    "refuses PiSSA on quantized weights, too",
    "use lora.init_lora_weights: true, or change what is named",
)
def initial_weights_need_plain_layers(case: RecipeCase) -> str | None:
    """These are made from a whole weight, or in its dtype: not on quantized weights. PiSSA and OLoRA take the adapter
    out of the weight: not where another layer shares it, in no other form than a Linear's, not with DoRA, and no more
    ranks than the weight has. orthogonal makes pairs of ranks.
    """
    lora, model = case.recipe.lora, case.model
    if not lora or lora.init_lora_weights in (True, "gaussian"):
        return None
    got, kind = f"lora.init_lora_weights: got {lora.init_lora_weights}, with", str(lora.init_lora_weights)
    if case.quantization:
        return f"{got} model.quantization: {case.quantization}"
    if changes_base(lora) and lora.use_dora:
        return f"{got} lora.use_dora"
    for tensor, _ in adapters(lora, both_ends(case), model.peft_experts):
        path = module_of(tensor)
        rank = rank_of(lora, path)
        if tensor.kind != "linear":
            return f"{got} an adapter on {path}"
        if kind == "orthogonal" and rank % 2:
            return f"{got} the odd rank {rank} on {path}"
        if kind != "orthogonal" and rank > min(tensor.features):
            return f"{got} rank {rank} on {path}, whose weight has {min(tensor.features)}"
    return None


@rule(
    "lora.oft.coft under another strategy than ddp",
    "peft 0.21.2 tuners/oft/layer.py, OFTRotationModule.forward: self.weight.copy_(self._project_batch(...))",
    "use parallelism.strategy: ddp, or lora.oft.coft: false",
)
def constrained_rotations_need_whole_weights(case: RecipeCase) -> str | None:
    """peft writes the constrained weights over the trained ones in each forward pass. Where the strategy shards these,
    or keeps the optimizer's own copy, it writes over a copy that is dropped, and the constraint is not kept.
    """
    oft = case.recipe.lora and case.recipe.lora.oft
    if oft and oft.coft and not case.kind.replicates:
        return f"lora.oft.coft: {case.strategy} would not keep the constraint"
    return None


@rule(
    "model.add_tokens with lora.oft",
    "peft 0.21.2 tuners/oft/config.py: OFTConfig has no trainable_token_indices",
    "name embeddings and output layer in lora.modules_to_save (most models: [embed_tokens, lm_head]), or use LoRA",
)
def rotations_have_no_rows_of_new_tokens(case: RecipeCase) -> str | None:
    """Rows of new tokens are saved as peft's trainable_token_indices, which an adapter of OFT does not have. Layers
    that are trained whole have these rows.
    """
    lora = case.recipe.lora
    if lora and lora.oft and case.recipe.model.add_tokens and not lora.modules_to_save:
        return "model.add_tokens: an adapter of OFT has no rows for them"
    return None
