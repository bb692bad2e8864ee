"""What runs and is unwise: slow, or more memory than it looks, or numbers that are worse than need be."""

from __future__ import annotations

from distft.rules import upstream
from distft.rules.combinations import is_bitsandbytes
from distft.rules.core import Case, rule
from distft.strategies.kinds import KINDS
from distft.units import GIB

# GB/s of a node: two links of 100 Gb/s, ZeRO++'s clusters of low bandwidth.
SLOW_LINKS = 25
# Tokens of a row from which the scores of eager attention outgrow everything else.
LONG_ROWS = 4096
# Names of layers whose weight is one where embeddings are tied (peft's EMBEDDING_LAYER_NAMES).
EMBEDDINGS = ("embed_tokens", "lm_head")


@rule(
    "zero3, fsdp or wide hsdp groups with lora between nodes of network.bandwidth < 25",
    "https://www.deepspeed.ai/tutorials/zeropp and arXiv 2306.10209: between nodes ZeRO-3's gathers are what is slow",
    "use ddp or zero2 if the model fits, else hsdp, whose groups stay inside a node",
    kind="warning",
)
def adapters_over_slow_links(case: Case) -> str | None:
    """An adapter's gradients are small, but sharding over all ranks sends the whole frozen model between the nodes
    twice in every micro-batch. Under ddp, zero2 or hsdp only what is trained crosses.
    """
    spans = case.shards_parameters and case.shard_size > case.topology.nproc_per_node
    if not (spans and case.recipe.lora and case.model and case.bandwidth and case.bandwidth < SLOW_LINKS):
        return None
    bytes_each = {"nf4": 0.516, "int8": 1}.get(case.quantization or "", 4 if case.mixed_precision == "no" else 2)
    nodes = case.topology.nnodes
    seconds = 2 * case.model.parameters * bytes_each * (nodes - 1) / nodes / (case.bandwidth * 1e9)
    return (
        f"parallelism.strategy: {case.strategy} gathers the whole model between {nodes} nodes, about {seconds:.2g} s a "
        f"micro-batch at network.bandwidth {case.bandwidth:g} GB/s"
    )


@rule(
    "parallelism.offload with model.quantization: nf4 under zero3",
    "https://github.com/huggingface/peft/blob/main/docs/source/accelerate/deepspeed.md, caveat 3",
    "use parallelism.offload: none",
    kind="warning",
)
def qlora_under_zero3_is_not_offloaded(case: Case) -> str | None:
    """peft's authors measured it: QLoRA under ZeRO-3 takes more GPU memory with offload than without."""
    if case.zero_stage == 3 and case.quantization == "nf4" and case.offload != "none":
        return f"parallelism.offload: {case.offload} makes nf4 under zero3 take more GPU memory, not less"
    return None


@rule(
    "parallelism.offload: optimizer with an adapter of at most 5% of the parameters",
    "https://github.com/huggingface/peft/blob/main/docs/source/accelerate/deepspeed.md, caveat 2; "
    "distft/planner/memory.py",
    "use parallelism.offload: none, or all (zero3) for the base model",
    kind="warning",
)
def adapters_have_little_to_offload(case: Case) -> str | None:
    """The optimizer's states of an adapter are small; on the host they save next to nothing and cost a copy both ways
    in every step.
    """
    if not (case.recipe.lora and case.offload == "optimizer" and case.model):
        return None
    share = case.model.trainable_parameters / case.model.parameters
    if share > 0.05:
        return None
    return f"parallelism.offload: only {100 * share:.2g}% of the parameters have states that optimizer could move"


@rule(
    "a training.micro_batch_size that makes several micro-batches a step, under zero3, fsdp or hsdp",
    "ZeRO, arXiv 1910.02054, section 7.2.2: two all-gathers of the weights a backward pass; "
    "https://github.com/pytorch/pytorch/pull/126166",
    "use training.micro_batch_size: auto (the largest that fits), or zero2",
    kind="warning",
)
def accumulation_repeats_gathers(case: Case) -> str | None:
    """Where parameters are sharded, every micro-batch gathers all weights, forward and backward. Accumulation under
    ddp, zero1 and zero2 costs no gathers.
    """
    asked = case.recipe.training.micro_batch_size != "auto"
    if case.shards_parameters and asked and (case.accumulation or 1) > 1 and case.topology.world_size > 1:
        return (
            f"training.micro_batch_size: {case.micro_batch_size} makes {case.accumulation} micro-batches a step, and "
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
    """ZeRO on one rank keeps everything, with DeepSpeed's buffers beside it. It is of use there only with offload."""
    if case.zero and case.topology.world_size == 1 and case.offload == "none":
        return f"parallelism.strategy: {case.strategy} on one rank shards nothing"
    return None


@rule(
    "a parallelism.hsdp_shard_size whose groups reach from node to node",
    "torch.distributed.fsdp.fully_shard docs: HSDP shards within a node and replicates across; "
    "distft/strategies/accelerate.py: groups are of neighbouring ranks",
    "use a size that divides the ranks of a node, or auto",
    kind="warning",
    for_scripts=True,
)
def hsdp_groups_stay_in_a_node(case: Case) -> str | None:
    """HSDP is for gathering weights over the fast links inside a node. A group that reaches into the next node gathers
    over the slow ones, as fsdp does, with more memory.
    """
    per_node = case.topology.nproc_per_node
    if case.kind.in_groups and case.topology.nnodes > 1 and per_node % case.shard_size:
        return f"parallelism.hsdp_shard_size: groups of {case.shard_size} cross nodes of {per_node}"
    return None


@rule(
    "a parallelism.hsdp_shard_size under another strategy than hsdp",
    "distft/strategies/accelerate.py: only hsdp has groups",
    "set parallelism.strategy: hsdp, or leave it out",
    kind="warning",
    for_scripts=True,
)
def shard_size_is_of_hsdp(case: Case) -> str | None:
    """The size of a group says nothing to the other strategies, which shard over all ranks or not at all."""
    settings = case.recipe or case.script
    asked = settings.parallelism if settings else None
    if asked and asked.hsdp_shard_size != "auto" and asked.strategy != "auto" and not KINDS[asked.strategy].in_groups:
        return f"parallelism.hsdp_shard_size: {asked.hsdp_shard_size} is not used under {asked.strategy}"
    return None


@rule(
    "training.mixed_precision: fp16 on Ampere or later",
    "NVIDIA A100 and H100 data sheets: equal peak rates in bf16 and fp16; "
    "https://huggingface.co/docs/transformers/perf_train_gpu_one",
    "use training.mixed_precision: bf16",
    kind="warning",
)
def bf16_where_it_can_be_had(case: Case) -> str | None:
    """fp16 has a small range: it needs a loss scale, and skips steps at which that was too large. bf16 is as fast from
    Ampere on and needs neither.
    """
    capability = case.device.compute_capability
    if case.mixed_precision == "fp16" and capability is not None and capability >= 8:
        return f"training.mixed_precision: fp16, and {case.device.name} has bf16"
    return None


@rule(
    "training.mixed_precision: fp16 with a model whose config says bfloat16",
    "https://github.com/huggingface/transformers/issues/39972 and https://github.com/openvla/openvla/issues/30",
    'watch grad_norm in metrics.jsonl, or use training.mixed_precision: "no"',
    kind="warning",
)
def bf16_models_overflow_in_fp16(case: Case) -> str | None:
    """Activations of a model that was trained in bf16 may lie beyond fp16's 65504: the loss becomes NaN, or every step
    is skipped.
    """
    dtype = case.config.get("dtype") or case.config.get("torch_dtype") or case.whole_config.get("dtype")
    if case.mixed_precision == "fp16" and dtype == "bfloat16":
        return "training.mixed_precision: fp16, and the model's weights are bfloat16"
    return None


@rule(
    'training.mixed_precision: "no" on a GPU, without TF32',
    "NVIDIA A100 data sheet: 19.5 TFLOPS in float32, 312 in bf16",
    "use training.mixed_precision: bf16 (fp16 before Ampere)",
    kind="warning",
)
def float32_wastes_a_gpu(case: Case) -> str | None:
    """In float32 a GPU's tensor cores stand idle and everything takes twice the memory. What is trained is kept in
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
def int8_is_slow_before_turing(case: Case) -> str | None:
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
def paging_needs_a_gpu(case: Case) -> str | None:
    """Paging moves states between GPU and host. Where they lie on the host anyway bitsandbytes leaves it out."""
    if case.optim.startswith("paged") and (case.on_cpu or (case.zero and case.offload != "none")):
        return f"training.optim: {case.optim} does not page what lies in host memory"
    return None


@rule(
    "model.attn_implementation: eager with rows of 4096 tokens or more, where sdpa can be had",
    "transformers 5.23 models/llama/modeling_llama.py:193, eager_attention_forward",
    "use model.attn_implementation: auto",
    kind="warning",
)
def eager_attention_keeps_all_scores(case: Case) -> str | None:
    """Eager attention writes down a score for every pair of tokens and head, twice, and keeps them for the backward
    pass: memory grows with the square of max_length. SDPA and FlashAttention do not.
    """
    attention, longest = case.recipe.model.attn_implementation, case.recipe.data.max_length
    has_better = case.model_type not in upstream.NO_SDPA | upstream.NO_SDPA_FROM_5_21
    if attention == "eager" and longest >= LONG_ROWS and has_better:
        return f"model.attn_implementation: eager with rows of {longest} tokens"
    return None


@rule(
    "lora.target_modules with embed_tokens or lm_head, where these are one weight",
    "https://github.com/huggingface/peft/issues/2777; peft 0.21 tuners/tuners_utils.py:671 and :1457",
    "leave it out of lora.target_modules",
    kind="warning",
)
def tied_embeddings_are_not_adapted(case: Case) -> str | None:
    """Where input and output embeddings are one weight, an adapter on one of them makes them two: it cannot be merged,
    and other formats than peft's lose it.
    """
    lora = case.recipe.lora
    if not lora or lora.target_modules == "all-linear" or not (case.model and case.model.sizes.tie_word_embeddings):
        return None
    named = [name for name in lora.target_modules if name.rpartition(".")[2] in EMBEDDINGS]
    return f"lora.target_modules: {', '.join(named)}, and the model's embeddings are tied" if named else None


@rule(
    "an 8-bit optimizer for an adapter, where it saves less than 0.5 GiB",
    "https://huggingface.co/docs/bitsandbytes/optimizers: float32 states below 4096 elements; distft/planner/memory.py",
    "use adamw_torch_fused",
    kind="warning",
)
def adapters_gain_little_from_8_bit(case: Case) -> str | None:
    """8-bit optimizers save six bytes a trained parameter. Of an adapter that is little, and its states lose digits for
    it.
    """
    if not (case.recipe.lora and case.model and is_bitsandbytes(case.optim) and "8bit" in case.optim):
        return None
    saved = 6 * case.model.trainable_parameters / GIB
    return f"training.optim: {case.optim} saves {saved:.2f} GiB of an adapter" if saved < 0.5 else None
