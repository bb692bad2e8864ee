"""axolotl's data sets, chat templates and what is trained of a row. What they become: prompt_strategies/,
utils/chat_templates/base.py, utils/data/ (axolotl 0.17, commit 067b021)."""

from __future__ import annotations

from typing import Any

from distft.config.schema_text import show
from distft.importers import common
from distft.importers.datasets import DataSet, Format, set_formats, simplest, sources, with_share
from distft.importers.options import Options
from distft.importers.tables import table

_ALPACA_TYPES = ("alpaca", "alpaca:instruct")
# Those of utils/chat_templates/templates/ that are in templates/ here.
_TEMPLATES = ("chatml", "gemma", "llama3", "phi_3")
_ROLES = {"human": "user", "gpt": "assistant"}  # that the strategy chat_template knows by itself
_RL = "distft trains on examples alone; this needs preferences or a reward"


def read(options: Options) -> None:
    """All options of the data."""
    draft = options.draft
    common.max_length(options, "sequence_len", 512)
    packs = options.flag("sample_packing")
    if packs is not None:
        options.set("data.packing", "sample_packing", packs and "auto")
    draft.default("data.packing", False, "sample_packing")
    excess = options.text("excess_length_strategy")  # utils/data/utils.py: drop
    long_rows = {"drop": "drop", "truncate": "truncate", "raise": "error"}.get(excess or "drop")
    if long_rows is None:
        draft.problems.append(f"excess_length_strategy: got {show(excess)}, need drop, truncate or raise")
    elif excess:
        options.set("data.long_rows", "excess_length_strategy", long_rows)
    draft.default("data.long_rows", "drop", "excess_length_strategy")
    if options.flag("train_on_inputs"):
        common.train_on_everything(options, "train_on_inputs")
    elif options.has("train_on_inputs"):
        options.set("data.train_on", "train_on_inputs", "all")
    data_sets = options.groups("datasets")
    if any(options.is_on(name) for name in ("rl", "reward_model", "process_reward_model")):
        if data_sets:
            options.drop("datasets", "its rows are not examples; name others in data.train")
        of_rows = ("test_datasets", "val_set_size", "eval_steps", "evals_per_epoch", "chat_template")
        options.drop_all(dict.fromkeys(of_rows, "concerns rows that are not trained on"))
        return  # refused as a whole
    if not data_sets and not options.is_on("pretraining_dataset"):
        draft.problems.append(f"datasets is missing ({draft.file.name})")
    formats = _sources(options, data_sets, "datasets", "data.train")
    formats += _evaluation(options)
    set_formats(draft, formats)
    for one in formats:
        table("axolotl_datasets").apply(one.options)
        one.options.finish((), "axolotl's data sets")
    if (
        data_sets and draft.fields.get("data.format") == "text"
    ):  # prompt_strategies/completion.py cuts texts into pieces
        draft.set("data.long_rows", "split", "datasets[0].type", data_sets[0].data.get("type"))
    _chat_template(options, data_sets)


def _evaluation(options: Options) -> list[Format]:
    size = options.number("val_set_size")
    if size:
        if size < 1:
            options.set("data.eval", "val_set_size", float(size))
        else:
            options.refuse("val_set_size", "a number of rows; data.eval takes a fraction, such as 0.05, or a file")
    formats = _sources(options, options.groups("test_datasets"), "test_datasets", "data.eval")
    steps = options.number("eval_steps")
    if steps and steps >= 1:
        options.set("training.eval_steps", "eval_steps", int(steps))
    elif steps:
        options.drop("eval_steps", "a fraction of the run; distft evaluates before and after it, and every eval_steps")
    if options.is_on("evals_per_epoch"):
        options.drop("evals_per_epoch", "distft evaluates before and after training, and every training.eval_steps")
    options.taken.add("evals_per_epoch")
    return formats


def _sources(options: Options, data_sets: list[Options], name: str, field: str) -> list[Format]:
    """data.train or data.eval of a list of data sets. Returns how their rows are read."""
    draft = options.draft
    entries: list[str | dict[str, Any]] = []
    formats: list[Format] = []
    for one in data_sets:
        files = one.texts("data_files")
        path = one.text("path")
        if path is None:
            draft.problems.append(f"{one.path('path')} is missing ({draft.file.name})")
            continue
        data_set = DataSet(path, one.text("split"), one.text("name"), one.text("revision"), tuple(files))
        found = sources(draft, data_set, one.path("split"))
        if found is None:
            one.refuse("split", "data.train takes a whole split, or a share of it")
        elif shards := one.integer("shards"):  # utils/data/sft.py: a shard of the shuffled rows
            draft.warn(f"{one.path('shards')}: one in {shards} rows is drawn by training.seed, not those of the shard")
            entries += with_share(found, {"epochs": round(1 / shards, 6)})
        else:
            entries += found
        formats.append(Format(one, "type", _format(one)))
        for key in ("split", "name", "revision", "data_files"):
            one.taken.add(key)
    if entries:
        paths = [one.data.get("path") for one in data_sets]
        if len(paths) == 1:
            draft.set(field, simplest(entries), data_sets[0].path("path"), paths[0], data_sets[0].line("path"))
        else:
            options.set(field, name, simplest(entries))
    return formats


def _format(one: Options) -> dict[str, Any]:
    """data.format, data.columns and data.roles of a data set."""
    given = one.take("type")
    if isinstance(given, dict):
        return _user_defined(one)
    if given is None:
        return {"data.format": "tokens"}  # utils/data/wrappers.py: rows that have input_ids already
    if given in _ALPACA_TYPES:
        return {"data.format": "alpaca_prompt"}
    if given == "completion":
        column = one.text("field")
        return {"data.format": "text", **({"data.columns": {"text": column}} if column and column != "text" else {})}
    if given in ("chat_template", "sharegpt"):
        return _chat(one, given)
    one.refuse("type", _why_not(str(given)))
    return {}


def _why_not(kind: str) -> str:
    if any(word in kind for word in ("dpo", "kto", "orpo", "bradley", "chosen", "rejected", "reward", "stepwise")):
        return _RL
    return "a prompt that distft does not have; write the rows as prompt and completion, or as messages"


def _user_defined(one: Options) -> dict[str, Any]:
    """Fields, and the text around them, which can be said where there is none (prompt_strategies/user_defined.py)."""
    kind = one.group("type")
    instruction = kind.text("field_instruction") or "instruction"
    answer = kind.text("field_output") or "output"
    shapes = {kind.text(name) for name in ("format", "no_input_format")}
    kind.taken |= {"field_input", "field_system", "system_format"}
    if kind.is_on("system_prompt") or shapes != {"{instruction}"}:
        one.refuse("type", "it puts text around the fields of a row; write the rows as prompt and completion")
    kind.finish(("system_prompt",), "axolotl's type")
    return {"data.format": "prompt_completion", "data.columns": {"prompt": instruction, "completion": answer}}


def _chat(one: Options, kind: str) -> dict[str, Any]:
    """prompt_strategies/chat_template.py: field_messages is `messages`, the keys are role and content."""
    draft, mapping = one.draft, one.group("message_property_mappings").data
    is_sharegpt = kind == "sharegpt"
    role = mapping.get("role") or one.text("message_field_role") or ("from" if is_sharegpt else "role")
    content = mapping.get("content") or one.text("message_field_content") or ("value" if is_sharegpt else "content")
    messages = one.text("field_messages") or ("conversations" if is_sharegpt else "messages")
    for name in ("message_field_role", "message_field_content", "field_messages"):
        one.taken.add(name)
    if more := set(mapping) - {"role", "content"}:
        one.refuse("message_property_mappings", f"distft maps role and content alone, not {', '.join(sorted(more))}")
    columns = {"messages": messages, "role": role, "content": content}
    if tools := one.text("field_tools"):
        columns["tools"] = tools
    is_sharegpt = is_sharegpt or role == "from"
    result: dict[str, Any] = {"data.format": "sharegpt" if is_sharegpt else "messages"}
    usual = {"messages": "conversations", "role": "from", "content": "value"} if is_sharegpt else {}
    columns = {key: value for key, value in columns.items() if value != usual.get(key, key)}
    if columns:
        result["data.columns"] = columns
    if roles := _roles(one):
        result["data.roles"] = roles
    _what_is_trained(one)
    for name in ("field_thinking", "template_thinking_key"):
        if (key := one.text(name)) and key not in ("reasoning_content", "reasoning", "thinking"):
            one.refuse(name, "distft knows thoughts by reasoning_content, reasoning or thinking")
    if one.is_on("drop_system_message"):
        one.refuse("drop_system_message", "distft renders the messages that a row has; remove them from the rows")
    one.taken.add("drop_system_message")
    if one.is_on("split_thinking"):
        draft.warn(
            f"{one.path('split_thinking')}: thoughts within an answer are kept where the chat template keeps them"
        )
    one.taken.add("split_thinking")
    return result


def _roles(one: Options) -> dict[str, str]:
    given = one.group("roles").data
    found: dict[str, str] = {}
    for target, names in given.items():
        for name in names if isinstance(names, list) else [names]:
            if isinstance(name, str) and name != target:
                found[name] = target
    return {name: target for name, target in found.items() if _ROLES.get(name) != target}


def _what_is_trained(one: Options) -> None:
    trained = one.texts("roles_to_train")
    if trained and not set(trained) <= {"assistant", "gpt"}:
        one.refuse("roles_to_train", "distft trains on the assistant's turns")
    for name in ("train_on_eos", "train_on_eot"):
        if one.text(name) not in (None, "turn"):
            one.refuse(name, "distft trains on the end of every turn that is trained, and of no other")
    flag = one.text("message_field_training")
    if flag and flag not in ("weight", "train", "training", "loss"):
        one.refuse("message_field_training", "distft reads weight, train, training or loss; rename the field")
    if one.is_on("message_field_training_detail"):
        one.draft.warn(f"{one.path('message_field_training_detail')}: rows that have this field are refused")
    one.taken.add("message_field_training_detail")


def _chat_template(options: Options, data_sets: list[Options]) -> None:
    """utils/chat_templates/base.py: tokenizer_default, a name of axolotl's own, or jinja with its text or file. A data
    set's own wins over the file's."""
    names = ("chat_template", "chat_template_jinja")
    own = [one for one in data_sets if any(one.is_on(name) for name in names)]
    choices = {tuple(map(repr, map(one.data.get, names))) for one in own}
    if own and (len(choices) > 1 or (len(own) < len(data_sets) and options.is_on("chat_template"))):
        own[-1].refuse("chat_template", "a recipe has one chat template; this file has several")
    else:
        group = own[0] if own else options
        name, jinja = group.text("chat_template"), group.text("chat_template_jinja")
        if jinja:
            common.jinja(group, "chat_template_jinja", jinja)
        elif name and not name.startswith("tokenizer_default"):
            common.named_template(group, "chat_template", name, _TEMPLATES)
        elif name:
            group.drop("chat_template", "the tokenizer's own is the default")
    for one in (options, *data_sets):
        one.taken |= set(names)
    if options.take("chat_template_kwargs"):
        options.refuse("chat_template_kwargs", "distft takes them from the rows (chat_template_kwargs)")
