"""How long a step takes: a first-order model, for choosing between candidates and for a rough idea of hours and price.

compute = FLOPs / (what the GPU's matmuls achieve x the part of it that training reaches). A step is compute plus
communication, of which a part OVERLAP of the shorter one is hidden. Every figure is an estimate; the rate of an earlier
run can replace it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from distft.config.recipe import Recipe
from distft.hardware.devices import Device, Gpu, data_sheet
from distft.models.architecture import Sizes as ModelSizes
from distft.models.layout import Tensor
from distft.models.lora import adapters
from distft.models.oft import blocks_of
from distft.models.shapes import ModelShape
from distft.planner import communication
from distft.planner.activations import needs_mask
from distft.planner.communication import Communication, Links
from distft.planner.memory import offloaded_inputs
from distft.planner.setting import Setting
from distft.planner.sharding import Sizes

# The matmul rate that can be reached where none was measured, as a part of the data sheet's (A100 0.87, H100 0.80, B200
# 0.78).
ACHIEVABLE = 0.8
# The part of it that a training step reaches is 1 / (MATMULS + MEMORY x FLOP per byte of memory bandwidth): beside the
# matmuls there is what waits for memory. H100: 402 of 794.5 TFLOP/s with Llama-3-8B and LoRA (NeMo Automodel's
# performance summary). A100: 7,075 tokens/s with Llama-3.2-3B (torchtune's ladder, before compile).
MATMULS, MEMORY = 1.38, 0.0026
# The part of that which ranks reach that gather each block's parameters: 316 and 301 TFLOP/s with 70B and 32B on 8 H100
# (NeMo), and 5,762 tokens/s with 8B (torchtitan).
GATHERING = 0.8
# Speed with compiled blocks over that without: 6,667 of 5,762 and 6,514 of 5,605 tokens/s with 8B on 8 and 128 H100
# (torchtitan). torchtune's 8,998 of 7,075 with 3B on an A100 is more; its loss is compiled, too.
COMPILED = 1.16
# Bytes of memory traffic for each NF4 weight that a pass dequantizes: Llama-3.1-8B with 4,096 tokens on a 4090 at 2,413
# of 3,083 tokens/s, Llama-3.2-3B with 8,192 on an A100 at 8,035 of 8,210 (torchtune) make 17 and 5. int8 is a guess.
NF4_TRAFFIC, INT8 = 8, 0.6
# SDPA's time with a mask, which no flash kernel accepts, over its time without: 3,247 and 2,483 tokens/s with rows of
# 4,096, 3,083 and 1,918 with 8,192 (https://github.com/huggingface/transformers/issues/30461), if it was an 8B model.
MASKED = 4.4
# The part of the shorter of compute and communication that is hidden; the rest is added. IDEFICS-80B on 512 A100: 11 +
# 18 s predicted, 49 s measured (ml-engineering), so this is not pessimistic.
OVERLAP = 0.7
# GB/s per rank under offload: PCIe 4 x16, and host memory, in which AdamW reads and writes 28 bytes per element
# (DeepSpeed's CPUAdam: 1 to 2 s for 10 billion elements on a whole node, docs/_tutorials/zero-offload).
PCIE, HOST_MEMORY = 25.0, 20.0
# Bytes for an element: operands and results of the kernels of train/kahan.py, added up; not measured on a GPU.
KAHAN_TRAFFIC = 370
# A pass over a block launches some 40 kernels at 5 microseconds each: small models wait for the CPU.
LAUNCH_SECONDS = 40 * 5e-6


@dataclass(frozen=True)
class Speed:
    """Of one optimizer step. None: the rates of GPU or network are unknown."""

    step_seconds: float | None
    tokens_per_second_per_gpu: float | None
    assumed_mfu: float | None  # model FLOP/s over the data sheet's; what checkpointing repeats does not count
    flops_per_token: float
    communication: Communication


def flops_per_token(recipe: Recipe, model: ModelShape, sizes: Sizes) -> float:
    """Model FLOPs per trained token. For each weight that multiplies it: 2 forward and 4 backward, or 2 backward if the
    weight is frozen (LoRA, training.train_only: no weight gradients). For attention: scores and values over half of the
    row, and twice that backward (PaLM, arXiv 2204.02311, appendix B). That nothing goes back below the lowest trained
    layer is not counted: such a step takes less."""
    s = model.sizes
    used = {t.name: _used(t, s) for t in model.tensors if len(t.shape) > 1 and t.kind != "embedding"}
    if sizes.tied and s.vocab_size and s.hidden_size:
        embedding = next((tensor.name for tensor in model.tensors if tensor.kind == "embedding"), "")
        used[embedding] = s.vocab_size * s.hidden_size
    matmul = sum(used.values())
    trained = sum(size for name, size in used.items() if name not in model.fixed)
    weights = 4 * matmul + (6 * _multiplied(recipe, model, sizes) if recipe.lora else 2 * trained)
    return weights + _attention(recipe, s)


def _attention(recipe: Recipe, s: ModelSizes) -> float:
    if not (s.num_attention_heads and s.head_dim and s.num_hidden_layers):
        return 0.0
    length = min(recipe.data.max_length, s.sliding_window or recipe.data.max_length)
    return 3 * 2 * length * s.num_attention_heads * s.head_dim * s.num_hidden_layers


def _multiplied(recipe: Recipe, model: ModelShape, sizes: Sizes) -> int:
    """Elements of adapters that a token is multiplied with. OFT trains less than half of its matrices' elements."""
    found, lora = sizes.trained, recipe.lora
    if lora and lora.oft:
        for tensor, (size,) in adapters(lora, (*model.tensors, *model.tied), model.peft_experts):
            width = tensor.features[0]
            found += width * blocks_of(lora.oft, width)[1] - size
    return found


def _used(tensor: Tensor, s: ModelSizes) -> float:
    """Elements of a weight that a token is multiplied with."""
    if tensor.kind == "experts" and s.experts:
        return tensor.size * s.experts.num_experts_per_tok / s.experts.num_experts
    return tensor.size


def estimate(
    recipe: Recipe,
    model: ModelShape,
    sizes: Sizes,
    setting: Setting,
    accumulation: int,
    device: Device,
    links: Links | None,
    per_token: float,
    measured: float | None = None,
) -> Speed:
    """The speed of a step of `accumulation` micro-batches.

    Args:
        per_token: what flops_per_token returns.
        measured: FLOP/s of a rank in an earlier run, as if it had not been compiled.
    """
    sent = communication.per_step(sizes, setting, accumulation, links, setting.keeps_whole_gradients(recipe))
    gpu = data_sheet(device.name)
    if measured:
        rate = measured
    elif gpu and sent.seconds is not None:
        rate = achievable(gpu, recipe) * reached(gpu, recipe, setting)
    else:
        return Speed(None, None, None, per_token, sent)
    peak = gpu and 1e12 * (gpu.float32_tflops if recipe.training.mixed_precision == "no" else gpu.tflops)
    tokens = setting.micro_batch_size * recipe.data.max_length
    again = checkpointing_factor(recipe.lora is not None, setting.gradient_checkpointing)
    layers = model.num_hidden_layers or 0
    launches = layers * LAUNCH_SECONDS * (4 if setting.gradient_checkpointing else 3)
    work = per_token / (compiled_factor(recipe) if gpu else 1.0)
    # `auto` has a mask only where the ranks have no other kernel; a measured rate has the mask in it.
    asked = recipe.model.attn_implementation == setting.attn_implementation == "sdpa"
    if asked and needs_mask(recipe, setting) and not measured:
        work += (MASKED - 1) * _attention(recipe, model.sizes)
    compute = accumulation * max(tokens * work * again / rate, launches if gpu else 0.0)
    if gpu and recipe.model.quantization == "nf4" and not measured:
        passes = 3 if setting.gradient_checkpointing else 2
        weights = sum(tensor.size for tensor in model.tensors if tensor.is_linear)
        compute += accumulation * passes * NF4_TRAFFIC * weights / (gpu.memory_bandwidth * 1e12)
    sending = sent.seconds or 0.0
    step = max(compute, sending) + (1 - OVERLAP) * min(compute, sending)
    step += _offload_seconds(sizes, setting, accumulation)
    step += accumulation * 2 * prod(offloaded_inputs(recipe, sizes, setting)) / (PCIE * 1e9)
    # Ranks share Muon's matrices among them, those of one copy where there are several.
    step += sizes.muon.flops / (setting.world_size if setting.kind.replicates else setting.shard_size) / rate
    if gpu:
        step += optimizer_traffic(sizes) * sizes.trained / setting.shard_size / (gpu.memory_bandwidth * 1e12)
    step_tokens = tokens * accumulation
    return Speed(step, step_tokens / step, step_tokens * per_token / step / peak if peak else None, per_token, sent)


def achievable(gpu: Gpu, recipe: Recipe) -> float:
    """FLOP/s of a GPU's matmuls in the recipe's precision."""
    if recipe.training.mixed_precision == "no":
        return 1e12 * gpu.float32_tflops
    return 1e12 * (gpu.measured_tflops or ACHIEVABLE * gpu.tflops)


def reached(gpu: Gpu, recipe: Recipe, setting: Setting) -> float:
    """The part of the matmuls' rate that training reaches."""
    part = 1 / (MATMULS + MEMORY * achievable(gpu, recipe) / (gpu.memory_bandwidth * 1e12))
    if setting.kind.shards_parameters and setting.shard_size > 1:
        part *= GATHERING
    return part * (INT8 if recipe.model.quantization == "int8" else 1.0)


def checkpointing_factor(lora: bool, gradient_checkpointing: bool) -> float:
    """FLOPs of a step with gradient checkpointing over those without. It repeats the forward pass: a third of the FLOPs
    of full fine-tuning, half of LoRA's."""
    return (1.5 if lora else 4 / 3) if gradient_checkpointing else 1.0


def optimizer_traffic(sizes: Sizes) -> int:
    """Bytes of memory traffic for each element of an optimizer's step: AdamW's one kernel reads and writes parameter,
    gradient and two moments; the Kahan one has a kernel for each operation (train/kahan.py)."""
    return 28 if sizes.has_masters else KAHAN_TRAFFIC


def compiled_factor(recipe: Recipe) -> float:
    """FLOP/s on a GPU with training.compile over those without."""
    return COMPILED if recipe.training.compile else 1.0


def _offload_seconds(sizes: Sizes, setting: Setting, accumulation: int) -> float:
    if setting.offload == "none":
        return 0.0
    mine = sizes.trained / setting.shard_size
    seconds = optimizer_traffic(sizes) * mine / (HOST_MEMORY * 1e9) + 6 * mine / (PCIE * 1e9)
    if not setting.kind.shards_parameters and accumulation > 1:
        # Sums of gradients are kept on the host, and are fetched and written back in every micro-batch (DeepSpeed
        # stage_1_and_2.py, async_accumulate_grad_in_cpu_via_gpu).
        seconds += accumulation * 2 * sizes.low * mine / (PCIE * 1e9)
    if setting.offload == "all":
        seconds += 2 * accumulation * sizes.gathered_bytes / setting.shard_size / (PCIE * 1e9)
    return seconds
