"""What the card of a base model says of it that the card of a model made from it must say, too: its licence."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import yaml

from distft.config.recipe import Model

FRONT_MATTER = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(\r?\n|$)", re.DOTALL)
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a folder of the hub's cache
SECONDS = 3  # that the hub may take to answer: a run does not wait for its licence


def base_card(model: Model) -> dict[str, str]:
    """`id` on the hub, `license`, `license_name` and `license_link` of the base; what is not known is left out."""
    folder = Path(model.name_or_path)
    if local := folder.is_dir():
        cached = next((match for part in folder.parts if (match := CACHED.fullmatch(part))), None)
        found = {"id": f"{cached[1]}/{cached[2]}"} if cached else {}
    else:
        found = {"id": model.name_or_path}
    readme = folder / "README.md" if local else _of_the_hub(model)
    given = _front_matter(readme) if readme and readme.is_file() else {}
    names = ("license", "license_name", "license_link")
    return found | {name: given[name] for name in names if isinstance(given.get(name), str)}


def _of_the_hub(model: Model) -> Path | None:
    """The README.md of a model on the hub; None where it has none, or cannot be read from here."""
    with contextlib.suppress(Exception):  # the hub's errors, httpx's, OSError: all of them mean that it is not known
        import huggingface_hub as hub

        name, revision = model.name_or_path, model.revision
        cached = hub.try_to_load_from_cache(name, "README.md", revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        return Path(hub.hf_hub_download(name, "README.md", revision=revision, etag_timeout=SECONDS))
    return None


def _front_matter(readme: Path) -> dict[str, Any]:
    match = FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace"))
    with contextlib.suppress(yaml.YAMLError):
        given = yaml.safe_load(match[1]) if match else None
        return given if isinstance(given, dict) else {}
    return {}
