"""A recipe's local paths: what each must be, made absolute, and looked for on this machine."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from distft.config.schema_text import Steps, closest, did_you_mean


@dataclass(frozen=True)
class PathField:
    """A field that holds a path, or a list of them.

    `instead` matches what is allowed instead of a path. `absent` completes "PATH is not here" for a path that another
    machine may read; where it is None, a missing path is always an error. `cuts` gives the ways in which a text can be
    a path and what follows it (`data:train`).
    """

    steps: Steps
    is_there: Callable[[Path], bool]
    kind: str
    instead: re.Pattern[str] | None = None
    absent: str | None = None
    cuts: Callable[[str], Iterator[tuple[str, str]]] = lambda text: iter([(text, "")])


def data_cuts(text: str) -> Iterator[tuple[str, str]]:
    """The ways to read a text as the path of data, and the configuration and split after it: `data@config:train`.

    The whole text comes first: a file may have any name.
    """
    yield text, ""
    match = _AFTER.search(text)
    for start in sorted({match.start("split"), match.start()}, reverse=True) if match else ():
        if 0 < start < len(text):
            yield text[:start], text[start:]


def is_pattern(text: str) -> bool:
    return any(sign in text for sign in "*?[")


def matches(path: Path) -> list[Path]:
    """What an absolute path with `*`, `?`, `[…]` or `**` matches, sorted. Its folders that exist are taken as they are,
    whatever signs are in their names."""
    folder = next(above for above in path.parents if above.is_dir())
    names = glob.glob(str(path.relative_to(folder)), root_dir=folder, recursive=True)  # noqa: PTH207 (Path's skips links)
    return sorted(folder / name for name in names)


def data_is_there(path: Path) -> bool:
    return path.exists() or (is_pattern(str(path)) and bool(matches(path)))


_HUB_MODEL = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
HUB_PAGE = re.compile(r"(hf://|https://huggingface\.co/)datasets/(?=\w)")
_HUB_DATA = re.compile(rf"{HUB_PAGE.pattern}\S+|\w[\w.-]*/\w[\w.-]*(@[^\s:@]+)?(:[^/\s]+)?", re.ASCII)
_TEMPLATE_NAME = re.compile(r"\w[\w-]*")
_AFTER = re.compile(r"(@[^/@:]+)?(?P<split>(:\w+(\.\w+)*)?)$")
ROWS = "; its rows are not checked"

PATH_FIELDS = (
    PathField(("model", "name_or_path"), Path.is_dir, "folder", _HUB_MODEL),
    PathField(("lora", "start_from"), Path.is_dir, "folder"),
    PathField(("data", "train"), data_is_there, "file", _HUB_DATA, ROWS, data_cuts),
    PathField(("data", "eval"), data_is_there, "file", _HUB_DATA, ROWS, data_cuts),
    PathField(("data", "chat_template"), Path.is_file, "file", _TEMPLATE_NAME, "; launch needs it"),
)

ROWS_FILE = re.compile(r"\.(jsonl|ndjson|csv|tsv|parquet|arrow)(\.(gz|zst|bz2|xz))?$", re.IGNORECASE)
_FILE = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow|jinja)([.:]|$)", re.IGNORECASE)
_URL = re.compile(r"[a-zA-Z][\w+.-]*://")


def is_url(text: str) -> bool:
    return bool(_URL.match(text))


def is_allowed_instead(text: str, field: PathField) -> bool:
    """Whether a text that is no local path is what the field allows instead: something on the hub, or a name."""
    if not (field.instead and field.instead.fullmatch(text)):
        return False
    return bool(HUB_PAGE.match(text)) or not _FILE.search(text)


def is_in_a_folder_here(path: Path, text: str, field: PathField) -> bool:
    """Whether what could be the id of a data set on the hub is meant as a path: its first part is a folder here."""
    return field.instead is _HUB_DATA and not HUB_PAGE.match(text) and holds(Path.is_dir, path.parent)


def locate(folder: Path, text: str) -> Path:
    """The absolute path. A link as its last part is kept: in the hub's cache it points to a name without a suffix."""
    try:
        path = folder / Path(text).expanduser()
        return path.resolve() if path.name == ".." else path.parent.resolve() / path.name
    except (OSError, ValueError, RuntimeError):  # a NUL, links in a circle, ~ of an unknown user
        return folder.absolute() / text


def locate_data(folder: Path, text: str) -> tuple[Path, str]:
    """The absolute path of local data, and the configuration and split named after it. Where nothing is there, the
    shortest path."""
    return find(folder, text, PATH_FIELDS[2])


def find(folder: Path, text: str, field: PathField) -> tuple[Path, str]:
    """The absolute path in a field's text, and what follows it. Of several ways to read the text, the first whose path
    is there, else the last."""
    found = [(locate(folder, path), after) for path, after in field.cuts(text)]
    return next(((path, after) for path, after in found if holds(field.is_there, path)), found[-1])


def holds(test: Callable[[Path], bool], path: Path) -> bool:
    """Whether `test` holds for a path; false for one that cannot be looked at."""
    try:
        return test(path)
    except (OSError, ValueError):  # too long, a NUL, a folder that may not be entered
        return False


def missing(path: Path, kind: str) -> str:
    """`no such file`, to be put before a path that is not there: or that nobody may look."""
    try:
        path.stat()
    except PermissionError:
        return "no permission to look at"
    except (OSError, ValueError):
        pass
    return f"no such {kind}"


def hint(path: Path, text: str, field: PathField) -> str:
    """What may have been meant by a path that is not there."""
    is_word = field.instead in (_HUB_MODEL, _HUB_DATA) and not re.search(r"/|\.", text)
    return near(path) or "; a hub id is owner/name" * is_word


def near(path: Path) -> str:
    """`; did you mean NAME?` after an error about a missing path: the name in its folder that is most like its own."""
    stems: dict[str, list[str]] = {}  # compared by themselves: a suffix that they share does not make two names alike
    try:
        for other in itertools.islice(path.expanduser().parent.iterdir(), 5000):
            if other.name != path.name:
                stems.setdefault(other.stem, []).append(other.name)
    except (OSError, ValueError, RuntimeError):
        return ""
    stem = closest(path.stem, list(stems))
    return did_you_mean(closest(path.name, stems[stem], 0) if stem else None)
