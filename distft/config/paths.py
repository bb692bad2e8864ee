"""A recipe's local paths: what each must be, made absolute, and looked for on this machine."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distft.config.schema_text import Steps, closest, did_you_mean


@dataclass(frozen=True)
class PathField:
    """A field that holds a path, or a list of them.

    `hub_id` matches what is allowed instead of a path. `absent` completes "PATH is not here" for a path that another
    machine may read; where it is None, a missing path is always an error.
    """

    steps: Steps
    is_there: Callable[[Path], bool]
    kind: str
    hub_id: re.Pattern[str] | None = None
    absent: str | None = None


_HUB_MODEL = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_HUB_DATA = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[^/\s]+)?", re.ASCII)
ROWS = "; its rows are not checked"

PATH_FIELDS = (
    PathField(("model", "name_or_path"), Path.is_dir, "folder", _HUB_MODEL),
    PathField(("lora", "start_from"), Path.is_dir, "folder"),
    PathField(("data", "train"), Path.exists, "file", _HUB_DATA, ROWS),
    PathField(("data", "eval"), Path.exists, "file", _HUB_DATA, ROWS),
    PathField(("data", "chat_template"), Path.is_file, "file", absent="; launch needs it"),
)

_FILE = re.compile(r"\.(jsonl?|csv|parquet|jinja)([.:]|$)")
_URL = re.compile(r"[a-zA-Z][\w+.-]*://")


def is_url(text: str) -> bool:
    return bool(_URL.match(text))


def is_hub_id(text: str, field: PathField) -> bool:
    """Whether a text that is no local path names a model or data set of the hub."""
    return bool(field.hub_id and field.hub_id.fullmatch(text) and not _FILE.search(text))


def locate(folder: Path, text: str) -> Path:
    """The absolute path. A link as its last part is kept: in the hub's cache it points to a name without a suffix."""
    try:
        path = folder / Path(text).expanduser()
        return path.resolve() if path.name == ".." else path.parent.resolve() / path.name
    except (OSError, ValueError, RuntimeError):  # a NUL, links in a circle, ~ of an unknown user
        return folder.absolute() / text


def holds(test: Callable[[Path], bool], path: Path) -> bool:
    """Whether `test` holds for a path; false for one that cannot be looked at."""
    try:
        return test(path)
    except (OSError, ValueError):  # too long, a NUL, a folder that may not be entered
        return False


def hint(path: Path, text: str, field: PathField) -> str:
    """What may have been meant by a path that is not there."""
    is_word = field.hub_id is not None and not re.search(r"/|\.", text)
    return did_you_mean(nearby(path)) or "; a hub id is owner/name" * is_word


def nearby(path: Path) -> str | None:
    """The existing name in the same folder that is most like a missing path's."""
    try:
        names = [other.name for other in itertools.islice(path.parent.iterdir(), 5000)]
        return closest(path.name, [name for name in names if name != path.name])
    except (OSError, ValueError):
        return None
