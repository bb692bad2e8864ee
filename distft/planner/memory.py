"""A plain count of the memory of a rank, in bytes.

States are counted exactly; what the forward pass keeps is a simple upper bound for decoder-only transformers with a
fused attention kernel. docs/design.md ("micro-batch") states it in words.
"""

from __future__ import annotations

from dataclasses import dataclass

from distft.planner.model_shapes import ModelShape
from distft.recipe import Recipe

# Share of a device that a plan may fill; the rest is the context, the communicator and the allocator's gaps.
USABLE = 0.9
# Bytes of optimizer state a trained parameter: two float32 moments (AdamW), two 8-bit ones, one factored (Adafactor;
# "a little over 4" in https://huggingface.co/docs/transformers/model_memory_anatomy).
OPTIMIZER_BYTES = {
    "adamw_torch_fused": 8,
    "adamw_torch": 8,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8,
    "adafactor": 4,
}
# Bytes a quantised weight: NF4 with double quantisation 0.5 + 0.0159 (QLoRA, arXiv 2305.14314), int8 one.
QUANTIZED_BYTES = {"nf4": 0.516, "int8": 1.0}
# What each strategy divides among the ranks: parameters, gradients, optimizer states.
SHARDED = {
    "ddp": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "zero3": (True, True, True),
    "fsdp": (True, True, True),
    "hsdp": (True, True, True),
}


@dataclass(frozen=True)
class Memory:
    """Bytes per rank; `host_per_node` per machine."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    capacity: int
    host_per_node: int = 0

    @property
    def states(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        return self.states + self.activations + self.logits

    @property
    def fits(self) -> bool:
        return self.peak <= USABLE * self.capacity


def count(
    recipe: Recipe,
    model: ModelShape,
    *,
    strategy: str,
    offload: str,
    shard_size: int,
    nproc_per_node: int,
    capacity: int,
    micro_batch_size: int = 0,
    gradient_checkpointing: bool = False,
) -> Memory:
    """Memory of a rank with `micro_batch_size` sequences in flight (0: the states alone)."""
    low = 4 if recipe.training.mixed_precision == "no" else 2
    trained = model.trainable_parameters
    if recipe.lora is None:
        # float32 masters; DeepSpeed keeps a 16-bit working copy beside them, DDP and FSDP cast on the way.
        weights = 4 * trained + (low if low < 4 and strategy.startswith("zero") else 0) * trained
    else:
        packed = model.linear_parameters if recipe.model.quantization else 0
        bits = QUANTIZED_BYTES.get(recipe.model.quantization or "", low)
        # prepare_model_for_kbit_training casts what is not quantised to float32.
        weights = int(packed * bits) + (model.parameters - packed) * (4 if packed else low) + 4 * trained
    parts = [weights, 4 * trained, OPTIMIZER_BYTES[recipe.training.optim] * trained]
    parts = [-(-size // shard_size) if shard else size for size, shard in zip(parts, SHARDED[strategy], strict=True)]
    host = 0
    if offload != "none":
        moved = {2} | ({0} if offload == "all" else set()) | ({0, 1, 2} if strategy in ("fsdp", "hsdp") else set())
        host = sum(parts[i] for i in moved) * nproc_per_node
        parts = [0 if i in moved else size for i, size in enumerate(parts)]
    tokens = micro_batch_size * recipe.data.max_length
    return Memory(
        *parts,
        activations=tokens * activation_bytes_per_token(model, low, gradient_checkpointing),
        # The output layer's result in working precision, its float32 copy, and that one's gradient.
        logits=tokens * (model.vocab_size or 0) * (low + 8),
        capacity=capacity,
        host_per_node=host,
    )


def activation_bytes_per_token(model: ModelShape, low: int, gradient_checkpointing: bool) -> int:
    """What the backward pass needs of the forward pass, a token, in bytes.

    34 h bytes a layer in 16 bit with a fused attention kernel (Korthikanti et al., arXiv 2205.05198, table 2), scaled
    to `low` bytes an element; with checkpointing a layer keeps its input alone, and one layer is alive in full.
    """
    if not model.hidden_size or not model.num_hidden_layers:
        return 0
    layer = 17 * model.hidden_size * low
    if gradient_checkpointing:
        return layer + model.num_hidden_layers * model.hidden_size * low
    return layer * model.num_hidden_layers
