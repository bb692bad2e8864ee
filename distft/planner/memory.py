"""Memory of a rank and of its host, by formula: from config.json alone, in milliseconds.

sharding.py has states and buffers by strategy, activations.py what a step keeps besides. The simulation replaces the
latter by counting, and shares the former and put_together; benchmarks/plan_accuracy.py compares the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

from distft.config.recipe import Recipe
from distft.models.layout import Tensor, blocks
from distft.models.lora import Adapter, adapters, module_of, saved, shapes_of, trained
from distft.models.oft import shape_of
from distft.models.quantization import disk_quantization, is_kept, stored_bytes
from distft.models.shapes import ModelShape
from distft.models.vocabulary import new_token_count, vocabulary_tensors
from distft.planner import activations, loading, sharding
from distft.planner.setting import Setting
from distft.planner.sharding import LowRank, Muon, Share, Sizes, Unit
from distft.rules.upstream import NOT_QUANTIZED
from distft.strategies.deepspeed import PERSISTENT
from distft.units import GIB

# Beside tensors: the CUDA context (0.47 GiB, A100, lazy module loading), NCCL's buffers (the first collective of 2
# ranks: 0.5 to 1.5 GiB), and cuBLAS's workspaces of the forward and the backward thread (32 MiB each on Hopper, 8
# before: ATen cuda/CublasHandlePool.cpp). On a CPU: a process with torch, transformers and peft imported.
CONTEXT, NCCL, WORKSPACES, CPU_PROCESS = int(0.47 * GIB), GIB, 64 * 2**20, int(0.75 * GIB)
# Gaps of the caching allocator, as a part of the peak: the median of 22 steps that were measured on a GPU for each kind
# of attention (benchmarks/plan_accuracy.py, section `measured`); 9 of 10 of these are at most ERROR above or below.
GAPS = {"eager": 0.18}
ERROR = {"eager": 0.20}
OTHER_GAPS, OTHER_ERROR = 0.09, 0.06

# train/kahan.py: bytes of an element's states, and the elements of a tensor that a step widens, with the bytes of each.
KAHAN_STATES, KAHAN_CHUNK, KAHAN_STEP = 6, 2**22, 19

# (moment, block) → bytes by kind: activations, logits, buffers, gradients.
Peaks = Mapping[tuple[str, "int | None"], "Counter[str]"]


@dataclass(frozen=True)
class Memory:
    """Bytes per rank; `host_per_node` per machine.

    `parameters`, `gradients` and `optimizer` are the complete states; `activations`, `logits` (everything with an entry
    per token and word of the vocabulary) and `buffers` (gathered parameters, buckets) are what is live at the peak. The
    peak is less than their sum where not all gradients exist yet. `peaks` has the peak of every moment.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    peak: int  # comparable with torch.cuda.max_memory_allocated()
    overhead: int
    error: float  # of `process`: 9 of 10 are at most this part of it above or below
    host_per_node: int
    moment: str  # when the peak is: load | forward | loss | backward | optimizer
    peaks: Mapping[str, int]
    model_parameters: int  # elements
    trainable_parameters: int

    @property
    def states(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    @property
    def much_of_host(self) -> int:
        """`host_per_node`, or 0 where it is less than any node with GPUs has to spare."""
        return self.host_per_node if self.host_per_node >= 8 * GIB else 0

    @property
    def process(self) -> int:
        """Comparable with nvidia-smi."""
        return self.peak + self.overhead


class Estimates(Protocol):
    """Memory of a recipe's ranks, by formula (Estimator) or counted (simulation/simulate.py)."""

    sizes: Sizes
    is_counted: bool  # then for rows of the recipe's length only

    def memory(self, setting: Setting, max_length: int | None = None) -> Memory:
        """Memory of a rank; `max_length` instead of the recipe's."""

    def exactly(self, setting: Setting) -> Memory:
        """The same for the setting that was chosen; may take longer."""


class Estimator:
    """Memory of a recipe's ranks by formula; whatever does not depend on the setting is computed once."""

    is_counted = False

    def __init__(self, recipe: Recipe, model: ModelShape):
        self.recipe, self.model = recipe, model
        self.sizes = sizes_of(recipe, model)
        self.states = ddp_states(recipe, self.sizes, _trained_shapes(recipe, model))
        self.saved = frozenset(tensor.name for tensor in _saved(recipe, model))
        self.chosen = frozenset(tensor.name for tensor, _ in _trained(recipe, model)) - self.saved
        # Of the largest blocks, one with adapters (lora.layers_to_transform).
        stack = blocks(model.tensors)
        self.block = max(stack, key=self._layers, default=[])
        adapted = [position for position, block in enumerate(stack) if self._layers(block)[1]]
        # Embeddings, or rows of them, are below all blocks.
        below = adapted[0] if adapted and not (recipe.model.add_tokens or self.saved) else 0
        self.bare = (below, len(stack) - below - len(adapted)) if adapted else (0, 0)
        self.buffers = buffer_bytes(recipe, model)
        self.zero: dict[tuple[str, str, int], dict[str, Any] | None] = {}

    def _layers(self, block: Sequence[Tensor]) -> tuple[int, int]:
        return len(block), sum(tensor.name in self.chosen for tensor in block)

    def memory(self, setting: Setting, max_length: int | None = None) -> Memory:
        """Memory of a rank; `max_length` instead of the recipe's."""
        length = max_length or self.recipe.data.max_length
        peaks = self.step(setting, length)
        key = setting.strategy, setting.offload, setting.world_size
        if key not in self.zero:
            self.zero[key] = zero_section(self.recipe, setting, self.sizes)
        return put_together(self.recipe, self.sizes, self.states, peaks, setting, self.zero[key], length)

    def exactly(self, setting: Setting) -> Memory:
        return self.memory(setting)

    def step(self, setting: Setting, length: int) -> Peaks:
        """What a step keeps, besides the states and the strategy's buffers."""
        found = activations.peaks(self.recipe, self.model, setting, length, self.chosen, self.block, self.bare)
        # The input of a trained output layer, which a frozen one does not keep.
        widths = [t.features[0] for t in _saved(self.recipe, self.model) if t.kind == "output"]
        inputs = compute_bytes(self.recipe) * setting.micro_batch_size * length * sum(widths)
        found |= {name: (rest + inputs, logits) for name, (rest, logits) in found.items() if name in ("loss", "head")}
        step = _peaks(self.recipe, self.sizes, setting, found)
        return {at: _replaced(live, buffers=self.buffers) for at, live in step.items()} if self.buffers else step


def put_together(
    recipe: Recipe,
    sizes: Sizes,
    states: Mapping[str, int],
    peaks: Peaks,
    setting: Setting,
    zero: dict[str, Any] | None,
    length: int | None = None,
) -> Memory:
    """The memory of a rank: states and buffers by strategy, on top of what the step itself keeps.

    Args:
        length: tokens of a row; the recipe's if not given.
        states: bytes of parameters, gradients and optimizer states where nothing is divided (DDP).
        zero: what zero_section returns.
    """
    optim, bnb = recipe.training.optim, sizes.bnb_bytes > 0
    ddp = setting.kind.replicates
    if ddp:
        # DDP's buckets are a copy of all gradients: accelerate leaves gradient_as_bucket_view off
        # (utils/dataclasses.py:188).
        buckets = dict.fromkeys(sharding.MOMENTS, states["gradients"] if setting.world_size > 1 else 0)
        if setting.world_size > 1 and not sizes.has_masters:
            # Float32 copies of the two buckets that travel (train/kahan.py, Float32Average).
            message = 2 * 4 * max(sizes.largest_trained, sharding.DDP_MESSAGE // sizes.wide)
            message = min(message, 4 * sizes.trained)
            buckets |= {moment: buckets[moment] + message for moment in ("head", "backward")}
        optimizer = sizes.bnb_bytes if bnb else states["optimizer"]
        mine = Share(states["parameters"], states["gradients"], optimizer, buckets)
    else:
        state = 8.0  # bytes per element: shards are float32, whatever the ranks compute in
        if not sizes.has_masters:
            state = KAHAN_STATES
        elif bnb and "32bit" not in optim:
            state = 2 + 8 / 256
        elif optim == "adafactor":
            state = 4.0  # a flat shard has no rows and columns to factor
        elif sizes.muon.elements:
            state = 8 - 4 * sizes.muon.elements / sizes.trained
        mine = sharding.share(
            setting.kind,
            setting.offload,
            setting.shard_size,
            sizes,
            state,
            zero,
            bf16=recipe.training.mixed_precision == "bf16",
            reshard_after_forward=setting.reshard_after_forward,
            whole_gradients=setting.keeps_whole_gradients(recipe),
        )
    # Paged states are CUDA managed memory, which torch's allocator does not count (bitsandbytes get_state_buffer).
    paged = mine.optimizer if "paged" in optim and ddp else 0
    totals: dict[str, tuple[int, Counter[str]]] = {}
    for (moment, block), live in peaks.items():
        if moment not in ("forward", "loss", "backward", "optimizer"):
            continue
        if moment == "optimizer" and not ddp:
            # The optimizer's temporaries: of this rank's shard (Muon's: of a gathered matrix), and where the states are
            # offloaded on the host.
            parts = 1 if sizes.muon.elements or not sizes.has_masters else setting.shard_size
            here = live["activations"] // parts if setting.offload == "none" else 0
            live = _replaced(live, activations=here)
        buffers = live["buffers"] + mine.buffers["head" if moment == "backward" and block is None else moment]
        gradients = live["gradients"] if ddp else mine.gradients
        total = mine.parameters + mine.optimizer - paged + gradients + buffers + live["activations"] + live["logits"]
        if total > totals.get(moment, (-1,))[0]:
            totals[moment] = total, _replaced(live, buffers=buffers)
    inputs, each = offloaded_inputs(recipe, sizes, setting, length)
    if setting.device_type == "cuda" and each:
        each = 1 << (each - 1).bit_length()  # as torch allocates pinned memory (ATen core/CachingHostAllocator.h)
    host = (mine.host + inputs * each) * setting.nproc_per_node
    if setting.device_type == "cuda":
        load, load_host = loading.peak(recipe, sizes, setting, mine)
        totals["load"] = load, Counter(buffers=load - mine.parameters)
        saving = loading.saving(recipe, sizes, setting, 8 * sizes.trained if bnb else states["optimizer"])
        host = max(host + saving, load_host * setting.nproc_per_node)
    moment = max(totals, key=lambda moment: totals[moment][0])
    peak, live = totals[moment]
    overhead = CPU_PROCESS
    if setting.device_type == "cuda":
        gaps = int(GAPS.get(setting.attn_implementation, OTHER_GAPS) * peak)
        overhead = CONTEXT + WORKSPACES + (NCCL if setting.world_size > 1 else 0) + gaps + paged
    return Memory(
        parameters=mine.parameters,
        gradients=mine.gradients,
        optimizer=mine.optimizer,
        activations=live["activations"],
        logits=live["logits"],
        buffers=live["buffers"],
        peak=peak,
        overhead=overhead,
        error=ERROR.get(setting.attn_implementation, OTHER_ERROR),
        host_per_node=host,
        moment=moment,
        peaks={moment: total for moment, (total, _) in totals.items()},
        model_parameters=sizes.parameters,
        trainable_parameters=sizes.trained,
    )


def offloaded_inputs(recipe: Recipe, sizes: Sizes, setting: Setting, length: int | None = None) -> tuple[int, int]:
    """The inputs of blocks that a rank keeps in host memory (training.activation_offloading): their number, and the
    bytes of each. Autocast leaves what passes from block to block in the dtype of the embeddings: float32 where these
    are trained."""
    if not recipe.training.activation_offloading:
        return 0, 0
    wide = setting.kind.regime(recipe.training.is_pure_bf16) == "autocast" and recipe.lora is None
    tokens = setting.micro_batch_size * (length or recipe.data.max_length)
    blocks, width = sizes.block_inputs
    return blocks, (4 if wide else sizes.low) * tokens * width


def _replaced(live: Counter[str], **kinds: int) -> Counter[str]:
    """`live` with other values. Counter(live, **kinds) would ADD them."""
    return Counter({**live, **kinds})


def zero_section(recipe: Recipe, setting: Setting, sizes: Sizes) -> dict[str, Any] | None:
    """zero_optimization in ds_config.json, as the run will have it; None where DeepSpeed is not used."""
    if setting.kind.engine != "deepspeed":
        return None
    from distft.config.batch import Batch
    from distft.strategies.deepspeed import deepspeed_config

    config = deepspeed_config(
        strategy=setting.strategy,
        offload=setting.offload,
        world_size=setting.world_size,
        device_type="cuda",
        recipe=recipe,
        batch=Batch(1, 1, 1),
        trainable_parameters=sizes.trained,
    )
    section: dict[str, Any] = config["zero_optimization"]
    return section


def bnb_state_bytes(optim: str, size: int, embedding: bool) -> int:
    """Bytes of bitsandbytes' two moments of a tensor: 8 bit with a float32 scale per 256 elements; float32 for small
    tensors (optim/optimizer.py:502) and the embedding (transformers trainer.py, GlobalOptimManager). 0 for other
    optimizers."""
    if "bnb" not in optim and "paged" not in optim:
        return 0
    return 8 * size if "32bit" in optim or embedding or size < 4096 else 2 * size + 8 * -(-size // 256)


def compute_bytes(recipe: Recipe) -> int:
    """Bytes of an element in the compute dtype."""
    return 4 if recipe.training.mixed_precision == "no" else 2


def wide_bytes(recipe: Recipe) -> int:
    """Bytes of an element of what the optimizer steps."""
    return 2 if recipe.training.is_pure_bf16 else 4


def sizes_of(recipe: Recipe, model: ModelShape) -> Sizes:
    """What there is to divide among ranks; simulation/fake_model.py counts the same on a model."""
    low, quantization, optim = compute_bytes(recipe), recipe.model.quantization, recipe.training.optim
    added = {tensor.name: sizes for tensor, sizes in _trained(recipe, model)}

    def frozen(tensor: Tensor) -> int:
        if recipe.lora is None:
            return low * tensor.size if tensor.name in model.fixed else 0
        plain = model.model_type in NOT_QUANTIZED or is_kept(model.config, module_of(tensor))
        if quantization and tensor.is_linear and not plain:
            return stored_bytes(quantization, tensor.size, tensor.shape[0], model.config)
        return low * tensor.size

    # Rows of new tokens, which are trained beside adapters.
    vocabulary = {tensor.name for tensor in vocabulary_tensors(model.tensors, model.vocab_size)}
    count = new_token_count(recipe)

    def trained_of(tensor: Tensor) -> tuple[int, ...]:
        if not recipe.lora:
            return () if tensor.name in model.fixed else (tensor.size,)
        rows = (count * tensor.shape[1],) if count and tensor.name in vocabulary else ()
        return (*added.get(tensor.name, ()), *rows)

    def unit(tensors: list[Tensor]) -> Unit:
        elements = sum(sum(trained_of(tensor)) for tensor in tensors)
        return Unit(sum(map(frozen, tensors)) + low * elements, elements)

    embedding = next((tensor for tensor in model.tensors if tensor.kind == "embedding"), None)
    tied = not any(tensor.kind == "output" for tensor in model.tensors)
    stack = blocks(model.tensors)
    first = [embedding] if embedding and not tied else []
    inside = {tensor.name for block in stack for tensor in block} | {tensor.name for tensor in first}
    modules: Counter[str] = Counter()
    for tensor in model.tensors:
        modules[tensor.name.rpartition(".")[0]] += frozen(tensor) or low * tensor.size
    everything = [size for tensor in model.tensors for size in trained_of(tensor)]
    small = sum(tensor.size for tensor in model.tensors if tensor.size < PERSISTENT)
    if recipe.lora:
        small += sum(size for size in everything if size < PERSISTENT)
        # What is added to a tied output layer is on none of the model's own tensors.
        everything += [size for tensor, sizes in _trained(recipe, model) if tensor in model.tied for size in sizes]
    return Sizes(
        parameters=model.parameters,
        frozen_bytes=sum(map(frozen, model.tensors)),
        trained=sum(everything),
        largest_trained=max(everything, default=0),
        low=low,
        largest_module=max(modules.values(), default=0),
        bnb_bytes=sum(
            bnb_state_bytes(optim, size, tensor is embedding) for tensor in model.tensors for size in trained_of(tensor)
        ),
        embedding=unit(first),
        block=max(map(unit, stack), key=lambda unit: (unit.bytes, unit.trained), default=Unit(0, 0)),
        tail=unit([tensor for tensor in model.tensors if tensor.name not in inside]),
        small_bytes=low * small,
        tied=tied,
        largest_tensor=max(tensor.size for tensor in model.tensors),
        stored_quantized=bool(disk_quantization(model.config)),
        muon=Muon.of(
            (
                tensor.shape
                for tensor in model.tensors
                if optim == "muon" and not recipe.lora and tensor.is_hidden_matrix and tensor.name not in model.fixed
            ),
            low,
        ),
        low_rank=low_rank_of(recipe, [tensor.shape for tensor in low_rank_tensors(recipe, model)]),
        wide=wide_bytes(recipe),
        block_inputs=(model.sizes.num_hidden_layers or 0, model.sizes.hidden_size or 0),
    )


def low_rank_tensors(recipe: Recipe, model: ModelShape) -> list[Tensor]:
    """The matrices that GaLore or APOLLO trains: train/low_rank.py, matrices."""
    if recipe.low_rank is None or recipe.lora:
        return []
    targets = recipe.training.optim_target_modules
    return [
        tensor
        for tensor in model.tensors
        if tensor.name not in model.fixed
        if tensor.is_linear
        if targets == "all-linear" or any(target in module_of(tensor) for target in targets)
    ]


def low_rank_of(recipe: Recipe, shapes: Iterable[tuple[int, ...]]) -> LowRank:
    """Sizes of the matrices of GaLore or APOLLO; none under another optimizer."""
    if recipe.low_rank is None:
        return LowRank()
    return LowRank.of(shapes, recipe.low_rank.rank, recipe.training.optim == "apollo_adamw")


def _trained(recipe: Recipe, model: ModelShape) -> list[Adapter]:
    return trained(recipe.lora, (*model.tensors, *model.tied), model.peft_experts) if recipe.lora else []


def buffer_bytes(recipe: Recipe, model: ModelShape) -> int:
    """Of OFT: row and column, as int64, of each element above the diagonal, in every layer."""
    oft = recipe.lora.oft if recipe.lora else None
    if recipe.lora is None or oft is None:
        return 0
    layers = adapters(recipe.lora, (*model.tensors, *model.tied), model.peft_experts)
    return sum(16 * shape_of(oft, tensor.features[0])[1] for tensor, _ in layers)


def _saved(recipe: Recipe, model: ModelShape) -> list[Tensor]:
    return saved(recipe.lora, (*model.tensors, *model.tied)) if recipe.lora else []


def _trained_shapes(recipe: Recipe, model: ModelShape) -> list[tuple[int, ...]]:
    """Shapes of the trained tensors."""
    if not recipe.lora:
        return [tensor.shape for tensor in model.tensors if tensor.name not in model.fixed]
    copies = _saved(recipe, model)
    shapes: list[tuple[int, ...]] = [tensor.shape for tensor in copies]
    for adapter in _trained(recipe, model):
        if adapter[0] not in copies:
            shapes += shapes_of(recipe.lora, adapter)
    if count := new_token_count(recipe):
        shapes += [(count, t.shape[1]) for t in vocabulary_tensors(model.tensors, model.vocab_size)]
    return shapes


def ddp_states(recipe: Recipe, sizes: Sizes, trained: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """Bytes of the states under DDP. Under autocast trained parameters are float32, and so are their gradients and
    AdamW's two moments; Muon has one of its matrices, GaLore and APOLLO have smaller ones (sharding.py). Adafactor
    keeps one mean per row and one per column of a matrix (arXiv 1804.04235). Without masters all are bf16, with a Kahan
    buffer beside AdamW's moments.

    Args:
        trained: shapes of the trained tensors.
    """
    low_rank = sizes.low_rank
    optimizer = 8 * (sizes.trained - low_rank.elements) + 4 * (low_rank.state_elements - sizes.muon.elements)
    if recipe.training.optim == "adafactor":
        optimizer = sum(4 * (sum(shape) if len(shape) == 2 else prod(shape)) for shape in trained)
    if not sizes.has_masters:
        optimizer = KAHAN_STATES * sizes.trained
    return {
        "parameters": sizes.frozen_bytes + sizes.wide * sizes.trained,
        "gradients": sizes.wide * sizes.trained,
        "optimizer": optimizer,
    }


def _peaks(recipe: Recipe, sizes: Sizes, setting: Setting, kept: Mapping[str, tuple[int, int]]) -> Peaks:
    """What the step keeps at each of its moments; see simulation/simulate.py, "Depth"."""
    wide, trained = sizes.wide, sizes.wide * sizes.trained
    earlier = trained if setting.accumulates(recipe) else 0
    first = max(earlier, wide * (sizes.tail.trained + sizes.block.trained))
    gradients = {"forward": earlier, "loss": earlier, "head": max(earlier, wide * sizes.tail.trained), "top": first}
    gradients["bottom"] = trained
    segments: dict[str, tuple[str, int | None]] = {"forward": ("forward", -1), "loss": ("loss", None)}
    segments |= {"head": ("backward", None), "top": ("backward", -1), "bottom": ("backward", 0)}
    found: dict[tuple[str, int | None], Counter[str]] = {}
    for moment, (rest, logits) in kept.items():
        found[segments[moment]] = Counter(activations=rest, logits=logits, gradients=gradients[moment])
    found["optimizer", None] = Counter(
        gradients=trained, activations=optimizer_step_bytes(recipe.training.optim, sizes)
    )
    return found


def optimizer_step_bytes(optim: str, sizes: Sizes) -> int:
    """Temporaries of an optimizer step: torch's foreach AdamW has the square roots of all second moments at once
    (torch/optim/adam.py, _multi_tensor_adam), the fused one none; Adafactor has three copies of a tensor's update."""
    if not sizes.has_masters:
        return KAHAN_STEP * min(KAHAN_CHUNK, sizes.largest_trained)
    if optim == "adamw_torch":
        return 4 * sizes.trained
    return 12 * sizes.largest_trained if optim == "adafactor" else max(sizes.muon.step_bytes, sizes.low_rank.step_bytes)
