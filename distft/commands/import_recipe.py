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


def import_recipe(
    words: Sequence[str], output: str, cluster_out: str | None, gpus: int | None, partial: bool = False
) -> Draft:
    """What becomes of a file, or of a command line (several words), as a recipe in the folder of `output`.

    Args:
        partial: what comes of it must be a recipe, even if options are refused.

    Raises:
        RecipeError: it cannot be read, or is no training file; or what comes of it is no recipe.
    """
    target = Path.cwd() if output == STANDARD_OUTPUT else Path(output).parent.resolve()
    draft = read_file(Path(words[0]), target, gpus) if len(words) == 1 else read_command(words, target, gpus)
    if draft.problems:
        raise RecipeError(draft.problems)
    if cluster_out and draft.cluster is None:
        raise RecipeError(f"--cluster-out: {draft.kind}'s file says nothing of the machines")
    if partial or not draft.refused:
        draft.check()
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
    files = {Path(output): recipe_text(draft)}
    files |= {Path(output).parent / name: text for name, text in draft.extra_files.items()}
    if cluster_out and draft.cluster is not None:
        files[Path(cluster_out)] = _comment(_profile_head(draft)) + dump_data(draft.cluster)
    for path in files:
        if path.exists() and not _has(path, files[path]):
            raise RecipeError(f"{path}: already exists; name another file, or remove it")
    written: list[Path] = []
    try:
        for path, text in files.items():
            if path.exists() and path.suffix == ".jinja":
                continue  # the same chat template
            with path.open("x", encoding="utf-8") as file:
                written.append(path)
                file.write(text)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise RecipeError(f"{path}: cannot be written ({(error.strerror or str(error)).lower()})") from None
    return written


def _has(path: Path, text: str) -> bool:
    """Whether a chat template of an earlier import is the same."""
    return path.suffix == ".jinja" and path.is_file() and path.read_bytes() == text.encode()


def recipe_text(draft: Draft) -> str:
    """The recipe's YAML. What it lacks stands at its top."""
    gpus = f", --gpus {draft.gpus}" if draft.gpus else ""
    part = ": a part of a recipe, to be put into a whole one" if draft.is_part else ""
    lines = [f"Imported from {draft.kind}'s {draft.file.name}{gpus}{part}"]
    if draft.refused:
        lines.append("Not the same training: this recipe lacks")
        lines += [f"  {in_words(item.option, item.value)} ({item.why})" for item in draft.refused]
    return "".join(map(_comment, lines)) + dump_data(draft.recipe())


def _profile_head(draft: Draft) -> str:
    return f"From {draft.kind}'s {draft.file.name}; review runs_dir: a folder on a file system that all nodes share"


def _comment(text: str) -> str:
    return f"# {clean(text)}\n"
