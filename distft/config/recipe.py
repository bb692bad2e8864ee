"""The recipe: WHAT is trained. It never names a machine.

Frozen pydantic groups. The docstring under a field is its documentation: `distft schema` and docs/recipe.md are made
from it (schema_text.documented_schema). A field by itself is checked here; what cannot be combined is in rules/.
"""

from __future__ import annotations

import re
from math import ceil
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_serializer

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Block = Annotated[int, Field(ge=0)]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
# A name becomes a folder, a job name and an argument of shell commands: no separators, no leading dash or dot.
RunName = Annotated[
    str,
    StringConstraints(pattern=r"^\w[\w.-]*$", max_length=100),
    Field(json_schema_extra={"x-pattern": "of letters, digits, `.`, `_` and `-`, not starting with `.` or `-`"}),
]


# peft's others need data (eva, corda, lora_ga) or quantize the base in their own way (loftq).
INITIAL_WEIGHTS = r"^(gaussian|orthogonal|olora|pissa(_niter_[1-9][0-9]{0,2})?)$"
InitialWeights = Annotated[
    str,
    StringConstraints(pattern=INITIAL_WEIGHTS),
    Field(json_schema_extra={"x-pattern": "that is gaussian, orthogonal, olora, pissa or pissa_niter_N (steps)"}),
]


def run_name(text: str, otherwise: str) -> str:
    """A name for the run from any text (`my script` gives my-script), or `otherwise` where nothing is left of it."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:100] or otherwise


# At most one field of each line may be set; an override of one replaces the file's value of another.
EXCLUSIVE_FIELDS = (
    ("training.max_steps", "training.num_train_epochs"),
    ("training.warmup_steps", "training.warmup_ratio"),
    ("lora.oft.oft_block_size", "lora.oft.r"),
)
EXCLUSIVE_IN_SOURCE = ("weight", "rows", "epochs")
# The names that data.columns can map for each format, and that rows without a mapping have.
CHAT_COLUMNS = ("tools", "documents", "system", "chat_template_kwargs")
FORMAT_COLUMNS = {
    "messages": ("messages", "role", "content", *CHAT_COLUMNS),
    "sharegpt": ("messages", "role", "content", *CHAT_COLUMNS),
    "alpaca": ("instruction", "input", "output", "history", *CHAT_COLUMNS),
    "prompt_completion": ("prompt", "completion", "label", *CHAT_COLUMNS),
    "text": ("text",),
    "tokens": ("input_ids", "labels", "attention_mask"),
    "alpaca_prompt": ("instruction", "input", "output", "system", "label"),
    "alpaca_chat": ("instruction", "input", "output", "system", "label"),
}

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"]
Optim = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adafactor",
    "muon",
    "galore_adamw",
    "apollo_adamw",
]
LOW_RANK = ("galore_adamw", "apollo_adamw")
OWN_OPTIMIZERS = ("muon", *LOW_RANK)  # those that distft makes itself


class Group(BaseModel):
    """What all groups share: no unknown keys, no changes after loading, no conversion of strings into numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


class Model(Group):
    """The base model."""

    name_or_path: NonEmpty
    """A folder in the transformers layout (relative to the recipe's folder), or a hub id."""

    revision: str | None = None
    """Branch, tag or commit of a hub id. Name a commit for runs that must be reproducible."""

    attn_implementation: Literal[
        "auto",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "flex_attention",
        "varlen",
        "sdpa",
        "eager",
    ] = "auto"
    """`auto`: the newest FlashAttention that is installed and that GPU, dtype and model support; for packed rows else
    `varlen`, which is torch's own kernel for documents of a row, if GPU and model support that; else SDPA, or eager
    attention for models without it. The run's log has the choice."""

    quantization: Literal["nf4", "int8"] | None = None
    """`nf4` is QLoRA's 4-bit NormalFloat with double quantization, `int8` is LLM.int8(). Both need `lora`."""

    pad_token: str | None = None
    """Padding token, for a tokenizer that has none. Padding is masked and never trained on."""

    eos_token: NonEmpty | None = None
    """Token that ends a text, instead of the tokenizer's. It must be in the vocabulary, or in `add_tokens`."""

    add_tokens: list[NonEmpty] = []
    """Special tokens to add to the tokenizer: `["<|im_start|>", "<|im_end|>"]`. Embeddings and output layer grow where
    they have no spare rows for them; a new row starts as the mean of the rows of the pieces that its token was split
    into. With LoRA the rows of all these tokens are trained beside the adapters, those of tokens that the vocabulary
    has already too."""

    trust_remote_code: bool = False
    """Run the Python code that comes with the model. Only for sources you trust."""


class Oft(Group):
    """Orthogonal fine-tuning (peft's OFTConfig): a layer's inputs are divided into blocks, and each block is rotated by
    a trained orthogonal matrix."""

    oft_block_size: Annotated[int, Field(ge=2)] | None = None
    """Inputs in a block; larger ones train more. 32 if r is not given either. Where it does not divide a layer's
    width, peft takes the nearest size that does."""

    r: PositiveInt | None = None
    """Blocks of each layer. Instead of oft_block_size."""

    block_share: bool = False
    """One matrix for all blocks of a layer."""

    use_cayley_neumann: bool = True
    """Compute the matrices by a series: fast, and nearly orthogonal. `false`: by solving for them, exactly."""

    num_cayley_neumann_terms: Annotated[int, Field(ge=2)] = 5
    """Terms of this series."""

    coft: bool = False
    """Constrained OFT: no matrix goes further than eps from the identity. It needs parallelism.strategy: ddp."""

    eps: Positive = 6e-5
    """With coft: how far, times the root of the number of blocks."""


class Lora(Group):
    """Adapters (peft): low-rank ones (LoRA), or rotations (`oft`). `lora: null` trains all weights."""

    r: PositiveInt = 16
    """Rank of the adapters."""

    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the adapter's output is multiplied by lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)."""

    lora_dropout: Fraction = 0.0
    """Dropout on the adapter's input. Above 0 the losses differ slightly between world sizes: each rank draws its own
    masks."""

    target_modules: Literal["all-linear"] | NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] = "all-linear"
    """`all-linear` (every linear layer except the output layer), the last parts of module names: `[q_proj, v_proj]`, or
    a regular expression for whole names: `model\\.layers\\.\\d+\\.mlp\\..*`."""

    exclude_modules: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Layers without an adapter, of those that target_modules names: in the same forms, without `all-linear`."""

    layers_to_transform: Block | Annotated[list[Block], Field(min_length=1)] | None = None
    """The blocks whose layers get an adapter, by their number from 0: `[24, 25, 26, 27]`. All of them if not given."""

    rank_pattern: dict[str, PositiveInt] = {}
    """Ranks of some layers, by the last parts of their names or a regular expression for these: `{down_proj: 32,
    'layers\\.0\\..*': 8}`. Of several that match, the first counts."""

    alpha_pattern: dict[str, Positive] = {}
    """The same for lora_alpha. A rank in rank_pattern leaves lora_alpha as it is."""

    modules_to_save: list[NonEmpty] = []
    """Layers that are trained whole beside the adapters, by the last parts of their names: `[embed_tokens, lm_head]`.
    Each is a copy of the base's, as large as it, with gradients and optimizer states, and is a part of the adapter's
    file. With both embeddings and output layer here, rows of model.add_tokens are part of them."""

    use_rslora: bool = False
    """Rank-stabilized LoRA: scale by 1 / sqrt(r)."""

    use_dora: bool = False
    """DoRA: learn magnitude and direction separately. Better at low ranks, but slower."""

    init_lora_weights: Literal[True] | InitialWeights = True
    """`true`: as in LoRA's paper, so that training starts from the base; `gaussian` and `orthogonal` do, too. `pissa`
    starts from each weight's largest singular values (`pissa_niter_16`, a fast approximation, takes seconds where
    `pissa` takes an hour for a 7B model), `olora` from its QR decomposition. These two train beside what is left of the
    base; final/ has a plain adapter of twice the rank for the base as it is."""

    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+: the learning rate of the B matrices (and of vectors, such as DoRA's magnitudes) is this many times
    training.learning_rate, which is the one in metrics.jsonl. 16 is usual."""

    loraplus_lr_embedding: Positive | None = None
    """With loraplus_lr_ratio: learning rate of adapters on embeddings. 1e-6 if not given."""

    start_from: NonEmpty | None = None
    """Folder of a peft adapter to start from instead of a new one. Only its weights are used: optimizer, schedule and
    data start from the beginning. Its ranks, scales and modules_to_save must be those given here. An adapter of a base
    that was changed (PiSSA, OLoRA) is refused: merge it first. (To start from a fully fine-tuned model, name its folder
    in model.name_or_path.)"""

    oft: Oft | None = None
    """Orthogonal fine-tuning instead of LoRA: `{oft_block_size: 32}`, or `{}`. The fields of LoRA's matrices (r,
    lora_alpha, lora_dropout, ...) are not given then."""

    @model_serializer(mode="wrap")
    def _of_its_kind(self, dump: Any) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        return {name: value for name, value in fields.items() if name not in (OF_LORA if self.oft else {"oft"})}


# Fields of Lora that are not peft's LoraConfig's, and those that lora.oft leaves without a meaning.
NOT_OF_PEFT = {"start_from", "loraplus_lr_ratio", "loraplus_lr_embedding", "oft"}
OF_LORA = (
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("init_lora_weights", "loraplus_lr_ratio", "loraplus_lr_embedding"),
)


class Source(Group):
    """A source of a mix."""

    path: NonEmpty
    """Any of the forms of `data.train`."""

    config: NonEmpty | None = None
    """Configuration of a folder or hub data set that has several (`configs` in its README.md)."""

    weight: Positive | None = None
    """Share of the mix, relative to the weights of the other sources. The mix is as large as it can be without a row
    used twice. Give it to all sources or to none."""

    rows: PositiveInt | None = None
    """This many rows in each pass over the mix, drawn by `training.seed`; used more than once where there are fewer."""

    epochs: Positive | None = None
    """Passes over the source in each pass over the mix: with 0.5 half of its rows, drawn by `training.seed`, with 2
    each row twice. 1 if none of the three is given."""


class Data(Group):
    """The training data."""

    train: NonEmpty | Annotated[list[NonEmpty | Source], Field(min_length=1)]
    """A file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow; also with .gz, .zst, .bz2 or .xz after it), a
    pattern (`data/*.jsonl`), a folder, a folder that datasets' save_to_disk wrote, a hub id (`owner/name`, also
    `owner/name@revision`, or a file or folder in it: `hf://datasets/owner/name/path`), or a list of these. Folders and
    hub ids are searched for splits as `datasets` does it, and their split `train` is taken; `:split` at the end names
    another one, `@config` after a folder one of its configurations. Paths are relative to the recipe's folder. What is
    not on this machine is an error, but a warning where another machine is planned for (`--cluster` of validate
    and render, and of a launch whose nodes read it; `plan`, but for `--gpu local`)."""

    eval: (
        NonEmpty | Annotated[float, Field(gt=0, lt=1)] | Annotated[list[NonEmpty | Source], Field(min_length=1)] | None
    ) = None
    """Evaluation data, in the same forms; of a folder or hub id the split `validation`, else `test`. Or a fraction:
    that much of the training data is held out, row by row, by a hash of the row's content. Its loss is measured before
    and after training, and every `training.eval_steps` steps."""

    format: Literal[
        "auto", "messages", "prompt_completion", "text", "alpaca", "alpaca_prompt", "alpaca_chat", "sharegpt", "tokens"
    ] = "auto"
    """`messages`: conversations, rendered by the chat template, loss on the assistant's turns; `sharegpt`: the same
    with `conversations` of `from` and `value`; `alpaca`: `instruction`, `input` and `output`, as a conversation, or as
    Stanford's prompt where there is no chat template; `alpaca_prompt`: always as Stanford's prompt; `alpaca_chat`: as a
    conversation whose question is Stanford's prompt; `prompt_completion`: loss on the completion; `text`: loss on every
    token; `tokens`: `input_ids`, and the `labels` to train on. `auto` decides by the fields of each file's rows, and
    what it took is printed."""

    columns: dict[str, NonEmpty] = {}
    """Columns under other names than the format's: `{prompt: question, completion: answer}`. Within messages, `role`
    and `content`: `{messages: dialog, role: speaker, content: text}`."""

    roles: dict[str, NonEmpty] = {}
    """Roles under other names than the chat template's: `{developer: system, bot: assistant}`. ShareGPT's are known."""

    train_on: Literal["all", "last", "all_with_reasoning", "everything"] = "all"
    """The assistant's turns that are trained. `last`: those after the last user message. `all_with_reasoning`: all, and
    where the chat template removes the thoughts of earlier turns, each of those is trained in a row of its own, with
    its thought. `everything`: every token, prompts and questions too."""

    ignore_fields: list[NonEmpty] = []
    """Fields of rows and messages that are left out, such as `tools`, where the chat template does not print them."""

    max_length: Annotated[int, Field(ge=8, le=10**8)] = 2048
    """Most tokens in a row, and in a packed row."""

    packing: Literal["auto"] | bool = True
    """Pack several rows into one of max_length tokens; attention does not cross from one to the next. `auto`: if
    the model can keep them apart; where not, the plan warns."""

    long_rows: Literal["error", "truncate", "drop", "split"] = "error"
    """What to do with rows longer than max_length; their number is always printed. `split` is for `text` only."""

    chat_template: NonEmpty | None = None
    """A file with a Jinja chat template, for a tokenizer that has none (or to replace its own); or the name of one, for
    a tokenizer that has several. `{% generation %}` marks in it decide which tokens are trained on. `launch` needs the
    file on this machine."""

    @property
    def packs(self) -> bool:
        """`packing`, of a recipe in which jobs/planned.py has replaced `auto`."""
        if self.packing == "auto":
            raise AssertionError("data.packing: auto was not replaced")
        return self.packing


class OptimArgs(Group):
    """Options of galore_adamw and apollo_adamw, by transformers' names."""

    rank: PositiveInt = 128
    """Directions that a matrix's gradient is projected onto."""

    update_proj_gap: PositiveInt = 200
    """Steps after which these are chosen anew."""

    scale: Positive | None = None
    """GaLore: factor of the update, 0.25 if not given. APOLLO: its square root is the factor, 1 if not given."""

    scale_type: Literal["channel", "tensor"] = "channel"
    """APOLLO: one factor for each row of the longer side, or one for the matrix (APOLLO-Mini, with `rank: 1`, `scale:
    128`)."""


class Training(Group):
    """Optimization."""

    global_batch_size: PositiveInt = 32
    """Sequences (packed rows with packing) per optimizer step over the whole job. The same at every world size."""

    micro_batch_size: Literal["auto"] | PositiveInt = "auto"
    """Sequences per GPU and forward pass. `auto`: the largest that fits (docs/design.md, "micro-batch")."""

    max_steps: PositiveInt | None = None
    """Optimizer steps. Instead of num_train_epochs."""

    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data, rounded up to a whole optimizer step. 1 if max_steps is not given either."""

    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Peak learning rate. `auto`: 2e-4 with LoRA, 2e-5 without."""

    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Schedule after warm-up. `constant` has no warm-up."""

    warmup_ratio: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = "auto"
    """Fraction of the steps over which the learning rate rises to its peak; no step has a rate of 0. `auto`: 0.03, but
    at most a tenth of the steps, and none below 10 steps."""

    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps over which the learning rate rises to its peak. Instead of warmup_ratio."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; not applied to biases and norms."""

    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip gradients to this global norm; 0 turns clipping off."""

    optim: Optim = "adamw_torch_fused"
    """Optimizer, by transformers' name. The 8-bit and paged ones come from bitsandbytes. `muon`: torch's Muon for the
    matrices of hidden layers, its steps scaled to the size of AdamW's; AdamW for embeddings, output layer, norms,
    biases and experts. It needs `lora: null`, and ddp, fsdp or hsdp. `galore_adamw` and `apollo_adamw`: AdamW's moments
    of the gradients of linear layers in a few directions only (optim_args); for GaLore these are the largest singular
    vectors and the steps stay within them, for APOLLO they are random and only scale the gradient. They need `lora:
    null` and ddp."""

    optim_args: OptimArgs | None = None
    """Options of galore_adamw and apollo_adamw."""

    optim_target_modules: Literal["all-linear"] | Annotated[list[NonEmpty], Field(min_length=1)] = "all-linear"
    """The linear layers of galore_adamw and apollo_adamw, by parts of their names: `[attn, mlp]`; the rest has AdamW.
    `all-linear`: every one except the output layer."""

    train_only: list[NonEmpty] = []
    """The part of the model that is trained, with `lora: null`; the rest is frozen, and comes out as it went in.
    Regular expressions for whole names of parameters or modules: `['model\\.layers\\.-[12]', lm_head]` trains the last
    two layers, which can be counted from the end, and the output layer. Empty: all weights are trained."""

    loss_type: Literal["nll", "dft", "eaft"] = "nll"
    """`nll`: the cross-entropy of the next token. `dft` (Dynamic Fine-Tuning): each token's is weighted by its
    probability, so that what the model finds unlikely changes it less. `eaft` (Entropy-Adaptive Fine-Tuning): by the
    entropy of the 20 likeliest words over 3. All are means over the trained tokens of the global batch, `loss` in
    metrics.jsonl; the eval loss is always `nll`."""

    loss: Literal["chunked", "full"] = "chunked"
    """How it is computed. `chunked`: some tokens at a time, so that the logits of all are never there; the same loss.
    `full`: from all logits at once. `full` is taken, and said, where a model cannot have the other."""

    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """`bf16` needs Ampere or later (or a CPU), `fp16` needs a GPU, `no` is float32 throughout."""

    master_weights: Literal["float32", "none"] = "float32"
    """What is trained. `float32`: weights, gradients and the optimizer's states in float32, 16 bytes a weight. `none`:
    all of them in bf16, 10 bytes a weight: AdamW with Kahan summation, which keeps what bf16 rounds off each step for
    the next one. It needs `lora: null`, `mixed_precision: bf16` and one of torch's AdamWs; ZeRO cannot offload it."""

    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass. `auto`: only if one sequence would not fit otherwise, or if the
    larger micro-batch that it allows makes training faster."""

    activation_offloading: bool = False
    """Keep what gradient checkpointing keeps, the inputs of blocks, in host memory: for longer rows. Each input crosses
    the bus twice, while the GPU waits. `gradient_checkpointing: auto` is on with it."""

    use_liger_kernel: bool = False
    """Use the fused kernels of liger-kernel (needs a CUDA GPU and the package)."""

    compile: bool = False
    """Compile each block of the model with torch.compile: faster steps on GPUs, after a first one that takes longer, up
    to minutes. Not under zero3. Each node needs a compiler: gcc and Triton on GPUs, g++ on CPU ranks."""

    eval_steps: PositiveInt | None = None
    """Steps between measurements of the eval loss, besides those before and after training."""

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the data order and of new weights."""

    report_to: list[NonEmpty] = []
    """Experiment trackers, by transformers' names: tensorboard, wandb, mlflow, ..."""

    @property
    def is_pure_bf16(self) -> bool:
        """Whether nothing of what is trained is float32."""
        return self.master_weights == "none"

    def optimizer_steps(self, rows: int) -> int:
        """Optimizer steps over that many rows; the last step may reach into the next epoch."""
        return self.max_steps or ceil((self.num_train_epochs or 1) * rows / self.global_batch_size)

    def warmup(self, steps: int) -> int:
        """How many of the optimizer steps come before the one at the peak learning rate."""
        if self.warmup_steps is not None:
            return min(self.warmup_steps, steps)
        if self.warmup_ratio == "auto":
            return min(ceil(0.03 * steps), steps // 10)
        return ceil(self.warmup_ratio * steps)


class Parallelism(Group):
    """How the states are sharded: it changes where numbers are stored, never the math."""

    strategy: Literal["auto"] | Strategy = "auto"
    """`ddp` replicates everything. DeepSpeed: `zero1` shards optimizer states, `zero2` gradients too, `zero3`
    parameters too. FSDP2: `fsdp` shards all three, `hsdp` shards them within groups of ranks and replicates across
    groups. `auto`: the fastest that fits."""

    offload: Literal["auto", "none", "optimizer", "all"] = "auto"
    """What is kept in host memory: the optimizer's states (ZeRO), or parameters too (zero3, fsdp, hsdp). `auto` is
    `none`, unless `strategy` is `auto` too and nothing fits without offload."""

    hsdp_shard_size: Literal["auto"] | Annotated[int, Field(ge=2)] = "auto"
    """Ranks that share one copy of the model under hsdp. `auto`: the ranks of one node."""


class Checkpoint(Group):
    """What is kept while training runs."""

    save_steps: PositiveInt | None = None
    """Steps between checkpoints (checkpoints/step-N), from which a run can continue."""

    save_total_limit: PositiveInt | None = None
    """How many checkpoints to keep: the newest ones."""


class Overrides(Group):
    """Values merged into what distft generates, for settings it has no field for. `distft rules` lists what is
    refused."""

    overrides: dict[str, Any] = {}
    """Nested keys as the library that reads them spells them."""


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
    """`deepspeed.overrides`: merged into the generated ds_config.json."""

    fsdp: Overrides = Overrides()
    """`fsdp.overrides`: merged into `fsdp_config` of the generated accelerate.yaml."""

    trainer: Overrides = Overrides()
    """`trainer.overrides`: merged into the generated transformers.TrainingArguments."""

    output_dir: NonEmpty = "runs"
    """Where run directories are created, relative to the current folder."""

    @property
    def learning_rate(self) -> float:
        """The peak learning rate with `auto` resolved."""
        if self.training.learning_rate != "auto":
            return self.training.learning_rate
        return 2e-4 if self.lora else 2e-5

    @property
    def optim(self) -> str:
        """The optimizer that actually runs: trainer.overrides may name one that the recipe has no word for."""
        return str(self.trainer.overrides.get("optim", self.training.optim))

    @property
    def low_rank(self) -> OptimArgs | None:
        """The options of GaLore and APOLLO; None for other optimizers."""
        training = self.training
        return (training.optim_args or OptimArgs()) if training.optim in LOW_RANK else None

    @property
    def loss_type(self) -> str | None:
        """The loss that is trained, where it is not the plain cross-entropy."""
        if self.training.loss_type != "nll":
            return self.training.loss_type
        smoothing = self.trainer.overrides.get("label_smoothing_factor")
        return f"label smoothing {smoothing}" if smoothing else None


class ScriptTraining(Group):
    """What distft must know about the training of your own script."""

    mixed_precision: Literal["bf16", "fp16", "no"] = "no"
    """What the script asks accelerate for; FSDP's and DeepSpeed's dtypes follow it."""


class ScriptSettings(Group):
    """What `--set` accepts when your own script runs instead of a recipe."""

    name: RunName
    training: ScriptTraining = ScriptTraining()
    parallelism: Parallelism = Parallelism()
    deepspeed: Overrides = Overrides()
    fsdp: Overrides = Overrides()
    output_dir: NonEmpty = "runs"
