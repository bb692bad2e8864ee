"""What runs but is unwise: slow, or more memory than it seems, or worse numbers than necessary."""

from __future__ import annotations

from distft.models import oft
from distft.models.attention import plain_attention
from distft.models.freezing import without_gradient
from distft.models.lora import adapters, module_of, saved
from distft.models.packing import BY_STATE
from distft.models.quantization import stored_bytes
from distft.models.vocabulary import vocabulary_tensors
from distft.rules.combinations import is_bitsandbytes, is_muon
from distft.rules.core import Case, RecipeCase, rule
from distft.strategies.kinds import KINDS
from distft.units import GIB

# GB/s of a node: two links of 100 Gb/s, the low-bandwidth clusters of ZeRO++.
SLOW_LINKS = 25
# Tokens per row above which the scores of eager attention outgrow everything else.
LONG_ROWS = 4096
# Names of layers that share one weight where embeddings are tied (peft's EMBEDDING_LAYER_NAMES).
EMBEDDINGS = ("embed_tokens", "lm_head")


@rule(
    "zero3, fsdp or hsdp groups across nodes, with lora and network.bandwidth < 25",
    "https://www.deepspeed.ai/tutorials/zeropp and arXiv 2306.10209: between nodes ZeRO-3's gathers are what is slow",
    "use ddp or zero2 if the model fits, else hsdp with groups within a node",
    kind="warning",
)
def adapters_over_slow_links(case: RecipeCase) -> str | None:
    """The gradients of an adapter are small, but sharding over all ranks sends the whole frozen model between the nodes
    twice in every micro-batch. Under ddp, zero2 or hsdp only what is trained crosses.
    """
    spans = case.shards_parameters and case.shard_size > case.topology.nproc_per_node
    if not (spans and case.recipe.lora and case.bandwidth and case.bandwidth < SLOW_LINKS):
        return None
    elements, nodes = case.model.parameters, case.topology.nnodes
    size = (4 if case.mixed_precision == "no" else 2) * elements
    if case.quantization:
        size = stored_bytes(case.quantization, elements, rows=0)
    seconds = 2 * size * (nodes - 1) / nodes / (case.bandwidth * 1e9)
    return (
        f"parallelism.strategy: {case.strategy} gathers the whole model across {nodes} nodes, about {seconds:.2g} s "
        f"per micro-batch at network.bandwidth {case.bandwidth:g} GB/s"
    )


@rule(
    "parallelism.offload with model.quantization: nf4 under zero3",
    "https://github.com/huggingface/peft/blob/main/docs/source/accelerate/deepspeed.md, caveat 3",
    "use parallelism.offload: none",
    kind="warning",
)
def offload_costs_memory_under_zero3_with_nf4(case: RecipeCase) -> str | None:
    """Measured by peft's authors: QLoRA under ZeRO-3 takes more GPU memory with offload than without."""
    if case.zero_stage == 3 and case.quantization == "nf4" and case.offload != "none":
        return f"parallelism.offload: {case.offload} makes nf4 under zero3 take more GPU memory, not less"
    return None


@rule(
    "training.optim: adamw_torch with parallelism.offload",
    "benchmarks/host_adamw.py: 9 times the time of the fused one",
    "use adamw_torch_fused",
    kind="warning",
)
def plain_adamw_steps_slowly_on_the_host(case: RecipeCase) -> str | None:
    """Offloaded states are stepped by the CPU, where torch's plain AdamW passes over them once for each of its
    operations.
    """
    if case.offload != "none" and case.optim == "adamw_torch":
        return "training.optim: adamw_torch steps slowly in host memory"
    return None


@rule(
    "parallelism.offload: optimizer with an adapter of at most 5% of the parameters",
    "https://github.com/huggingface/peft/blob/main/docs/source/accelerate/deepspeed.md, caveat 2; "
    "distft/planner/memory.py",
    "use parallelism.offload: none, or all (zero3) for the base model",
    kind="warning",
)
def adapters_have_little_to_offload(case: RecipeCase) -> str | None:
    """The optimizer states of an adapter are small; moving them to the host saves next to nothing and costs a copy in
    each direction at every step.
    """
    if not (case.recipe.lora and case.offload == "optimizer"):
        return None
    share = case.model.trainable_parameters / case.model.parameters
    if share > 0.05:
        return None
    return f"parallelism.offload: only {100 * share:.2g}% of the parameters have optimizer states to move"


@rule(
    "a training.micro_batch_size that needs several micro-batches per step, under zero3, fsdp or hsdp",
    "ZeRO, arXiv 1910.02054, section 7.2.2: two all-gathers of the weights per backward pass; "
    "https://github.com/pytorch/pytorch/pull/126166",
    "use training.micro_batch_size: auto (the largest that fits), or zero2",
    kind="warning",
)
def accumulation_repeats_gathers(case: RecipeCase) -> str | None:
    """Where parameters are sharded, every micro-batch gathers all weights, forward and backward. Under ddp, zero1 and
    zero2 gradient accumulation costs no gathers.
    """
    asked = case.recipe.training.micro_batch_size != "auto"
    if case.shards_parameters and asked and (case.accumulation or 1) > 1 and case.topology.world_size > 1:
        return (
            f"training.micro_batch_size: {case.micro_batch_size} makes {case.accumulation} micro-batches per step, and "
            f"{case.strategy} gathers all weights in each"
        )
    return None


@rule(
    "zero1, zero2 or zero3 on one rank without offload",
    "DeepSpeed partitions over the data-parallel ranks (runtime/zero/stage_1_and_2.py, partition_count)",
    "use parallelism.strategy: ddp, or auto",
    kind="warning",
    for_scripts=True,
)
def one_rank_has_nothing_to_shard(case: Case) -> str | None:
    """ZeRO on one rank keeps everything, plus DeepSpeed's buffers. There it is useful only with offload."""
    if case.zero and case.topology.world_size == 1 and case.offload == "none":
        return f"parallelism.strategy: {case.strategy} on one rank shards nothing"
    return None


@rule(
    "a parallelism.hsdp_shard_size whose groups span nodes",
    "torch.distributed.fsdp.fully_shard docs: HSDP shards within a node and replicates across; "
    "distft/strategies/accelerate.py: groups are of neighbouring ranks",
    "use a size that divides the ranks of a node, or auto",
    kind="warning",
    for_scripts=True,
)
def hsdp_groups_stay_in_a_node(case: Case) -> str | None:
    """HSDP is meant to gather weights over the fast links within a node. A group that reaches into the next node
    gathers over the slow ones, as fsdp does, but takes more memory.
    """
    per_node = case.topology.nproc_per_node
    if case.kind.in_groups and case.topology.nnodes > 1 and per_node % case.shard_size:
        return f"parallelism.hsdp_shard_size: groups of {case.shard_size} span nodes of {per_node}"
    return None


@rule(
    "a parallelism.hsdp_shard_size under a strategy other than hsdp",
    "distft/strategies/accelerate.py: only hsdp has groups",
    "set parallelism.strategy: hsdp, or leave it out",
    kind="warning",
    for_scripts=True,
)
def shard_size_is_for_hsdp(case: Case) -> str | None:
    """The size of a group means nothing to the other strategies, which shard over all ranks or not at all."""
    asked = case.settings.parallelism
    if asked.hsdp_shard_size != "auto" and asked.strategy != "auto" and not KINDS[asked.strategy].in_groups:
        return f"parallelism.hsdp_shard_size: {asked.hsdp_shard_size} is not used under {asked.strategy}"
    return None


@rule(
    "training.mixed_precision: fp16 on Ampere or later",
    "NVIDIA A100 and H100 data sheets: equal peak rates in bf16 and fp16; "
    "https://huggingface.co/docs/transformers/perf_train_gpu_one",
    "use training.mixed_precision: bf16",
    kind="warning",
)
def bf16_where_the_gpu_has_it(case: RecipeCase) -> str | None:
    """fp16 has a small range: it needs a loss scale, and skips the steps at which that was too large. From Ampere on,
    bf16 is as fast and needs neither.
    """
    capability = case.device.compute_capability
    if case.mixed_precision == "fp16" and capability is not None and capability >= 8:
        return f"training.mixed_precision: got fp16, and {case.device.name} has bf16"
    return None


@rule(
    "training.mixed_precision: fp16 with a model whose config says bfloat16",
    "https://github.com/huggingface/transformers/issues/39972 and https://github.com/openvla/openvla/issues/30",
    'watch grad_norm in metrics.jsonl, or use training.mixed_precision: "no"',
    kind="warning",
)
def bf16_models_overflow_in_fp16(case: RecipeCase) -> str | None:
    """Activations of a model that was trained in bf16 may exceed fp16's 65504: the loss becomes NaN, or every step is
    skipped.
    """
    dtype = case.config.get("dtype") or case.config.get("torch_dtype") or case.whole_config.get("dtype")
    if case.mixed_precision == "fp16" and dtype == "bfloat16":
        return "training.mixed_precision: got fp16, and the model's weights are bfloat16"
    return None


@rule(
    'training.mixed_precision: "no" on a GPU, without TF32',
    "NVIDIA A100 data sheet: 19.5 TFLOPS in float32, 312 in bf16",
    "use training.mixed_precision: bf16 (fp16 before Ampere)",
    kind="warning",
)
def float32_wastes_a_gpu(case: RecipeCase) -> str | None:
    """In float32 a GPU's tensor cores are idle, and everything takes twice the memory. The trained weights are kept in
    float32 under bf16 too.
    """
    if case.mixed_precision == "no" and not case.on_cpu and case.trainer.get("tf32") is not True:
        return f"training.mixed_precision: no is float32, many times slower on {case.device.name}"
    return None


@rule(
    "model.quantization: int8 on a V100 or older",
    "bitsandbytes 0.50 diagnostics/cuda.py:128: 7.5 is the minimum CC for int8 tensor cores",
    "use model.quantization: nf4",
    kind="warning",
)
def int8_is_slow_before_turing(case: RecipeCase) -> str | None:
    """LLM.int8() multiplies on int8 tensor cores, which GPUs have from compute capability 7.5 on; on a V100 it is
    slower than 16 bit.
    """
    if case.quantization == "int8" and (case.device.compute_capability or 8) < 7.5:
        return f"model.quantization: {case.device.name} has no int8 tensor cores"
    return None


@rule(
    "a paged optimizer on CPU ranks, or under ZeRO-Offload",
    "bitsandbytes 0.50 optim/optimizer.py:376: Paged optimizers are not supported on CPU",
    "use the optimizer without paged_",
    kind="warning",
)
def paging_needs_a_gpu(case: RecipeCase) -> str | None:
    """Paging moves states between GPU and host. Where they are in host memory anyway, bitsandbytes does not page."""
    if case.optim.startswith("paged") and (case.on_cpu or (case.zero and case.offload != "none")):
        return f"training.optim: {case.optim} does not page states that are in host memory"
    return None


@rule(
    "training.optim: muon with a mixture whose experts are one 3-D parameter",
    "distft/train/muon.py, matrices; transformers 5: experts.gate_up_proj",
    "use adamw_torch_fused, or know that most of the weights have AdamW",
    kind="warning",
)
def muon_leaves_experts_to_adamw(case: RecipeCase) -> str | None:
    """Muon is for matrices. The experts of a layer are a parameter of three dimensions, so that AdamW trains them, with
    two states.
    """
    experts = sum(tensor.size for tensor in case.model.tensors if tensor.kind == "experts")
    return f"training.optim: muon leaves {experts:,} weights of experts to AdamW" if is_muon(case) and experts else None


@rule(
    "training.master_weights: none with a mixture that chooses experts by a bias",
    "distft/train/model.py, build_model; transformers 5.23 keeps such a bias in float32 for 16 of 34 classes "
    "(_keep_in_fp32_modules_strict)",
    "compare the loss before training with that of master_weights: float32",
    kind="warning",
)
def biases_that_choose_experts_are_rounded(case: RecipeCase) -> str | None:
    """The whole model is loaded in bf16, and so are biases that no gradient reaches: rounded, they may choose other
    experts. ZeRO casts them with float32 masters, too.
    """
    found = without_gradient(tensor.name for tensor in case.model.tensors)
    if case.recipe.training.is_pure_bf16 and found:
        return f"training.master_weights: none loads {len(found)} biases that choose experts in bf16"
    return None


@rule(
    "training.optim: muon where no matrix of a hidden layer is trained",
    "distft/train/muon.py, matrices",
    "use adamw_torch_fused, or name such a layer in training.train_only",
    kind="warning",
)
def muon_needs_a_matrix(case: RecipeCase) -> str | None:
    """AdamW trains embeddings, the output layer, norms and biases under Muon, too."""
    if not is_muon(case):
        return None
    fixed = case.model.fixed
    if any(tensor.is_hidden_matrix and tensor.name not in fixed for tensor in case.model.tensors):
        return None
    return "training.optim: muon has no matrix to train: all that is trained has AdamW"


@rule(
    "model.attn_implementation: eager with rows of 4096 tokens or more, where sdpa is available",
    "transformers 5.23 models/llama/modeling_llama.py:193, eager_attention_forward",
    "use model.attn_implementation: auto",
    kind="warning",
)
def eager_attention_keeps_all_scores(case: RecipeCase) -> str | None:
    """Eager attention stores a score for every pair of tokens and every head, twice, until the backward pass: memory
    grows with the square of max_length. SDPA and FlashAttention do not.
    """
    attention, longest = case.recipe.model.attn_implementation, case.recipe.data.max_length
    if attention == "eager" and longest >= LONG_ROWS and plain_attention(case.model_type) != "eager":
        return f"model.attn_implementation: got eager, with rows of {longest} tokens"
    return None


@rule(
    "lora.target_modules with embed_tokens or lm_head, where these share one weight",
    "https://github.com/huggingface/peft/issues/2777; peft 0.21 tuners/tuners_utils.py:671 and :1457",
    "leave it out of lora.target_modules",
    kind="warning",
)
def tied_embeddings_take_no_adapter(case: RecipeCase) -> str | None:
    """Where input and output embeddings share one weight, an adapter on one of them makes them differ: it cannot be
    merged, and formats other than peft's lose it.
    """
    lora = case.recipe.lora
    if not lora or lora.target_modules == "all-linear" or not case.model.sizes.tie_word_embeddings:
        return None
    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    named = [name for name in targets if name.rpartition(".")[2] in EMBEDDINGS]
    return f"lora.target_modules: got {', '.join(named)}, and the model's embeddings are tied" if named else None


@rule(
    "lora.modules_to_save with the embeddings or the output layer, where these share one weight",
    "peft 0.21.2 tuners/lora/config.py, ensure_weight_tying: false by default",
    "leave both out, put an adapter on other layers, or train all weights with lora: null",
    kind="warning",
)
def tied_embeddings_come_apart(case: RecipeCase) -> str | None:
    """peft trains a copy of each layer that is named, and the other one stays as it is: two weights where the model has
    one. The adapter loads with peft; it cannot be merged.
    """
    lora, model = case.recipe.lora, case.model
    if not lora or not model.sizes.tie_word_embeddings:
        return None
    named = [t for t in saved(lora, (*model.tensors, *model.tied)) if t.kind in ("embedding", "output")]
    layers = " and ".join(module_of(tensor) for tensor in vocabulary_tensors(named, model.vocab_size))
    if not layers:
        return None
    share = (
        "share one weight, of which each trains a copy" if " and " in layers else "shares its weight with the other end"
    )
    return f"lora.modules_to_save: {layers} {share}: the adapter works with peft, and cannot be merged"


@rule(
    "lora.oft with blocks that do not divide a layer's width",
    "peft 0.21.2 tuners/oft/layer.py, adjust_oft_parameters",
    "give lora.oft an oft_block_size that divides it to have the same blocks everywhere",
    kind="warning",
)
def rotations_of_another_size(case: RecipeCase) -> str | None:
    """Where the size or the number of blocks does not divide a layer's width, peft takes the nearest that does."""
    lora, model = case.recipe.lora, case.model
    if not lora or not lora.oft:
        return None
    layers = adapters(lora, (*model.tensors, *model.tied), model.peft_experts)
    for width in sorted({tensor.features[0] for tensor, _ in layers}):
        if not oft.is_exact(lora.oft, width):
            blocks, size = oft.blocks_of(lora.oft, width)
            asked = oft.blocks_in_words(lora.oft)
            return f"lora.oft: a layer of width {width} has {blocks} blocks of {size}, where {asked} were asked for"
    return None


@rule(
    "an 8-bit optimizer for an adapter, where it saves less than 0.5 GiB",
    "https://huggingface.co/docs/bitsandbytes/optimizers: float32 states below 4096 elements; distft/planner/memory.py",
    "use adamw_torch_fused",
    kind="warning",
)
def adapters_gain_little_from_8_bit(case: RecipeCase) -> str | None:
    """8-bit optimizers save six bytes per trained parameter. For an adapter that is little, and its states lose digits
    for it.
    """
    if not (case.recipe.lora and is_bitsandbytes(case.optim) and "8bit" in case.optim):
        return None
    saved = 6 * case.model.trainable_parameters / GIB
    return f"training.optim: {case.optim} saves {saved:.2f} GiB for an adapter" if saved < 0.5 else None


@rule(
    "training.compile with training.use_liger_kernel",
    "distft/train/compiled.py: tried on CPU ranks, where Liger has no kernels",
    "compare the first losses with those of a run without one of them",
    kind="warning",
)
def compile_was_not_tried_with_liger(case: RecipeCase) -> str | None:
    """Both replace a block's norms and activations with fused kernels; nobody has seen them together here."""
    both = case.recipe.training.compile and case.recipe.training.use_liger_kernel
    return "training.compile: was not tried with training.use_liger_kernel" if both else None


@rule(
    "training.compile with a model that has recurrent layers beside attention, such as Qwen3-Next or Jamba",
    "transformers 5.23, models/qwen3_next/modeling_qwen3_next.py, torch_chunk_gated_delta_rule; "
    "models/jamba/modeling_jamba.py, slow_forward",
    "install the model's kernels, or use training.compile: false",
    kind="warning",
)
def compile_may_unroll_recurrent_layers(case: RecipeCase) -> str | None:
    """Without kernels of its own such a layer is a loop over the row, which torch's compiler unrolls: the first step
    may take very long.
    """
    if not case.recipe.training.compile or case.model_type not in BY_STATE:
        return None
    return f"training.compile: {case.model_type} has recurrent layers, whose loops are unrolled without its kernels"
