"""Strategy, offload, optimizer, precision, quantization and device: what cannot be combined."""

from __future__ import annotations

from distft.models.attention import AMPERE, FLASH, has_dropout, largest_head
from distft.models.lora import module_of
from distft.models.packing import NO_ATTENTION
from distft.rules.core import Case, RecipeCase, look, rule
from distft.strategies.kinds import that_offload


def is_bitsandbytes(optim: str) -> bool:
    """Whether an optimizer, in transformers' names, is one of bitsandbytes'."""
    return any(word in optim for word in ("bnb", "paged", "adamw_8bit", "ademamix", "lion")) and "galore" not in optim


def is_muon(case: RecipeCase) -> bool:
    return case.optim == "muon"


def compiles(case: RecipeCase) -> bool:
    return case.recipe.training.compile


def is_low_rank(case: RecipeCase) -> bool:
    return case.recipe.low_rank is not None


@rule(
    "model.quantization without lora",
    "transformers 5.23 trainer_utils.py:131, validate_quantization_for_training",
    "add `lora:`, or remove model.quantization",
)
def quantization_needs_lora(case: RecipeCase) -> str | None:
    """A quantized weight has no gradient; only adapters on top of it can be trained."""
    if case.quantization and not case.recipe.lora:
        return f"model.quantization: {case.quantization} weights cannot be trained"
    return None


@rule(
    "model.quantization: int8 under zero3, fsdp or hsdp",
    "bitsandbytes 0.50 nn/modules.py:1159, Linear8bitLt.init_8bit_state; LlamaFactory quantization.py:199",
    "use nf4, or parallelism.strategy ddp, zero1 or zero2",
)
def int8_cannot_be_sharded(case: RecipeCase) -> str | None:
    """bitsandbytes keeps int8 weights a second time, in a state of the layer that no strategy knows about. Under ZeRO-3
    every rank therefore holds all of them (seen with deepspeed 0.19.8 on 2 ranks: the losses are right, but no memory
    is saved). Under FSDP2 the parameter becomes a DTensor, and the first forward pass fails: 'Parameter' object has no
    attribute 'CB'.
    """
    if case.quantization == "int8" and case.shards_parameters:
        return f"model.quantization: {case.strategy} cannot shard int8 weights"
    return None


@rule(
    "lora.use_dora with model.quantization: int8",
    "seen with peft 0.21.2 and bitsandbytes 0.50.2; peft docs/source/accelerate/fsdp.md, caveat 5: 8-bit QDoRA has "
    "known issues and is not recommended",
    "use model.quantization: nf4, or lora.use_dora: false",
)
def int8_has_no_dora(case: RecipeCase) -> str | None:
    """To measure the weights, DoRA dequantizes them (peft tuners/lora/dora.py, update_layer), which removes the scale
    of LLM.int8() from the layer. The first forward pass fails: 'NoneType' object has no attribute 'unsqueeze'. DoRA on
    4-bit weights works.
    """
    if case.quantization == "int8" and case.recipe.lora and case.recipe.lora.use_dora:
        return "lora.use_dora: does not work on int8 weights"
    return None


@rule(
    "training.train_only with lora",
    "distft/train/model.py, add_adapters: beside adapters the model is frozen",
    "write lora: null, or leave training.train_only out",
)
def train_only_needs_no_lora(case: RecipeCase) -> str | None:
    """Adapters are trained instead of the model's own weights. training.train_only names those of the model's own that
    are trained, so it would have no effect.
    """
    return "training.train_only: got both it and lora" if case.recipe.lora and case.recipe.training.train_only else None


@rule(
    "training.train_only with reentrant gradient checkpointing",
    "torch utils/checkpoint.py: None of the inputs have requires_grad=True. Gradients will be None; axolotl's "
    "utils/schemas/validation.py refuses unfrozen_parameters with it",
    "leave trainer.overrides.gradient_checkpointing_kwargs out",
)
def train_only_needs_plain_checkpointing(case: RecipeCase) -> str | None:
    """Reentrant checkpointing looks only at the inputs of a block. Where all below it is frozen these need no gradient,
    and the trained weights in the block would get none.
    """
    if not case.recipe.training.train_only or case.gradient_checkpointing is False:
        return None
    if look(case.trainer, "gradient_checkpointing_kwargs", "use_reentrant"):
        return "trainer.overrides.gradient_checkpointing_kwargs: use_reentrant trains nothing above frozen layers"
    return None


@rule(
    "training.activation_offloading without gradient checkpointing",
    "distft/train/offload.py: it moves the inputs of checkpointed blocks; a block without checkpointing keeps some 25 "
    "times as much (planner/activations.txt, llama)",
    "use training.gradient_checkpointing: true",
)
def activation_offloading_needs_checkpointing(case: RecipeCase) -> str | None:
    """What goes to the host is what gradient checkpointing keeps: the input of each block. Without checkpointing, a
    block keeps every intermediate result, and the bus would take longer than the GPU to compute them anew.
    """
    if case.recipe.training.activation_offloading and case.gradient_checkpointing is False:
        return "training.activation_offloading: got true, and training.gradient_checkpointing is false"
    return None


@rule(
    "parallelism.offload: optimizer without ZeRO; all without zero3, fsdp or hsdp",
    "DeepSpeed runtime/zero/offload_config.py: offload_param is for ZeRO-3; DDP keeps everything on the GPU",
    "use a strategy that can, or parallelism.offload: none",
    for_scripts=True,
)
def offload_needs_a_strategy_that_can(case: Case) -> str | None:
    """ZeRO offloads optimizer states at every stage, and parameters at stage 3. FSDP2 offloads parameters, gradients
    and optimizer states together; DDP offloads nothing.
    """
    allowed = that_offload(case.offload)
    if case.strategy not in allowed:
        return f"parallelism.offload: {case.offload} needs {' or '.join(allowed)}, not {case.strategy}"
    return None


@rule(
    "parallelism.offload under fsdp or hsdp on CPU ranks",
    'seen with accelerate 1.15 and torch 2.13: "Cannot access accelerator device when none is available"',
    "use parallelism.offload: none, or zero3",
    for_scripts=True,
)
def fsdp_offload_needs_a_gpu(case: Case) -> str | None:
    """FSDP2's CPUOffloadPolicy copies between an accelerator and the host, and fails where there is no accelerator."""
    if case.fsdp and case.offload != "none" and case.on_cpu:
        return f"parallelism.offload: {case.strategy} offloads from a GPU, and there is none"
    return None


@rule(
    "one of bitsandbytes' optimizers under fsdp or hsdp",
    "seen with torch 2.13 and bitsandbytes 0.50.2: bitsandbytes.optimizer_update_32bit does not have a "
    "sharding strategy registered; axolotl validation.py refuses adamw_bnb_8bit under FSDP2",
    "use adamw_torch_fused",
)
def fsdp_needs_adamw(case: RecipeCase) -> str | None:
    """FSDP2's parameters are DTensors, which bitsandbytes' kernels do not accept. 8-bit, 32-bit and paged optimizers
    all fail at the first step.
    """
    if case.fsdp and is_bitsandbytes(case.optim):
        return f"training.optim: {case.optim} does not work under {case.strategy}"
    return None


@rule(
    "adafactor, GaLore or APOLLO under any strategy but ddp",
    "transformers optimization.py, Adafactor.step: row and column means; seen with torch 2.13: aten.add_.Tensor got "
    "mixed torch.Tensor and DTensor; LlamaFactory refuses GaLore and APOLLO under DeepSpeed",
    "use ddp, or adamw_torch_fused",
)
def matrix_optimizers_need_whole_matrices(case: RecipeCase) -> str | None:
    """Adafactor keeps one number per row and one per column; GaLore and APOLLO project a matrix onto a few directions.
    ZeRO gives them flat pieces: of these Adafactor keeps every number, and scales by the piece, which makes it another
    optimizer, whose steps depend on the world size. FSDP2 gives them DTensors, on which they fail.
    """
    if case.optim.startswith(("adafactor", "galore", "apollo")) and not case.kind.replicates:
        return f"training.optim: {case.optim} needs whole matrices, which {case.strategy} splits"
    return None


@rule(
    "training.optim: galore_adamw or apollo_adamw with lora",
    "arXiv 2403.03507 and 2412.05270 (full-parameter training); LlamaFactory finetuning_args.py refuses it, too",
    "use adamw_torch_fused, or train the model's own weights with lora: null",
)
def low_rank_optimizers_need_the_models_matrices(case: RecipeCase) -> str | None:
    """The two factors of an adapter are as thin as the gradients that these optimizers make: nothing is saved."""
    is_one = is_low_rank(case) and case.recipe.lora
    return f"training.optim: {case.optim} is for the model's own matrices" if is_one else None


@rule(
    "training.optim: galore_adamw or apollo_adamw where no linear layer is trained by it",
    "distft/train/low_rank.py, matrices",
    "name parts of names in training.optim_target_modules, or use adamw_torch_fused",
)
def low_rank_optimizers_need_a_layer(case: RecipeCase) -> str | None:
    """What they do not train has AdamW, with its whole moments. A part of a name that is in none was mistyped."""
    training = case.recipe.training
    if not is_low_rank(case) or case.recipe.lora:
        return None
    targets = training.optim_target_modules
    names = [module_of(t) for t in case.model.tensors if t.is_linear and t.name not in case.model.fixed]
    if targets == "all-linear":
        return None if names else f"training.optim: {case.optim} has no linear layer to train"
    unused = [target for target in targets if not any(target in name for name in names)]
    return f"training.optim_target_modules: got {unused[0]}, which is in no name of such a layer" if unused else None


@rule(
    "training.optim_args or training.optim_target_modules with another optimizer than galore_adamw and apollo_adamw",
    "distft/train/low_rank.py, which alone reads them",
    "leave it out",
)
def optim_args_are_of_low_rank_optimizers(case: RecipeCase) -> str | None:
    """An option that nobody reads would be taken for a setting. So would APOLLO's scale_type with GaLore."""
    training = case.recipe.training
    if is_low_rank(case):
        other = training.optim == "galore_adamw" and training.optim_args and training.optim_args.scale_type == "tensor"
        return "training.optim_args.scale_type: galore_adamw has none" if other else None
    given = {"optim_args": training.optim_args, "optim_target_modules": training.optim_target_modules != "all-linear"}
    return next((f"training.{name}: {case.optim} has none" for name, value in given.items() if value), None)


@rule(
    "training.optim: muon under zero1, zero2 or zero3",
    "DeepSpeed 0.19.8 runtime/zero/stage3.py, _apply_muon_to_accumulated_grads (the norm keeps being taken over the "
    "Muon update), and runtime/zero/muon/original_muon.py (gram, in float16)",
    "use ddp, fsdp or hsdp",
)
def muon_is_not_for_zero(case: RecipeCase) -> str | None:
    """Muon needs the whole matrix of an update, and ZeRO gives the optimizer flat pieces of all. DeepSpeed has a Muon
    of its own, whose steps are others: it iterates in float16 on Gram matrices, and stage 3 clips by the norm of what
    comes out of the iteration, not of the gradient.
    """
    return (
        f"training.optim: muon does not train the same under {case.strategy}" if case.zero and is_muon(case) else None
    )


@rule(
    "training.optim: muon with parallelism.offload",
    "torch distributed/fsdp/_fully_shard: CPUOffloadPolicy steps on the host, where NCCL gathers nothing",
    "use parallelism.offload: none, or adamw_torch_fused",
)
def muon_needs_its_states_on_the_gpu(case: RecipeCase) -> str | None:
    """Each step gathers the update of every matrix from all ranks and iterates on it in bf16. On the host the ranks
    could not gather it, and the iteration would take minutes.
    """
    if is_muon(case) and case.offload != "none":
        return f"training.optim: muon does not work with parallelism.offload: {case.offload}"
    return None


@rule(
    "training.optim: muon with lora",
    "torch/optim/_muon.py: an optimizer for 2D parameters of neural network hidden layers; LLaMA-Factory's v1 "
    "muon_optimizer.py gives adapters to AdamW",
    "use adamw_torch_fused, or train the model's own weights with lora: null",
)
def muon_needs_the_models_matrices(case: RecipeCase) -> str | None:
    """Muon makes the update of a layer's matrix orthogonal. An adapter has two thin factors instead of that matrix, and
    to make the update of each orthogonal says nothing about their product.
    """
    return "training.optim: muon is for the model's own matrices" if is_muon(case) and case.recipe.lora else None


@rule(
    "training.master_weights: none with lora",
    "distft/train/model.py, add_adapters: the base is frozen, in 16 bit; float32 are the adapters alone",
    "write lora: null, or leave training.master_weights out",
)
def master_weights_none_needs_no_lora(case: RecipeCase) -> str | None:
    """Beside adapters the model has no master weights. Those of an adapter are a hundredth of it, so that nothing would
    be saved.
    """
    if case.recipe.training.is_pure_bf16 and case.recipe.lora:
        return "training.master_weights: none is for the model's own weights"
    return None


@rule(
    "training.master_weights: none with training.mixed_precision: fp16 or no",
    "torch/amp/grad_scaler.py, _unscale_grads_: Attempting to unscale FP16 gradients; float32 weights are masters",
    "use training.mixed_precision: bf16",
)
def master_weights_none_needs_bf16(case: RecipeCase) -> str | None:
    """fp16 has too few exponents for weights that are trained and gradients that are added up. In float32 there is
    nothing to leave out.
    """
    if case.recipe.training.is_pure_bf16 and case.mixed_precision != "bf16":
        return f"training.master_weights: none does not work with mixed_precision {case.mixed_precision}"
    return None


@rule(
    "training.master_weights: none with another optimizer than torch's AdamW",
    "distft/train/kahan.py: Kahan summation is a part of the optimizer's step",
    "use training.optim: adamw_torch_fused, or training.master_weights: float32",
)
def master_weights_none_needs_adamw(case: RecipeCase) -> str | None:
    """In bf16 most steps at fine-tuning's learning rates are smaller than half of a weight's last digit. The optimizer
    must keep what is rounded off; torch's, transformers' and bitsandbytes' do not, and would train next to nothing.
    """
    if case.recipe.training.is_pure_bf16 and case.optim not in ("adamw_torch_fused", "adamw_torch"):
        return f"training.master_weights: none needs AdamW, not {case.optim}"
    return None


@rule(
    "training.master_weights: none with parallelism.offload under ZeRO",
    "DeepSpeed 0.19.8 runtime/zero/stage3.py:300 and stage_1_and_2.py:332: requires Offload with DeepSpeedCPUAdam",
    "use parallelism.offload: none, or fsdp with offload: all",
)
def master_weights_none_is_not_offloaded_by_zero(case: RecipeCase) -> str | None:
    """With 16-bit masters DeepSpeed offloads for its own DeepSpeedCPUAdam alone, which does not keep what bf16 rounds
    off.
    """
    if case.recipe.training.is_pure_bf16 and case.zero and case.offload != "none":
        return (
            f"training.master_weights: none does not work with parallelism.offload: {case.offload} of {case.strategy}"
        )
    return None


@rule(
    "a layerwise optimizer on several ranks, or with gradient accumulation",
    "transformers 5.23 trainer_optimizer.py:117 (does not support DDP) and :166 (does not support gradient "
    "accumulation)",
    "use the optimizer without _layerwise, or one rank and one micro-batch per step",
)
def layerwise_optimizers_need_one_rank(case: RecipeCase) -> str | None:
    """A layerwise optimizer steps inside the backward pass, weight by weight, before gradients could be averaged over
    ranks or summed over micro-batches.
    """
    if case.optim.endswith("_layerwise") and (case.topology.world_size > 1 or (case.accumulation or 1) > 1):
        return f"trainer.overrides.optim: {case.optim} needs one rank and one micro-batch per step"
    return None


@rule(
    "zero_force_ds_cpu_optimizer: true with offload and an optimizer other than AdamW",
    "accelerate 1.15 utils/deepspeed.py:29, map_pytorch_optim_to_deepspeed; DeepSpeed runtime/engine.py:2341",
    "leave zero_force_ds_cpu_optimizer out, or use adamw_torch_fused",
)
def forced_cpu_adam_needs_adamw(case: RecipeCase) -> str | None:
    """With zero_force_ds_cpu_optimizer (DeepSpeed's default; distft writes false) accelerate replaces the optimizer of
    a ZeRO-Offload run with DeepSpeedCPUAdam. Anything but AdamW in 32 bit silently becomes Adam with coupled weight
    decay.
    """
    forced = case.zero and case.offload != "none" and case.deepspeed.get("zero_force_ds_cpu_optimizer")
    if forced and case.optim not in ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"):
        return f"deepspeed.overrides.zero_force_ds_cpu_optimizer: {case.optim} would be replaced with Adam"
    return None


@rule(
    "hsdp with groups that do not divide the ranks, or with only one group",
    "torch.distributed.device_mesh: (replicate, shard) needs both sizes over 1",
    "use fsdp, or a parallelism.hsdp_shard_size that makes two groups or more",
    for_scripts=True,
)
def hsdp_needs_whole_groups(case: Case) -> str | None:
    """HSDP shards within groups of ranks and replicates across them. The group size must divide the ranks, and there
    must be at least two groups.
    """
    world = case.topology.world_size
    if not case.kind.in_groups:
        return None
    if world % case.shard_size:
        return f"parallelism.hsdp_shard_size: {world} ranks cannot be split into groups of {case.shard_size}"
    if case.shard_size == world:
        return f"parallelism.strategy: hsdp needs at least two groups, and {world} ranks make one of {case.shard_size}"
    return None


@rule(
    "training.mixed_precision: bf16 on a V100, a T4 or older",
    "NVIDIA CUDA programming guide: bf16 arithmetic from compute capability 8.0; torch.cuda.is_bf16_supported also "
    "counts emulation",
    "use training.mixed_precision: fp16",
)
def bf16_needs_ampere(case: RecipeCase) -> str | None:
    """GPUs before Ampere have no bf16 arithmetic. torch emulates it there, so transformers and DeepSpeed, which ask
    torch, no longer refuse it: the run would be far slower than in fp16, and nothing would tell why.
    """
    if case.mixed_precision == "bf16" and case.before_ampere:
        return f"training.mixed_precision: {case.device.name} has no bf16"
    return None


@rule(
    "training.mixed_precision: fp16 on CPU ranks",
    "accelerate 1.15 accelerator.py:565: no autocast and no gradient scaler where the device is a CPU",
    'use training.mixed_precision: bf16 or "no"',
    for_scripts=True,
)
def fp16_needs_a_gpu(case: Case) -> str | None:
    """On CPU ranks accelerate silently leaves out fp16's autocast and gradient scaler. Full fine-tuning would run in
    float32, and adapters in fp16, where small gradients become zero.
    """
    if case.mixed_precision == "fp16" and case.on_cpu:
        return "training.mixed_precision: fp16 needs a GPU, and there is none"
    return None


@rule(
    "flash_attention_2 or 3 on a V100, a T4 or a CPU, varlen on the GPUs, flash_attention_4 before Hopper, 3 or 4 "
    "on a newer GPU than they have kernels for, or flex_attention on a CPU",
    "flash-attn README: Ampere, Ada or Hopper GPUs; transformers 5.23 modeling_flash_attention_utils.py, "
    "FLASH_ATTENTION_COMPATIBILITY_MATRIX; torch 2.13 nn/attention/flex_attention.py: no backward pass on CPUs",
    "use model.attn_implementation: auto or sdpa",
)
def flash_attention_needs_ampere(case: RecipeCase) -> str | None:
    """FlashAttention-2's and 3's kernels are written for compute capability 8.0 and later, FlashAttention-4's for 9.0;
    varlen runs the former on GPUs, on CPUs it runs SDPA. For older GPUs there is SDPA's memory-efficient kernel.
    """
    if case.attention == "flex_attention" and case.on_cpu:
        return "model.attn_implementation: flex_attention needs a GPU, and there is none"
    least, capability = case.flash.least, case.device.compute_capability
    if case.needs_flash_kernels and capability is not None and capability >= case.flash.below:
        return f"model.attn_implementation: {case.attention} has no kernels for a GPU as new as {case.device.name}"
    if not case.needs_flash_kernels or not (case.on_cpu or (capability is not None and capability < least)):
        return None
    have = "there is none" if case.on_cpu else f"this is {case.device.name}"
    kind = "an Ampere" if least == AMPERE else "a Hopper"
    return f"model.attn_implementation: {case.attention} needs {kind} GPU or later, and {have}"


@rule(
    'flash_attention_2, 3 or 4, or varlen on a GPU, with training.mixed_precision: "no"',
    "flash-attn README: fp16 and bf16; transformers integrations/flash_attention.py:13, get_target_dtype",
    "use model.attn_implementation: auto or sdpa, or training.mixed_precision: bf16",
)
def flash_attention_needs_16_bit(case: RecipeCase) -> str | None:
    """FlashAttention has no float32 kernel. transformers casts its input to autocast's dtype, and with
    mixed_precision "no" there is no autocast.
    """
    if case.needs_flash_kernels and case.mixed_precision == "no":
        return f"model.attn_implementation: {case.attention} needs bf16 or fp16, and training.mixed_precision is no"
    return None


@rule(
    "flash_attention_2 or 3, or varlen on a GPU, with a head_dim over 256, or flash_attention_4 with one over 128",
    "flash-attn README: head dimensions up to 256; flash_attn/cute/interface.py: up to 128",
    "use model.attn_implementation: auto or sdpa",
)
def flash_attention_needs_small_heads(case: RecipeCase) -> str | None:
    """FlashAttention-2 and 3 have kernels for heads of up to 256, FlashAttention-4 of up to 128."""
    size, most = max(case.model.head_dim or 0, largest_head(case.whole_config)), case.flash.largest_head
    if case.needs_flash_kernels and size > most:
        found = f"needs heads of up to {most}, and the model has some of {size}"
        return f"model.attn_implementation: {case.attention} {found}"
    return None


@rule(
    "flash_attention_3 or 4 with a model that has dropout in attention",
    "flash-attn hopper/flash_attn_interface.py and flash_attn/cute/interface.py: no dropout",
    "use model.attn_implementation: auto, flash_attention_2 or sdpa",
)
def new_flash_attention_has_no_dropout(case: RecipeCase) -> str | None:
    """Of FlashAttention, only the second version has dropout, which config.json may ask for: the others would train
    without it."""
    if case.attention in FLASH and not case.flash.dropout and has_dropout(case.whole_config):
        return f"model.attn_implementation: {case.attention} has no dropout, and config.json asks for it in attention"
    return None


@rule(
    "training.compile under zero3",
    "seen with deepspeed 0.19.8 and torch 2.13: dynamo traces the hooks of runtime/zero/parameter_offload.py (hit "
    "config.recompile_limit, function: 'wrapped_fn'); a first step of two tiny blocks took over two minutes",
    "use fsdp, or training.compile: false",
)
def compile_is_not_for_zero3(case: RecipeCase) -> str | None:
    """ZeRO-3 gathers the weights of every single layer in hooks inside of a block: what lies between two of them is
    one layer, with nothing to fuse, and torch's compiler compiles the hooks themselves again and again until it gives
    up. FSDP2 gathers a block at a time, outside of what is compiled.
    """
    return f"training.compile: does not work under {case.strategy}" if compiles(case) and case.zero_stage == 3 else None


@rule(
    "training.compile with nf4 under fsdp or hsdp",
    "seen with bitsandbytes 0.50.2 and torch 2.13: Failed to mutate tensor data attribute (nn/modules.py, "
    "Params4bit.__new__): 73 graph breaks in two tiny blocks, and no graph at all with gradient checkpointing",
    "use ddp, zero1 or zero2, or training.compile: false",
)
def compile_needs_whole_nf4_layers(case: RecipeCase) -> str | None:
    """A quantized layer makes a new parameter of the weight that FSDP2 has gathered for it, which torch's compiler
    cannot trace: each layer ends the graph. With gradient checkpointing, where a block has to be one graph, the block
    then runs uncompiled.
    """
    if compiles(case) and case.quantization == "nf4" and case.fsdp:
        return f"training.compile: cannot trace nf4 layers under {case.strategy}"
    return None


@rule(
    "training.compile with int8 or DoRA and gradient checkpointing",
    "seen with bitsandbytes 0.50.2, peft 0.21 and torch 2.13 in two tiny blocks: nothing was compiled",
    "use training.gradient_checkpointing: false, or training.compile: false",
)
def compile_needs_layers_that_can_be_traced(case: RecipeCase) -> str | None:
    """With gradient checkpointing a block has to be one graph. int8 layers change their state and DoRA's cannot be
    traced, so that the block runs uncompiled.
    """
    if not compiles(case) or not case.gradient_checkpointing:
        return None
    if case.quantization == "int8":
        return "training.compile: cannot trace int8 layers with gradient checkpointing"
    if case.recipe.lora and case.recipe.lora.use_dora:
        return "training.compile: cannot trace DoRA's layers with gradient checkpointing"
    return None


@rule(
    "training.compile with training.activation_offloading",
    "seen with torch 2.13 in two tiny blocks: nothing was compiled; distft/train/offload.py",
    "leave one of them out",
)
def compile_needs_inputs_on_the_gpu(case: RecipeCase) -> str | None:
    """What saves a block's input in host memory cannot be traced, so that the block runs uncompiled."""
    both = compiles(case) and case.recipe.training.activation_offloading
    return "training.compile: cannot trace blocks with training.activation_offloading" if both else None


@rule(
    "training.compile with a model of recurrences alone, such as Mamba",
    "seen with transformers 5.23 and torch 2.13: a first step of two tiny Mamba blocks, with rows of up to 64 tokens, "
    "took 68 s; models/mamba/modeling_mamba.py, slow_forward",
    "use training.compile: false",
)
def compile_unrolls_recurrences(case: RecipeCase) -> str | None:
    """Without kernels of its own a recurrence is a loop over the tokens, which torch's compiler unrolls: a graph as
    long as the row, and another one for each length. With them, most of the block is a kernel already.
    """
    is_recurrent = case.model_type in NO_ATTENTION
    return f"training.compile: {case.model_type} loops over tokens" if compiles(case) and is_recurrent else None


@rule(
    "training.use_liger_kernel on CPU ranks",
    "https://github.com/linkedin/Liger-Kernel, README: Triton kernels, for CUDA and ROCm",
    "use training.use_liger_kernel: false",
)
def liger_needs_a_gpu(case: RecipeCase) -> str | None:
    """Liger's kernels are written in Triton, which compiles for GPUs only."""
    if case.recipe.training.use_liger_kernel and case.on_cpu:
        return "training.use_liger_kernel: needs a GPU, and there is none"
    return None


@rule(
    "gradient checkpointing with lora or training.train_only under zero3, unless it is reentrant",
    "https://github.com/deepspeedai/DeepSpeed/pull/8148 and https://github.com/huggingface/transformers/issues/47254; "
    "fixed in 0.19.4 (runtime/zero/partitioned_param_coordinator.py:389)",
    "install deepspeed>=0.19.4, use zero2, or set trainer.overrides: {gradient_checkpointing_kwargs: "
    "{use_reentrant: true}}",
    versions=["deepspeed<0.19.4"],
)
def zero3_frees_frozen_weights_too_early(case: RecipeCase) -> str | None:
    """ZeRO-3 before 0.19.4 frees a block's frozen weights while the block is recomputed and torch's non-reentrant
    checkpointing still compares them: CheckpointError, shape [0]. From 0.19.4 on, both kinds of checkpointing give the
    losses of a single process (seen with 0.19.8 on 2 ranks, every weight partitioned), so distft does not force the
    reentrant one, as trl does.
    """
    reentrant = look(case.trainer, "gradient_checkpointing_kwargs", "use_reentrant")
    frozen = case.recipe.lora or case.recipe.training.train_only
    if case.zero_stage == 3 and frozen and case.gradient_checkpointing and not reentrant:
        return "training.gradient_checkpointing: fails with frozen weights under zero3 of this deepspeed"
    return None
