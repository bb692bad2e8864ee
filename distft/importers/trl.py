"""TRL's SFT: its YAML of arguments (`trl sft --config`), or its command line. Names and defaults:
trl/trainer/sft_config.py, model_config.py and scripts/utils.py; what they become: trl/scripts/sft.py (f2cd577)."""

from __future__ import annotations

from typing import Any

from distft.importers import arguments, common
from distft.importers.datasets import DataSet, simplest, sources
from distft.importers.draft import Left
from distft.importers.options import Options
from distft.importers.tables import table

NAME = "TRL"
KEYS = {
    "dataset_name",
    "dataset_mixture",
    "datasets",
    "use_peft",
    "dataset_text_field",
    "max_length",
    "assistant_only_loss",
    "completion_only_loss",
    "per_device_train_batch_size",
}
DEFAULTS: dict[str, Any] = arguments.DEFAULTS | {"learning_rate": 2e-5, "precision": "bf16"}
# trl/accelerate_configs, which --accelerate_config takes by name.
ACCELERATE_CONFIGS: dict[str, dict[str, Any]] = {
    **{
        f"zero{stage}": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": stage}, "num_processes": 8}
        for stage in (1, 2, 3)
    },
    "fsdp1": {"distributed_type": "FSDP", "num_processes": 8},
    "fsdp2": {"distributed_type": "FSDP", "num_processes": 8},
    "multi_gpu": {"distributed_type": "MULTI_GPU", "num_processes": 8},
    "single_gpu": {"distributed_type": "NO", "num_processes": 8},
}


def read(options: Options) -> None:
    """All of a file, or of a command line."""
    if common.base_model(options, "model_name_or_path", "model_revision") is None:
        return
    if value := options.text("attn_implementation"):
        common.attention(options, "attn_implementation", value)
    for token in ("eos_token", "pad_token"):
        if value := options.text(token):
            options.set(f"model.{token}", token, value)
    _lora(options)
    _data(options)
    arguments.read(options, DEFAULTS)
    _weights(options)
    loss_type = options.text("loss_type")
    if loss_type == "dft":
        options.set("training.loss_type", "loss_type", "dft")
    elif loss_type not in (None, "nll", "chunked_nll"):
        options.refuse("loss_type", "distft has the losses nll, dft and eaft")
    elif options.has("loss_type"):
        options.drop("loss_type", "the same loss, computed in another way")
    common.activation_offloading(options, "activation_offloading")
    table("trl").apply(options)
    options.finish((), NAME)


def _weights(options: Options) -> None:
    """trl/scripts/sft.py loads the model in this dtype, float32 by default; accelerate and DeepSpeed make it float32
    under FSDP and ZeRO."""
    draft = options.draft
    name = next((name for name in ("dtype", "torch_dtype") if options.has(name)), None)
    if name is None or draft.fields.get("lora", True) is not None:
        return
    dtype, strategy = options.data[name], str(draft.fields.get("parallelism.strategy"))
    if strategy.startswith(("zero", "fsdp", "hsdp")) or draft.fields.get("training.mixed_precision") != "bf16":
        return
    if dtype == "bfloat16":
        options.taken.add(name)
        common.bf16_weights(options, name)
    elif dtype == "auto":
        draft.warn(
            f"{name}: auto: TRL trains weights in the base's dtype, and distft's are float32: more exact, and larger; "
            "training.master_weights: none is nearer to it where that is bf16"
        )


def _lora(options: Options) -> None:
    """trl/trainer/utils.py, get_peft_config and get_quantization_config; model_config.py has the defaults."""
    draft = options.draft
    names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
    for name, kind in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        if options.flag(name):
            options.set("model.quantization", name, kind)
    if options.flag("load_in_4bit"):
        if options.text("bnb_4bit_quant_type") not in (None, "nf4"):
            options.refuse("bnb_4bit_quant_type", "distft has nf4")
        if not options.flag("use_bnb_nested_quant"):
            draft.warn("use_bnb_nested_quant: distft quantizes the constants of nf4, too; the base differs by that")
    if not options.flag("use_peft"):
        draft.set("lora", None, "use_peft", False, options.line("use_peft"))
        options.drop_all(dict.fromkeys(names, "there is no adapter"))
        return
    rank, alpha = options.integer("lora_r"), options.number("lora_alpha")
    if rank is not None:
        options.set("lora.r", "lora_r", rank)
    draft.default("lora.r", 16, "lora_r")
    if alpha is not None:
        options.set("lora.lora_alpha", "lora_alpha", alpha)
    draft.default("lora.lora_alpha", 32, "lora_alpha")
    common.plain_number(options, "lora_dropout", "lora.lora_dropout", 0.05)
    if options.has("lora_target_modules"):
        common.target_modules(options, "lora_target_modules")
    else:
        why = "missing: peft would choose by the type of the model; name them"
        draft.refused.append(Left("lora_target_modules", None, why))
    for name in ("use_rslora", "use_dora"):
        if options.flag(name):
            options.set(f"lora.{name}", name, True)
    common.modules_to_save(options, "lora_modules_to_save")


def _data(options: Options) -> None:
    draft = options.draft
    said = common.max_length(options, "max_length", 1024)
    if "max_length" in options.data and not said:
        draft.warn("max_length: null is no limit; distft needs one: raise data.max_length above the longest row")
        draft.default("data.long_rows", "error", "max_length")
    packs, strategy = options.flag("packing"), options.text("packing_strategy")
    if packs is not None:
        options.set("data.packing", "packing", packs and "auto")
    draft.default("data.packing", False, "packing")
    if packs and strategy == "wrapped":
        options.refuse("packing_strategy", "distft keeps the documents of a packed row apart")
    elif strategy:
        options.drop("packing_strategy", "distft packs as bfd does")
    split = strategy == "bfd_split" and bool(packs)
    draft.default("data.long_rows", "split" if split else "truncate", "truncation_mode")
    if options.text("truncation_mode") not in (None, "keep_start"):
        options.refuse("truncation_mode", "distft cuts the end of long rows")
    _sources(options)
    if template := options.text("chat_template_path"):
        common.jinja(options, "chat_template_path", template)
    column = options.text("dataset_text_field")
    if column and column != "text":
        options.set("data.columns", "dataset_text_field", {"text": column})
    _trained(options)


def _sources(options: Options) -> None:
    """trl/scripts/sft.py: `datasets` wins over dataset_name; test rows are used where eval_strategy is not `no`."""
    draft = options.draft
    several = options.groups("datasets")
    name = options.text("dataset_name")
    train, test = options.text("dataset_train_split"), options.text("dataset_test_split")
    wanted = [(_one_of_several(one), one.path("split")) for one in several]
    if name and not several:
        wanted = [(DataSet(name, train, options.text("dataset_config")), "dataset_train_split")]
    entries: list[Any] = []
    for data_set, where in wanted:
        found = sources(draft, data_set, where)
        if found is None:
            options.refuse("datasets" if several else where, "data.train takes a whole split, or a share of it")
        else:
            entries += found
    if not entries:
        draft.problems.append(f"dataset_name is missing ({draft.file.name})")
        return
    options.set("data.train", "datasets" if several else "dataset_name", simplest(entries))
    if several and name:
        options.drop("dataset_name", "datasets is used")
    evaluates = str(options.take("eval_strategy") or "no").lower() not in ("no", "false")
    options.taken.discard("eval_strategy")
    if size := options.number("test_split_size"):
        options.set("data.eval", "test_split_size", float(size))
    elif evaluates and name and not several:
        split = test or "test"
        found = sources(draft, DataSet(name, split, options.text("dataset_config")), "dataset_test_split")
        if found is None:
            options.refuse("dataset_test_split", "data.eval takes a whole split")
        else:
            options.set("data.eval", "eval_strategy", simplest(found))
    elif test:
        options.drop("dataset_test_split", "eval_strategy is no, so it is not read")


def _one_of_several(one: Options) -> DataSet:
    """An entry of `datasets`. With `fraction` it has a weight in the mix, which uses no row twice."""
    files: list[str] = []
    if isinstance(one.data.get("data_files"), dict):
        one.refuse("data_files", "data.train takes files, not files by split")
    else:
        files = one.texts("data_files")
    path, split, name = one.text("path"), one.text("split"), one.text("name")
    if path is None:
        one.draft.problems.append(f"{one.path('path')} is missing ({one.draft.file.name})")
    share = one.number("fraction")
    one.drop_all({"columns": "only the columns of the format are read"})
    one.finish(("data_dir",), "TRL's datasets")
    return DataSet(path or "", split, name, files=tuple(files), share=share)


def _trained(options: Options) -> None:
    """sft_trainer.py: of conversations every token, unless assistant_only_loss; of prompt and completion the latter."""
    draft = options.draft
    if options.flag("assistant_only_loss"):
        options.set("data.train_on", "assistant_only_loss", "all")
        return
    if options.flag("completion_only_loss"):
        options.set("data.format", "completion_only_loss", "prompt_completion")
        return
    options.taken |= {"assistant_only_loss", "completion_only_loss"}
    draft.default("data.train_on", "everything", "assistant_only_loss")
    if options.flag("completion_only_loss") is None:
        draft.warn(
            "data.train_on: TRL trains every token of conversations and texts, but of prompt + completion the "
            "completion alone; for such rows, remove data.train_on"
        )
