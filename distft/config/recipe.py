"""The recipe: WHAT is trained. It never names a machine.

Frozen pydantic groups; the docstring under a field is its documentation: `distft schema` and docs/recipe.md are made
from it (wording.documented_schema). What a field means on its own is checked here; what cannot be combined is in
planner/rules/.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
# A name becomes a folder, a job name and a word of a shell command: no separators, no leading dash or dot.
RunName = Annotated[
    str,
    StringConstraints(pattern=r"^\w[\w.-]*$", max_length=100),
    Field(json_schema_extra={"x-pattern": "of letters, digits, `.`, `_` and `-`, not starting with `.` or `-`"}),
]

# Of each line at most one is set: an override of one replaces what the file has for another.
EXCLUSIVE_FIELDS = (("training.max_steps", "training.num_train_epochs"),)

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"]
Optim = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adafactor",
]


class Group(BaseModel):
    """What all groups share: no unknown keys, no change after loading, no coercion of a string into a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


class Model(Group):
    """The base model."""

    name_or_path: NonEmpty
    """A folder in the transformers layout (relative to the recipe's folder), or a hub id."""

    revision: str | None = None
    """Branch, tag or commit of a hub id. Pin a commit for runs that must be repeatable."""

    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """`auto` takes FlashAttention-2 where it can be imported and GPU and dtype allow it, else SDPA, and says which."""

    quantization: Literal["nf4", "int8"] | None = None
    """`nf4` is QLoRA's 4-bit NormalFloat with double quantisation, `int8` is LLM.int8(). Both need `lora`."""

    pad_token: str | None = None
    """The token to pad with, for a tokenizer that has none. Padding is masked and never trained on."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for a source that you trust."""


class Lora(Group):
    """Low-rank adapters (peft). `lora: null` trains all weights."""

    r: PositiveInt = 16
    """Rank of the adapters."""

    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the adapter's output is multiplied by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""

    lora_dropout: Fraction = 0.0
    """Dropout before the adapter. Above 0 the losses differ slightly from width to width: each rank draws its own."""

    target_modules: Literal["all-linear"] | Annotated[list[NonEmpty], Field(min_length=1)] = "all-linear"
    """`all-linear` (every linear layer but the output layer), or the ends of module names: `[q_proj, v_proj]`."""

    use_rslora: bool = False
    """Rank-stabilised LoRA: scale by 1 / sqrt(r)."""

    use_dora: bool = False
    """DoRA: magnitude and direction apart. Better at a low rank, slower."""

    start_from: NonEmpty | None = None
    """Folder of a peft adapter to start from instead of a fresh one: its weights alone. Optimizer, schedule and data
    begin anew. (All weights: name their folder in model.name_or_path.)"""


class Data(Group):
    """The training data."""

    train: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    """File (.jsonl, .json, .csv, .parquet), folder of such files, or hub id (`owner/name` or `owner/name:split`);
    or a list of them. Paths are relative to the recipe's folder. Data that is not on this machine is a warning of
    `plan`, `validate` and `render`; `launch` refuses it only where it would read it from here."""

    eval: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Held-out data, same forms. Its loss is measured before and after training, and every `training.eval_steps`."""

    format: Literal["auto", "messages", "prompt_completion", "text"] = "auto"
    """`messages`: chat template, loss on the assistant's turns; `prompt_completion`: loss on the completion; `text`:
    loss on every token. `auto` goes by the first row's fields."""

    max_length: Annotated[int, Field(ge=8, le=10**8)] = 2048
    """Tokens in a row, and in a packed row."""

    packing: bool = True
    """Put several rows into one of max_length tokens; attention does not cross from one to the next."""

    long_rows: Literal["error", "truncate", "drop", "split"] = "error"
    """What happens to rows longer than max_length. Always said, with their number. `split` is for `text` only."""

    chat_template: NonEmpty | None = None
    """A file with a Jinja chat template, for a tokenizer that has none (or to use another). A template with
    `{% generation %}` marks says itself which tokens are trained on. `launch` needs it on this machine."""


class Training(Group):
    """Optimisation."""

    global_batch_size: PositiveInt = 32
    """Sequences (packed rows with packing) per optimizer step over the WHOLE job. The same at every width."""

    micro_batch_size: Literal["auto"] | PositiveInt = "auto"
    """Sequences per GPU and forward pass. `auto` takes the largest that fits (docs/design.md, "micro-batch")."""

    max_steps: PositiveInt | None = None
    """Optimizer steps. Instead of num_train_epochs."""

    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data, rounded up to a whole optimizer step. 1 when max_steps is not given either."""

    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Peak learning rate. `auto`: 2e-4 with LoRA, 2e-5 without."""

    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Schedule after warm-up."""

    warmup_ratio: Fraction = 0.03
    """Part of the steps over which the learning rate rises from 0."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; not applied to biases and norms."""

    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip gradients to this global norm; 0 turns clipping off."""

    optim: Optim = "adamw_torch_fused"
    """Optimizer, in transformers' names. The 8-bit and paged ones are bitsandbytes'."""

    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """`bf16` needs Ampere or later (or a CPU), `fp16` a GPU; `no` is float32 throughout."""

    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass. `auto`: only where one sequence would not fit without."""

    use_liger_kernel: bool = False
    """Fused kernels of liger-kernel (a CUDA GPU and the package are needed)."""

    eval_steps: PositiveInt | None = None
    """Measure the eval loss every so many steps, besides before and after."""

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the data order and of fresh weights."""

    report_to: list[NonEmpty] = []
    """Trackers, in transformers' names: tensorboard, wandb, mlflow, ..."""


class Parallelism(Group):
    """How the states are sharded. Changes where the numbers lie, never the maths."""

    strategy: Literal["auto"] | Strategy = "auto"
    """`ddp` replicates; `zero1`/`zero2`/`zero3` shard optimizer states / and gradients / and parameters (DeepSpeed);
    `fsdp` shards all three (FSDP2); `hsdp` shards within groups and replicates across them."""

    offload: Literal["auto", "none", "optimizer", "all"] = "auto"
    """What is kept in host memory: the optimizer's states (ZeRO), or parameters too (zero3, fsdp, hsdp). `auto` is
    `none`, unless `strategy` is `auto` too and nothing fits without offload."""

    hsdp_shard_size: Literal["auto"] | Annotated[int, Field(ge=2)] = "auto"
    """Ranks that share one copy of the model under hsdp. `auto`: those of one node."""


class Checkpoint(Group):
    """What is kept while training runs."""

    save_steps: PositiveInt | None = None
    """Write checkpoints/step-N every so many steps: what a run needs to go on."""

    save_total_limit: PositiveInt | None = None
    """Keep only the newest so many of them."""


class Overrides(Group):
    """Values laid over what distft generates, for what it has no field for. `distft rules` lists what is refused."""

    overrides: dict[str, Any] = {}
    """Nested keys in the owner's spelling."""


class Recipe(Group):
    """A fine-tuning recipe."""

    name: RunName
    """Name of the run: letters, digits, `.`, `_` and `-`."""

    model: Model
    lora: Lora | None = Lora()
    data: Data
    training: Training = Training()
    parallelism: Parallelism = Parallelism()
    checkpoint: Checkpoint = Checkpoint()

    deepspeed: Overrides = Overrides()
    """`deepspeed.overrides`: laid over the generated ds_config.json."""

    fsdp: Overrides = Overrides()
    """`fsdp.overrides`: laid over `fsdp_config` of the generated accelerate.yaml."""

    trainer: Overrides = Overrides()
    """`trainer.overrides`: laid over transformers.TrainingArguments."""

    output_dir: NonEmpty = "runs"
    """Where run directories are made; relative to the current folder."""

    @property
    def learning_rate(self) -> float:
        """The peak learning rate with `auto` resolved."""
        if self.training.learning_rate != "auto":
            return self.training.learning_rate
        return 2e-4 if self.lora else 2e-5


class ScriptTraining(Group):
    """What distft must know of a script's own training."""

    mixed_precision: Literal["bf16", "fp16", "no"] = "no"
    """What the script asks accelerate for; FSDP's and DeepSpeed's dtypes follow it."""


class ScriptSettings(Group):
    """What `--set` takes when a script of one's own runs instead of a recipe."""

    name: RunName
    training: ScriptTraining = ScriptTraining()
    parallelism: Parallelism = Parallelism()
    deepspeed: Overrides = Overrides()
    fsdp: Overrides = Overrides()
    output_dir: NonEmpty = "runs"
