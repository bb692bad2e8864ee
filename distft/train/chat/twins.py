"""The versions of well-known chat templates that trl made for training: with `{% generation %}` marks, and some with
thoughts and ends of turns that the original leaves out."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


def training_version(source: str) -> Path | None:
    """The file of trl's version for training of a template that trl knows.

    (Its get_training_chat_template renders conversations with any template first, and fails where that fails.)
    """
    return _training_versions().get(source)


@lru_cache
def _training_versions() -> dict[str, Path]:
    import trl.chat_template_utils

    versions: dict[str, Path] = {}
    for path in (Path(trl.chat_template_utils.__file__).parent / "chat_templates").glob("*_training.jinja"):
        original = path.with_name(path.name.replace("_training", ""))
        if original.exists():
            versions[original.read_text(encoding="utf-8")] = path
    return versions
