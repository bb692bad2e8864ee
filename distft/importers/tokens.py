"""Whether the tokenizer has the tokens that a recipe needs: the file's special tokens, and those of a chat template of
another model. `validate` refuses a recipe without them; the other tools add them, or split them into pieces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from distft.importers.draft import Draft
from distft.models.vocabulary import control_tokens, vocabulary


def add_missing(draft: Draft) -> None:
    """Add to model.add_tokens what the tokenizer does not have; a warning where it is not on this machine."""
    fields = draft.fields
    before: list[str] = fields.get("model.add_tokens", [])
    special = [fields[name] for name in ("model.eos_token", "model.pad_token") if name in fields]
    of_template = control_tokens(_template(draft))
    needed = [token for token in dict.fromkeys([*special, *of_template]) if token not in before]
    if not needed:
        return
    name = str(fields["model.name_or_path"])
    known = vocabulary(
        str(draft.target / name) if (draft.target / name).is_dir() else name, fields.get("model.revision")
    )
    if known is None:
        draft.warn(
            f"model.add_tokens: the tokenizer of {name} is not on this machine, so whether it has {', '.join(needed)} "
            "is not known. Where it is, distft validate says which it lacks; add those to the recipe, at most "
            f"model.add_tokens: {_list(before + needed)}"
        )
        return
    if missing := [token for token in needed if token not in known]:
        split = [token for token in missing if token not in special]
        in_pieces = split and draft.kind != "LLaMA-Factory"  # which adds them, too
        why = f"; {draft.kind} would train {', '.join(split)} in pieces" if in_pieces else ""
        draft.set("model.add_tokens", before + missing, "tokens that the tokenizer does not have", missing)
        draft.warn(f"model.add_tokens: the tokenizer of {name} lacks {', '.join(missing)}, which are added{why}")


def _template(draft: Draft) -> str:
    """The chat template that the recipe brings along."""
    if draft.template is not None:
        return draft.template
    file = draft.fields.get("data.chat_template")
    try:
        return "" if file is None else (draft.target / Path(file)).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _list(tokens: Sequence[str]) -> str:
    return json.dumps(tokens, ensure_ascii=False)
