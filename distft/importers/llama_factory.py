"""LLaMA-Factory's YAML and the dataset_info.json that it names. Names and defaults: src/llamafactory/hparams/*.py and
data/parser.py; what they become: model/adapter.py, data/converter.py, data/processor/supervised.py (ff6d4d1)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distft.config.paths import near
from distft.config.schema_text import clean, closest, did_you_mean, show
from distft.importers import arguments, common, freezing, low_rank
from distft.importers.datasets import DataSet, Format, hub_file, set_formats, simplest, sources
from distft.importers.options import Options
from distft.importers.sharding import SPLIT
from distft.importers.tables import table

NAME = "LLaMA-Factory"
_MOST_COUNTED = 2**24  # bytes of a file whose rows are counted

_TAGS = {"user": "user", "assistant": "assistant", "observation": "tool", "system": "system"}
_MULTIMODAL = "distft trains on text alone"


def read(options: Options) -> None:
    """All of a file."""
    draft = options.draft
    stage = options.text("stage") or "sft"
    if stage not in ("sft", "pt"):
        options.refuse("stage", "distft trains on examples alone; this needs preferences or a reward")
    if options.has("do_train") and not options.flag("do_train"):
        draft.problems.append(f"do_train: this file does not train ({options.where('do_train')})")
    _model(options)
    _method(options)
    _data(options, stage)
    arguments.read(options, arguments.DEFAULTS, _shared(options), low_rank.layerwise(options))
    _precision(options)
    _optimizer(options)
    if options.flag("pure_bf16"):  # model/adapter.py, init_adapter
        common.bf16_weights(options, "pure_bf16")
    _loss(options)
    if options.flag("disable_gradient_checkpointing") is not None:
        # model/model_utils/checkpointing.py: on unless disabled
        options.set(
            "training.gradient_checkpointing",
            "disable_gradient_checkpointing",
            not options.flag("disable_gradient_checkpointing"),
        )
    table("llama_factory").apply(options)
    options.finish((), NAME)


def _optimizer(options: Options) -> None:
    """train/trainer_utils.py, create_custom_optimizer: GaLore, then APOLLO. _create_muon_optimizer: the steps of
    torch's, scaled alike. All replace `optim`."""
    low_rank.llama_factory(options)
    if options.flag("use_muon"):
        options.set("training.optim", "use_muon", "muon")
        if options.draft.fields.get("lora", True) is not None:
            options.refuse("use_muon", "distft's Muon is for the model's own matrices, and adapters have two factors")
        common.norms_decay(options.draft)


def _loss(options: Options) -> None:
    """train/sft/trainer.py: use_dft_loss comes first."""
    dft, eaft, alpha = options.flag("use_dft_loss"), options.flag("use_eaft_loss"), options.number("eaft_alpha")
    if dft:
        options.set("training.loss_type", "use_dft_loss", "dft")
    elif eaft and alpha in (None, 1.0):
        options.set("training.loss_type", "use_eaft_loss", "eaft")
    elif eaft:
        options.refuse("eaft_alpha", "distft's loss_type eaft has an alpha of 1")


def _shared(options: Options) -> dict[str, int]:
    """Megatron's groups of GPUs that work on the same rows."""
    shared = {}
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        if (size := options.integer(name)) is not None:
            options.drop(name, SPLIT)
            if size > 1:
                shared[name] = size
    options.drop_all({"expert_model_parallel_size": SPLIT})
    return shared


def _precision(options: Options) -> None:
    """Fewer bits than distft has become as many as it has."""
    draft = options.draft
    if options.flag("pure_bf16"):
        options.set("training.mixed_precision", "pure_bf16", "bf16")
    if options.flag("fp8"):
        options.drop("fp8", "computed in bf16: more exact, and slower")
        draft.warn("fp8: distft computes in bf16: more exact, and slower")
    options.drop_all({"mixed_precision": "of Megatron; bf16 and fp16 say it"})
    options.drop_all(dict.fromkeys(("fp8_backend", "fp8_enable_fsdp_float8_all_gather"), "of fp8"))
    if options.flag("use_kt"):
        options.drop("use_kt", "distft computes experts on the GPUs")
        draft.warn("use_kt: KTransformers keeps experts in host memory; `distft plan` shows what they need on the GPUs")
    options.drop_all(dict.fromkeys(("kt_config", "kt_cpu_activation"), "of KTransformers"))
    if options.has("kt_weight_path"):
        options.drop("kt_weight_path", "the experts of model_name_or_path are loaded")
        draft.warn("kt_weight_path: these are quantized experts; distft loads the model's own: more exact, and larger")
    options.drop_all({"kt_non_expert_weight_path": "the weights of model_name_or_path are loaded"})


def _model(options: Options) -> None:
    draft = options.draft
    if common.base_model(options, "model_name_or_path", "model_revision") is None:
        return
    attention = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager", "auto": "auto", "fa3": "fa3"}
    value = options.take("flash_attn")
    if value is not None:
        common.attention(options, "flash_attn", attention.get(str(value), str(value)))
    if options.flag("enable_liger_kernel"):
        options.set("training.use_liger_kernel", "enable_liger_kernel", True)
    bits = options.integer("quantization_bit")
    method = options.text("quantization_method") or "bnb"
    if bits is not None:
        if method not in ("bnb", "bitsandbytes") or bits not in (4, 8):
            options.refuse("quantization_bit", "distft quantizes with bitsandbytes, to 4 or 8 bits")
        else:
            options.set("model.quantization", "quantization_bit", "nf4" if bits == 4 else "int8")
    if options.has("quantization_method"):
        options.drop("quantization_method", "distft quantizes with bitsandbytes")
    if (kind := options.text("quantization_type")) and kind != "nf4" and bits == 4:
        options.refuse("quantization_type", "distft has nf4")
    if options.flag("double_quantization") is False:
        options.drop("double_quantization", "distft quantizes the constants of nf4 too")
        draft.warn("double_quantization: the base differs by the rounding of nf4's constants")
    for name in ("add_tokens", "add_special_tokens"):
        if tokens := _listed(options, name):
            common.add_tokens(options, name, tokens)
    if options.has("resize_vocab"):
        options.drop("resize_vocab", "the embeddings grow with model.add_tokens")
    options.drop_all({"init_special_tokens": "new tokens start as transformers makes them"})


def _listed(options: Options, name: str) -> list[str]:
    """A list, or names separated by commas."""
    value = options.take(name)
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return options.texts(name)


LORA = (
    *("lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
    *("loraplus_lr_ratio", "loraplus_lr_embedding", "pissa_init", "pissa_iter"),
)
OFT = ("oft_rank", "oft_block_size", "oft_target", "module_dropout")


def _method(options: Options) -> None:
    """hparams/finetuning_args.py and model/adapter.py: LoRA of rank 8 on all linear layers, lora_alpha twice the rank;
    OFT in blocks of 32."""
    draft, kind = options.draft, options.text("finetuning_type") or "lora"
    if kind in ("full", "freeze"):
        options.set("lora", "finetuning_type", None)
        options.drop_all(dict.fromkeys((*LORA, *OFT, "lora_target", "additional_target"), "there is no adapter"))
        if kind == "freeze":
            _freeze(options)
        return
    if kind not in ("lora", "oft"):
        options.refuse("finetuning_type", "distft trains all weights, a part of them, LoRA or OFT")
        return
    if kind == "oft":
        _oft(options)
    else:
        _lora(options)
    options.drop_all(dict.fromkeys(LORA if kind == "oft" else OFT, f"finetuning_type is {kind}"))
    targets = _listed(options, "lora_target")
    if targets and targets != ["all"]:
        options.set("lora.target_modules", "lora_target", targets)
    elif targets:
        options.set("lora.target_modules", "lora_target", "all-linear")
    draft.default("lora.target_modules", "all-linear", "lora_target")
    common.modules_to_save(options, "additional_target")
    adapters = _listed(options, "adapter_name_or_path")
    if len(adapters) > 1:
        options.refuse("adapter_name_or_path", "distft starts from one adapter; merge the others first")
    elif adapters:
        options.set("lora.start_from", "adapter_name_or_path", draft.model_path(adapters[0]))


def _lora(options: Options) -> None:
    draft, rank = options.draft, options.integer("lora_rank")
    if rank is not None:
        options.set("lora.r", "lora_rank", rank)
    draft.default("lora.r", 8, "lora_rank")
    alpha = options.number("lora_alpha")
    if alpha:
        options.set("lora.lora_alpha", "lora_alpha", alpha)
    draft.default("lora.lora_alpha", 2 * (rank or 8), "lora_alpha")
    common.plain_number(options, "lora_dropout", "lora.lora_dropout", 0.0)
    for name in ("use_rslora", "use_dora"):
        if options.flag(name):
            options.set(f"lora.{name}", name, True)
    common.loraplus(options)
    steps = options.integer("pissa_iter")
    if options.flag("pissa_init"):
        steps = 16 if steps is None else steps
        options.set("lora.init_lora_weights", "pissa_init", "pissa" if steps == -1 else f"pissa_niter_{steps}")


def _oft(options: Options) -> None:
    """OFTConfig takes one of the two sizes, and 0 for the other. Of the targets, lora_target alone is read."""
    draft, blocks, size = options.draft, options.integer("oft_rank"), options.integer("oft_block_size")
    if blocks and size == 0:
        options.set("lora.oft.r", "oft_rank", blocks)
    elif blocks or size == 0:
        draft.problems.append("oft_rank: peft takes it with oft_block_size: 0, and oft_block_size with oft_rank: 0")
    elif size:
        options.set("lora.oft.oft_block_size", "oft_block_size", size)
    else:
        draft.default("lora.oft.oft_block_size", 32, "oft_block_size")
    read, meant = _listed(options, "lora_target") or ["all"], _listed(options, "oft_target")
    if meant and meant != read:
        why = f"LLaMA-Factory does not read it, and trains adapters on lora_target ({', '.join(read)}): make them equal"
        options.refuse("oft_target", why)
    elif meant:
        options.drop("oft_target", "LLaMA-Factory reads lora_target, which has the same layers")
    if options.number("module_dropout"):
        options.drop("module_dropout", "peft keeps it, and drops nothing (tuners/oft/layer.py)")


def _freeze(options: Options) -> None:
    modules, extra = (_listed(options, f"freeze_{name}_modules") for name in ("trainable", "extra"))
    total = None
    if options.flag("use_llama_pro"):
        total = freezing.number_of_layers(options.draft, options.text("model_name_or_path"))
        if total is None:
            why = "which layers these are follows from their number, and the model is not on this machine"
            options.refuse("use_llama_pro", why)
            options.taken.add("freeze_trainable_layers")
            return
    freezing.layers(options, modules or ["all"], extra, total)


# ---- data


def _data(options: Options, stage: str) -> None:
    draft = options.draft
    common.max_length(options, "cutoff_len", 2048)
    _packing(options, stage)
    if stage == "pt":
        draft.default("data.long_rows", "split", "cutoff_len")
    else:
        draft.default("data.long_rows", "truncate", "cutoff_len")
        draft.warn("data.long_rows: LLaMA-Factory cuts prompt and answer of long rows in proportion, distft their end")
    if options.flag("train_on_prompt"):
        common.train_on_everything(options, "train_on_prompt")
    if options.flag("mask_history"):
        options.set("data.train_on", "mask_history", "last")
    info = _dataset_info(options)
    most = options.integer("max_samples")
    names = _listed(options, "dataset")
    if not names:
        draft.problems.append(f"dataset is missing ({draft.file.name})")
    formats = _sources(options, "dataset", "data.train", names, info, most, stage)
    formats += _evaluation(options, info, most, stage)
    set_formats(draft, formats)
    for described in formats:
        described.options.finish((), "dataset_info.json")
    if (template := options.text("template")) and stage != "pt":
        common.named_template(options, "template", template, ["chatml"])
        if template == "chatml":  # data/template.py: replace_eos
            draft.default("model.eos_token", "<|im_end|>", "template: chatml")
    if options.flag("enable_thinking") is False:
        options.drop("enable_thinking", "rows say it themselves (enable_thinking)")
        draft.warn("enable_thinking: false is not passed to the chat template; rows can have enable_thinking: false")
    elif options.has("enable_thinking"):
        options.drop("enable_thinking", "the chat template's own default is used")
    strategy = options.text("mix_strategy")
    if strategy and strategy != "concat":
        options.refuse("mix_strategy", "distft mixes by the weights of data.train")


def _packing(options: Options, stage: str) -> None:
    """data/processor/supervised.py: neat_packing keeps documents apart, packing alone does not."""
    draft, packs, neat = options.draft, options.flag("packing"), options.flag("neat_packing")
    if neat:
        options.set("data.packing", "neat_packing", "auto")
        if packs is not None:
            options.drop("packing", "neat_packing includes it")
    elif packs is not None:
        options.set("data.packing", "packing", packs and "auto")
        if packs:
            draft.warn("packing: distft keeps the documents of a packed row apart, as neat_packing does")
    draft.default("data.packing", stage == "pt" and "auto", "packing")


def _evaluation(options: Options, info: dict[str, Any] | None, most: int | None, stage: str) -> list[Format]:
    size = options.number("val_size")
    if size and size < 1:
        options.set("data.eval", "val_size", float(size))
    elif size:
        options.refuse("val_size", "a number of rows; data.eval takes a fraction, such as 0.05, or a file")
    return _sources(options, "eval_dataset", "data.eval", _listed(options, "eval_dataset"), info, most, stage)


def _dataset_info(options: Options) -> dict[str, Any] | None:
    """The descriptions of data sets; None where all names are ids on the hub."""
    draft = options.draft
    folder = options.text("dataset_dir")
    if folder == "ONLINE":
        options.drop("dataset_dir", "names are ids on the hub")
        return None
    if folder and folder.startswith("REMOTE:"):
        file = hub_file(folder[7:], "dataset_info.json")
        if file is None:
            options.refuse("dataset_dir", f"dataset_info.json of {folder[7:]} cannot be had from the hub here")
            return {}
    else:
        where = draft.locate(folder or "data")
        file = where / "dataset_info.json" if where else None
    if folder:
        options.drop("dataset_dir", "data.train has the paths")
    if file is None or not file.is_file():
        draft.problems.append(
            f"dataset_dir: {folder or 'data'}/dataset_info.json is not here; looked in {draft.file.parent} and the "
            f"folders above it{draft.near(folder or 'data') if file is None else near(file)}"
        )
        return {}
    try:
        info = json.loads(file.read_bytes()[: 2**22])
    except (OSError, ValueError, RecursionError) as error:
        draft.problems.append(f"{clean(str(file))}: cannot be read as JSON ({clean(str(error))})")
        return {}
    return {"": file.parent, **info} if isinstance(info, dict) else {}


def _sources(
    options: Options,
    name: str,
    field: str,
    names: list[str],
    info: dict[str, Any] | None,
    most: int | None,
    stage: str,
) -> list[Format]:
    """data.train or data.eval of named data sets. Returns how their rows are read."""
    draft, entries = options.draft, list[Any]()
    formats: list[Format] = []
    for one in names:
        if info is None:
            description: Any = {"hf_hub_url": one}
        else:
            description = info.get(one)
            if not isinstance(description, dict):
                if info:
                    near = did_you_mean(closest(one, [key for key in info if key]))
                    draft.problems.append(f"{name}: {show(one)} is not in dataset_info.json{near}")
                continue
        described = Options(draft, description, steps=("dataset_info.json", one))
        found = _data_set(described, (info or {}).get("", Path()), most)
        if found is None:
            continue
        entries += found
        formats.append(Format(described, "formatting", _text(described) if stage == "pt" else _format(described)))
        described.data.pop("file_name", None)  # data.train has it
        described.data.pop("hf_hub_url", None)
    if options.has("max_samples") and name == "dataset":
        limited = any(isinstance(entry, dict) and "rows" in entry for entry in entries)
        took = f"data.train takes {most:,} rows of each data set that may have more (rows: {most})"
        options.drop("max_samples", took if limited else "no data set has more rows, so all are used")
    if entries:
        options.set(field, name, simplest(entries))
    return formats


def _data_set(described: Options, folder: Path, most: int | None) -> list[Any] | None:
    """data/parser.py, get_dataset_list: on the hub, or a file or folder in dataset_dir."""
    draft = described.draft
    samples = described.integer("num_samples")
    hub, file = described.text("hf_hub_url"), described.text("file_name")
    described.drop_all({"ms_hub_url": "the hub's is used", "om_hub_url": "the hub's is used"})
    if described.is_on("ranking"):
        described.refuse("ranking", "distft trains on examples alone; this needs preferences or a reward")
    described.taken.add("ranking")
    for name in ("script_url", "cloud_file_name"):
        if described.is_on(name):
            described.refuse(name, "distft reads files and the hub alone")
            return None
    subset, split, inner = described.text("subset"), described.text("split"), described.text("folder")
    limit = min((n for n in (samples, most) if n is not None), default=None)
    if hub:
        files = () if inner is None else (inner,)
        data_set = DataSet(hub, split, subset, files=files, most=limit)
    elif file:
        path = folder / file
        count = _count(path)
        most = limit if count is None or limit is None or count > limit else None
        data_set = DataSet(draft.relative(path), most=most, is_here=True)
    else:
        draft.problems.append(f"{described.path('file_name')} is missing (dataset_info.json)")
        return None
    found = sources(draft, data_set, ".".join(map(str, described.steps)))
    if found is None:
        described.refuse("split", "data.train takes a whole split, or a share of it")
    return found


def _count(path: Path) -> int | None:
    """Rows of a small JSON or JSON Lines file; None where that is not known."""
    try:
        if path.stat().st_size > _MOST_COUNTED:
            return None
        if path.suffix == ".jsonl":
            return sum(1 for line in path.open("rb") if line.strip())
        if path.suffix == ".json":
            rows = json.loads(path.read_bytes())
            return len(rows) if isinstance(rows, list) else None
    except (OSError, ValueError, RecursionError):
        pass
    return None


def _text(described: Options) -> dict[str, Any]:
    """data/processor/unsupervised.py and pretrain.py: what the instruction would be is the text."""
    columns = described.group("columns")
    column = columns.text("prompt") or ("text" if columns.data else "instruction")
    described.taken.add("formatting")
    return {"data.format": "text"} | ({"data.columns": {"text": column}} if column != "text" else {})


def _format(described: Options) -> dict[str, Any]:
    """data/parser.py, DatasetAttr: alpaca; columns that are not given are not read where others are."""
    kind = described.text("formatting") or "alpaca"
    columns, tags = described.group("columns"), described.group("tags")
    for name in ("images", "videos", "audios"):
        if columns.is_on(name):
            columns.refuse(name, _MULTIMODAL)
    for name in ("chosen", "rejected", "kto_tag"):
        if columns.is_on(name):
            columns.refuse(name, "distft trains on examples alone; this needs preferences or a reward")
    shared = {name: columns.text(name) for name in ("system", "tools")}
    if kind == "alpaca":
        own = {"instruction": "prompt", "input": "query", "output": "response", "history": "history"}
        names = {ours: columns.text(theirs) for ours, theirs in own.items()} | shared
        columns.taken.add("messages")
        result: dict[str, Any] = {"data.format": "alpaca"}
    elif kind in ("sharegpt", "openai"):
        role, content = tags.text("role_tag") or "from", tags.text("content_tag") or "value"
        messages = columns.text("messages") or "conversations"
        names = {"messages": messages, "role": role, "content": content, **shared}
        result = {"data.format": "sharegpt" if role == "from" else "messages"}
        roles = {tags.text(f"{tag}_tag"): target for tag, target in _TAGS.items()}
        known = {"human": "user", "gpt": "assistant", "observation": "tool"} if role == "from" else {}
        roles = {key: value for key, value in roles.items() if key and key != value and known.get(key) != value}
        if roles:
            result["data.roles"] = roles
        tags.take("function_tag")
        usual = {"messages": "conversations", "role": "from", "content": "value"}
        names = {key: value for key, value in names.items() if role != "from" or value != usual.get(key)}
    else:
        described.refuse("formatting", "need alpaca, sharegpt or openai")
        return {}
    mapped = {key: value for key, value in names.items() if value and value != key}
    if mapped:
        result["data.columns"] = mapped
    columns.finish((), "columns of dataset_info.json")
    tags.finish((), "tags of dataset_info.json")
    return result
