"""`distft import`: read another tool's file, check the recipe that comes of it, and write it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distft.config.document import dump_data
from distft.config.schema_text import clean
from distft.errors import RecipeError
from distft.importers.draft import Draft, in_words
from distft.importers.kinds import read_command, read_file

STANDARD_OUTPUT = "-"
_FILL_IN = {
    "name": "what the run is called",
    "model.name_or_path": "a folder, or a hub id: owner/name",
    "data.train": "a file, a folder, or a hub id: owner/name",
}


def import_recipe(
    words: Sequence[str], output: str, cluster_out: str | None, gpus: int | None, partial: bool = False
) -> Draft:
    """What becomes of a file, or of a command line (several words), as a recipe in the folder of `output`.

    Args:
        partial: what comes of it is written even if options are refused, with comments for what it lacks.

    Raises:
        RecipeError: it cannot be read, or is no training file; or what comes of it is no recipe.
    """
    file = Path("recipe.yaml" if output == STANDARD_OUTPUT else output)
    target = file.parent.resolve()
    if len(words) == 1:
        draft = read_file(Path(words[0]), target, gpus, file.stem)
    else:
        draft = read_command(words, target, gpus, file.stem)
    if draft.problems:
        raise RecipeError(draft.problems)
    if cluster_out and draft.cluster is None:
        raise RecipeError(f"--cluster-out: {draft.kind}'s file says nothing of the machines")
    if partial or not draft.refused:
        draft.check(partial and bool(draft.refused))
    if output == STANDARD_OUTPUT and draft.template is not None:
        draft.warn(f"data.chat_template: {draft.template_file} is written beside a recipe alone: name a file with -o")
    return draft


def refusal(draft: Draft) -> str:
    """What cannot be trained the same way, as an error."""
    number = f"{len(draft.refused)} option{'s' * (len(draft.refused) > 1)}"
    return (
        f"{clean(str(draft.file))}: {number} cannot be trained the same way, so nothing was written; --partial writes "
        "the recipe without them"
    )


def write(draft: Draft, output: str, cluster_out: str | None) -> list[Path]:
    """Write the recipe, the chat template that came with it, and the cluster profile. All or nothing.

    Raises:
        RecipeError: one of them exists, or cannot be written.
    """
    template = Path(output).with_name(draft.template_file)
    files = {} if draft.template is None else {template: draft.template}
    if Path(output) in files:
        raise RecipeError(f"-o {output}: the chat template is written to {template}; name the recipe .yaml")
    files[Path(output)] = recipe_text(draft)
    if cluster_out and draft.cluster is not None:
        files[Path(cluster_out)] = _comment(_profile_head(draft)) + dump_data(draft.cluster)
    for path, text in files.items():
        if path.exists() and not (path == template and _is_same(path, text)):
            fix = "name another recipe with -o, after which it is called" if path == template else "name another file"
            raise RecipeError(f"{path}: already exists; {fix}, or remove it")
    written: list[Path] = []
    try:
        for path, text in files.items():
            if path == template and path.exists():
                continue  # of an earlier import
            with path.open("x", encoding="utf-8") as file:
                written.append(path)
                file.write(text)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise RecipeError(f"{path}: cannot be written ({(error.strerror or str(error)).lower()})") from None
    return written


def _is_same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def recipe_text(draft: Draft) -> str:
    """The recipe's YAML. What it lacks stands at its top."""
    gpus = f", --gpus {draft.gpus}" if draft.gpus else ""
    part = ": a part of a recipe, to be put into a whole one" if draft.is_part else ""
    lines = [f"Imported from {draft.kind}'s {draft.file.name}{gpus}{part}"]
    if draft.refused:
        lines.append("Not the same training: this recipe lacks")
        lines += [f"  {in_words(item.option, item.value)} ({item.why})" for item in draft.refused]
    if draft.refused and draft.lacks() and not draft.is_part:
        lines.append("To be filled in, before it is a recipe")
        lines += [f"  {name}: {_FILL_IN[name]}" for name in draft.lacks()]
    return "".join(map(_comment, lines)) + dump_data(draft.recipe())


def _profile_head(draft: Draft) -> str:
    return f"From {draft.kind}'s {draft.file.name}; review runs_dir: a folder on a file system that all nodes share"


def _comment(text: str) -> str:
    return f"# {clean(text)}\n"
