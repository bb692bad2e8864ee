"""What a path in data.train or data.eval stands for: its files, and what of a folder is left out and why.

Nothing is read here but README.md: a file may still turn out to be damaged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Literal

from distft.config.paths import is_pattern, locate_data, matches
from distft.config.recipe import Data, Source
from distft.config.schema_text import closest
from distft.data import splits
from distft.data.files import COMPRESSIONS, KINDS, SUFFIXES, DataFile, Found, LeftOut, kind_of, named_file, why_not
from distft.data.folder import Folder, local_folder
from distft.data.hub import HubFile, parse_hub
from distft.data.overlap import without_evaluated
from distft.data.splits import TEST, TRAIN, VALIDATION, Splits
from distft.errors import DataError

Use = Literal["train", "eval"]


def as_sources(value: str | float | Sequence[str | Source] | None) -> list[Source]:
    """data.train or data.eval as a list; empty for a fraction."""
    if value is None or isinstance(value, float):
        return []
    several = [value] if isinstance(value, str) else value
    return [Source(path=source) if isinstance(source, str) else source for source in several]


def find_data(data: Data, wanted: Callable[[Source], bool] = lambda source: True) -> dict[Use, list[Found]]:
    """The files of data.train, and of data.eval where it is not a fraction; of the sources for which `wanted` holds.

    Raises:
        DataError: a path that stands for nothing, or files that would be both trained on and evaluated.
    """
    train = [find(source, "train") for source in as_sources(data.train) if wanted(source)]
    evaluated = [find(source, "eval") for source in as_sources(data.eval) if wanted(source)]
    return {"train": without_evaluated(train, evaluated), "eval": evaluated}


def find(source: Source, use: Use) -> Found:
    """The files of one source of a loaded recipe, whose local paths are absolute.

    Raises:
        DataError: it stands for nothing, or for what cannot be read.
    """
    if not Path(source.path).is_absolute():
        return _find_on_hub(source, use)
    path, after = locate_data(Path("/"), source.path)
    config, split = _after(source, after)
    if path.is_dir():
        return _find_in(source, local_folder(path), config, split, use)
    if config or split:
        raise DataError(f"{source.path}: no such folder")
    if path.exists() or not is_pattern(str(path)):
        return Found(source, (named_file(path),), is_named=True)
    files, left_out = [], []
    for match in matches(path):
        kind = kind_of(match.name)
        if kind and match.is_file() and match.name not in splits.IGNORED:
            files.append(DataFile(str(match), *kind, match))
        else:
            why = "a folder (** matches what is in it)" if match.is_dir() else why_not(match)
            left_out.append(LeftOut(str(match), "metadata" if match.name in splits.IGNORED else why))
    if not files:
        raise DataError(f"{source.path}: no data file matches; need {SUFFIXES}")
    return Found(source, tuple(files), tuple(left_out), folder=str(path.parent))


def _after(source: Source, after: str) -> tuple[str | None, str | None]:
    """The configuration and split that `@config:split` names."""
    config, _, split = after.removeprefix("@").partition(":") if after.startswith("@") else ("", "", after[1:])
    if config and source.config and config != source.config:
        raise DataError(f"{source.path}: config says {source.config}; give one of the two")
    return config or source.config, split or None


def _find_in(source: Source, folder: Folder, config: str | None, split: str | None, use: Use) -> Found:
    where = folder.where
    if folder.splits is not None:
        if config:
            raise DataError(f"{source.path}: what save_to_disk wrote has no configurations")
        found = Splits(dict(folder.splits), "save_to_disk")
    else:
        configs = splits.read_configs(folder.text(splits.README), folder.text(splits.YAML), where)
        found = splits.find_splits(folder.names, splits.choose_config(configs, config, where), where)
    if not any(found.files.values()):
        left = "; ".join(dict.fromkeys(f"{one.name}: {one.why}" for one in folder.left_out[:4]))
        raise DataError(f"{source.path}: no data file in {folder.subject}; need {SUFFIXES}" + f" ({left})" * bool(left))
    in_some = {name for names in found.files.values() for name in names}
    others = [name for name in folder.names if name not in in_some and not splits.is_unusual(name)]
    taken = _choose(found.files, split, use, source.path, others)
    chosen = found.files[taken]
    reasons = {name: f"split {other}" for other, names in reversed(list(found.files.items())) for name in names}
    reasons |= dict.fromkeys(chosen, "of another kind")
    files: dict[object, DataFile] = {}
    for name in _of_one_kind(chosen) if folder.is_of_one_kind else chosen:
        file = replace(folder.file(name), separator=found.separator)
        same = files.setdefault(file.identity(), file)
        if same is not file:
            reasons[name] = f"the same file as {same.name.removeprefix(where).lstrip('/')}"
    _check_twins(chosen, source.path)
    used = {file.name.removeprefix(f"{where}/") for file in files.values()}
    left_out = [
        LeftOut(f"{where}/{name}", reasons.get(name) or ("hidden" if splits.is_unusual(name) else "in no split"))
        for name in folder.names
        if name not in used
    ]
    return Found(source, tuple(files.values()), (*folder.left_out, *left_out), taken, found.how, where)


def _choose(
    files: Mapping[str, list[str]], wanted: str | None, use: Use, where: str, others: Sequence[str] = ()
) -> str:
    """The split that is used. `others`: files in no split."""
    present = [split for split, names in files.items() if names]
    if wanted is None:
        wanted = next(
            (split for split in ((TRAIN,) if use == "train" else (VALIDATION, TEST)) if split in present), None
        )
        if wanted is None and use == "eval" and len(present) == 1:
            wanted = present[0]
    if wanted in present:
        return wanted
    names = ", ".join(present)
    what = f"no split {wanted}" if wanted else "no split train" if use == "train" else "no split validation or test"
    base = re.sub(r":[^/:]*$", "", where)
    near = next((split for split in present if wanted and wanted in splits.KEYWORDS.get(split, ())), None)
    near = near or (closest(wanted, present) if wanted else None) or present[0]
    if wanted is None and use == "train" and others:
        some = ", ".join(others[:3]) + f" and {len(others) - 3} more" * (len(others) > 3)
        raise DataError(
            f"{where}: {what}: beside the files of {names}, {some} count to no split; name what is trained on, as in "
            f"{base}/{others[0]}, or put train into its name"
        )
    raise DataError(f"{where}: {what}; it has {names}: name one after a colon, as in {base}:{near}")


def _find_on_hub(source: Source, use: Use) -> Found:
    hub, after = parse_hub(source.path)
    config, split = _after(source, after)
    where = f"{hub.repo}@{hub.commit[:7]}"
    every = hub.names()

    def file(name: str) -> DataFile:
        kind = kind_of(name)
        assert kind is not None
        return DataFile(f"{where}/{name}", *kind, hub=HubFile(hub.repo, hub.commit, name))

    if hub.path in every:
        if kind_of(hub.path) is None:
            raise DataError(f"{source.path}: no data file; need {SUFFIXES}")
        return Found(source, (file(hub.path),), is_named=True)
    top = f"{hub.path}/" if hub.path else ""
    below = [name.removeprefix(top) for name in every if name.startswith(top)]
    if not below:
        raise DataError(f"{source.path}: no such file or folder in {where}")
    names = [name for name in below if kind_of(name) and PurePath(name).name not in splits.IGNORED]
    left_out = [
        LeftOut(f"{where}/{top}{name}", f"not a data file ({PurePath(name).suffix})")
        for name in below
        if not kind_of(name) and name not in (splits.README, ".gitattributes")
    ]
    folder = Folder(
        f"{where}/{top}".rstrip("/"),
        names,
        left_out,
        lambda name: None if hub.path else hub.text(name),
        lambda name: file(top + name),
        subject="this data set",
        is_of_one_kind=True,
    )
    return _find_in(source, folder, config, split, use)


def _of_one_kind(names: list[str]) -> list[str]:
    """The files that `datasets` reads of a data set: those of the most frequent kind."""
    kinds = [(kind_of(name) or ("", None))[0].replace("jsonl", "json") for name in names]
    most = max(kinds, key=lambda kind: (kinds.count(kind), kind == "parquet", kind == "arrow", kind == "json"))
    return [name for name, kind in zip(names, kinds, strict=True) if kind == most]


def _check_twins(names: Iterable[str], where: str) -> None:
    """Raises DataError for two files that differ in their suffix only: the same rows in two forms, most likely."""
    suffixes = re.compile(rf"({'|'.join(KINDS)})({'|'.join(COMPRESSIONS)})?$".replace(".", r"\."), re.IGNORECASE)
    stems: dict[str, str] = {}
    for name in names:
        stem = suffixes.sub("", name)
        other = stems.setdefault(stem, name)
        if other != name:
            raise DataError(
                f"{where}: {other} and {name} have the same name, and may hold the same rows; name the files, or use a "
                f"pattern such as {where.partition(':')[0]}/*{PurePath(name).suffix}"
            )
