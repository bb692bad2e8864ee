"""What cannot be combined: named rules, each a small function with its source.

A rule gets a Case and returns a message with the mend, or None. All that a case breaks are reported at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distft.devices import Device
from distft.errors import PlanError
from distft.recipe import Recipe
from distft.topology import Topology


@dataclass(frozen=True)
class Case:
    """One combination to check. `recipe` is None for a script of one's own."""

    strategy: str
    offload: str
    shard_size: int
    topology: Topology
    device: Device
    recipe: Recipe | None = None
    head_dim: int | None = None

    @property
    def fsdp(self) -> bool:
        return self.strategy in ("fsdp", "hsdp")


@dataclass(frozen=True)
class Rule:
    name: str
    source: str
    check: Callable[[Case], str | None]
    needs_recipe: bool


RULES: list[Rule] = []


def rule(source: str, needs_recipe: bool = True) -> Callable:
    """Register the function below under its name."""

    def register(check: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
        RULES.append(Rule(check.__name__.replace("_", "-"), source, check, needs_recipe))
        return check

    return register


def apply(case: Case) -> None:
    """Check a case against every rule.

    Raises:
        PlanError: what it breaks, a line each, with the rule's name.
    """
    broken = [
        f"{message} [{rule.name}]"
        for rule in RULES
        if (case.recipe or not rule.needs_recipe) and (message := rule.check(case))
    ]
    if broken:
        raise PlanError("\n".join(broken))


@rule("peft: a quantised weight has no gradient (https://huggingface.co/docs/peft/developer_guides/quantization)")
def quantization_needs_lora(case: Case) -> str | None:
    if case.recipe.model.quantization and not case.recipe.lora:
        return (
            f"model.quantization: {case.recipe.model.quantization} weights cannot be trained; add `lora:` or remove it"
        )
    return None


@rule('LlamaFactory quantization.py:199: "Only 4-bit quantized model can use fsdp+qlora"')
def int8_cannot_be_sharded(case: Case) -> str | None:
    if case.recipe.model.quantization == "int8" and (case.fsdp or case.strategy == "zero3"):
        return (
            f"model.quantization: int8 weights cannot be sharded by {case.strategy}; "
            "use nf4, or parallelism.strategy ddp, zero1 or zero2"
        )
    return None


@rule("DeepSpeed runtime/zero/offload_config.py: offload_param is ZeRO-3's; ddp keeps everything", needs_recipe=False)
def offload_needs_a_strategy_that_can(case: Case) -> str | None:
    allowed = {"optimizer": ("zero1", "zero2", "zero3"), "all": ("zero3", "fsdp", "hsdp")}.get(case.offload)
    if allowed and case.strategy not in allowed:
        return f"parallelism.offload: {case.offload} needs {' or '.join(allowed)}, not {case.strategy}"
    return None


@rule('accelerate: "Cannot access accelerator device when none is available"', needs_recipe=False)
def fsdp_offload_needs_a_gpu(case: Case) -> str | None:
    if case.fsdp and case.offload != "none" and case.device.type == "cpu":
        return f"parallelism.offload: {case.strategy} offloads from a GPU, and there is none; use none, or zero3"
    return None


@rule("DeepSpeed engine.py: ZeRO-Offload wants DeepSpeedCPUAdam; 8-bit and factored states live on the GPU")
def offload_needs_adamw(case: Case) -> str | None:
    optim = case.recipe.training.optim
    if (
        case.offload != "none"
        and case.strategy.startswith("zero")
        and optim not in ("adamw_torch_fused", "adamw_torch")
    ):
        return f"training.optim: {optim} cannot be offloaded; use adamw_torch_fused, or parallelism.offload: none"
    return None


@rule("axolotl validation.py: FSDP2 + adamw_bnb_8bit is refused; bitsandbytes' states are no DTensors")
def fsdp_needs_adamw(case: Case) -> str | None:
    optim = case.recipe.training.optim
    if case.fsdp and ("8bit" in optim or "paged" in optim):
        return f"training.optim: {optim} does not work under {case.strategy}; use adamw_torch_fused"
    return None


@rule("transformers Adafactor.step: row and column means need whole matrices; ZeRO flattens them, FSDP2 cuts them")
def adafactor_needs_whole_matrices(case: Case) -> str | None:
    if case.recipe.training.optim == "adafactor" and case.strategy != "ddp":
        return f"training.optim: adafactor does not work under {case.strategy}; use ddp, or adamw_torch_fused"
    return None


@rule("torch.distributed.device_mesh: (replicate, shard) needs both sizes over 1", needs_recipe=False)
def hsdp_needs_whole_groups(case: Case) -> str | None:
    world = case.topology.world_size
    if case.strategy != "hsdp":
        return None
    if world % case.shard_size:
        return f"parallelism.hsdp_shard_size: {world} ranks cannot be split into groups of {case.shard_size}"
    if case.shard_size == world:
        return (
            f"parallelism.strategy: hsdp needs at least two groups, and its {world} ranks make one of "
            f"{case.shard_size}; use fsdp, or a smaller parallelism.hsdp_shard_size"
        )
    return None


@rule("NVIDIA CUDA programming guide: bf16 arithmetic from compute capability 8.0 (Ampere)")
def bf16_needs_ampere(case: Case) -> str | None:
    if case.recipe.training.mixed_precision == "bf16" and (case.device.compute_capability or 8) < 8:
        return f"training.mixed_precision: {case.device.name} has no bf16; use fp16"
    return None


@rule("transformers TrainingArguments: fp16 mixed precision needs an accelerator")
def fp16_needs_a_gpu(case: Case) -> str | None:
    if case.recipe.training.mixed_precision == "fp16" and case.device.type == "cpu":
        return 'training.mixed_precision: fp16 needs a GPU, and there is none; use bf16 or "no"'
    return None


@rule("flash-attn README: Ampere or later, fp16 or bf16, head_dim up to 256")
def flash_attention_needs(case: Case) -> str | None:
    if case.recipe.model.attn_implementation != "flash_attention_2":
        return None
    why = None
    if case.device.type == "cpu":
        why = "a GPU, and there is none"
    elif (case.device.compute_capability or 8) < 8:
        why = f"an Ampere GPU or later, and this is {case.device.name}"
    elif case.recipe.training.mixed_precision == "no":
        why = "bf16 or fp16, and training.mixed_precision is no"
    elif (case.head_dim or 0) > 256:
        why = f"head_dim <= 256, and the model's is {case.head_dim}"
    return why and f"model.attn_implementation: flash_attention_2 needs {why}; use auto or sdpa"


@rule("liger-kernel: Triton kernels")
def liger_needs_a_gpu(case: Case) -> str | None:
    if case.recipe.training.use_liger_kernel and case.device.type == "cpu":
        return "training.use_liger_kernel: needs a GPU, and there is none; use false"
    return None
