"""Data sets on the Hugging Face Hub: which commit, which files, and where they are once downloaded; models' commits.

A revision is resolved to its commit first, so that all files are of one version and the prepared data's key names it.
Offline, the commit and the files are those in the hub's cache.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

from distft.config.paths import HUB_PAGE
from distft.errors import DataError, MissingPartError, first_line

_REVISION = r"refs/(?:convert/[^/@:]+|pr/[0-9]+)|[^/@:]+"
_PATH = re.compile(
    rf"(?P<repo>[^/@:]+/[^/@:]+)(@(?P<revision>{_REVISION}))?(?P<path>/[^@:]*)?(?P<after>(@[^/@:]+)?(:[^/@]+)?)"
)
_ID = re.compile(r"(?P<repo>[^/@:]+/[^/@:]+)(@(?P<revision>[^@:]+))?(?P<path>)(?P<after>(:[^/@]+)?)")
_PAGE = re.compile(r"^(?P<repo>[^/]+/[^/]+)/(?:tree|blob|resolve)/(?P<revision>refs%2F[^/]+|[^/]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"(?P<name>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5}).*")


@dataclass(frozen=True)
class HubFile:
    """A file of a data set at a commit."""

    repo: str
    commit: str
    name: str

    def download(self) -> Path:
        """Where it is in the hub's cache; downloaded if it is not there.

        Raises:
            DataError: it cannot be downloaded, or is not in the cache of a machine that is offline.
        """
        return _download(self.repo, self.commit, self.name)


@dataclass(frozen=True)
class HubData:
    """A data set, or with `path` a file or folder in it. `revision`: a branch, tag or commit."""

    repo: str
    revision: str = "main"
    path: str = ""

    @property
    def commit(self) -> str:
        """Raises DataError where it cannot be found out."""
        return _commit(self.repo, self.revision)

    def names(self) -> list[str]:
        """All its files."""
        return _names(self.repo, self.commit)

    def text(self, name: str) -> str | None:
        """A text file at its top, such as README.md; None where there is none."""
        if name not in self.names():
            return None
        return _download(self.repo, self.commit, name).read_text(encoding="utf-8", errors="replace")


def parse_hub(text: str) -> tuple[HubData, str]:
    """What a text names on the hub, and the configuration and split after it.

    The forms are those of the documentation of data.train, and the addresses of the hub's pages.

    Raises:
        DataError: none of them.
    """
    page = HUB_PAGE.match(text)
    if page and not text.startswith("hf:"):
        text = _PAGE.sub(
            lambda match: f"{match['repo']}@{unquote(match['revision'])}", text[page.end() :].partition("?")[0]
        )
    match = (_PATH if page else _ID).fullmatch(text.removeprefix(page[0]) if page else text)
    if match is None:
        raise DataError(f"{text}: need owner/name, owner/name@revision, or hf://datasets/owner/name/path")
    return HubData(match["repo"], unquote(match["revision"] or "main"), (match["path"] or "").strip("/")), match[
        "after"
    ]


def pinned(text: str) -> str:
    """The same data at the commit that its revision stands for now: for what must not change while a run goes on.

    Raises:
        DataError: the commit cannot be found out.
    """
    data, after = parse_hub(text)
    where = f"{data.repo}@{data.commit}"
    return f"hf://datasets/{where}/{data.path}{after}" if data.path else where + after


@lru_cache
def model_commit(name: str, revision: str | None) -> str | None:
    """The commit of a model of the hub, which its tokenizer and chat template belong to; None where it cannot be found
    out: what loads the model says why."""
    revision = revision or "main"
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        hub = _library()
    except MissingPartError:
        return None
    if not hub.constants.HF_HUB_OFFLINE:
        with suppress(Exception):  # the hub client's own, the HTTP library's, OSError
            return str(hub.HfApi().model_info(name, revision=revision, timeout=10).sha)
    with suppress(OSError):  # that of the copy which is loaded then
        return (_cache(name, "models") / "refs" / revision).read_text().strip()
    return None


def _library() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ImportError:
        raise MissingPartError('a data set of the hub needs pip install "distft[train]"') from None
    return huggingface_hub


@lru_cache
def _commit(repo: str, revision: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    hub = _library()
    if not hub.constants.HF_HUB_OFFLINE:
        try:
            commit = str(hub.HfApi().dataset_info(repo, revision=revision).sha)
        except Exception as error:  # the hub client's own, the HTTP library's, OSError
            raise DataError(_refusal(repo, revision, error)) from None
        _note(_cache(repo) / "refs" / revision, commit)
        return commit
    try:
        return (_cache(repo) / "refs" / revision).read_text().strip()
    except OSError:
        raise DataError(
            f"{repo}@{revision}: no such file here, and not in the hub's cache; HF_HUB_OFFLINE is set: name the "
            "commit, or unset it"
        ) from None


def _note(ref: Path, commit: str) -> None:
    """Write down where the hub's client looks for it too, for when this machine is offline."""
    with suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


def _refusal(repo: str, revision: str, error: Exception) -> str:
    name = type(error).__name__
    if name == "RepositoryNotFoundError":
        return f"{repo}: no such data set on the hub, and no such file here; or it is private, then set HF_TOKEN"
    if name == "RevisionNotFoundError":
        return f"{repo}: no revision {revision}"
    if name == "GatedRepoError":
        return (
            f"{repo}: access must be asked for on its page, https://huggingface.co/datasets/{repo}; then set HF_TOKEN"
        )
    return f"{repo}@{revision}: the hub cannot be asked ({first_line(error)})"


def _cache(repo: str, kind: str = "datasets") -> Path:
    return Path(_library().constants.HF_HUB_CACHE) / f"{kind}--{repo.replace('/', '--')}"


@lru_cache
def _names(repo: str, commit: str) -> list[str]:
    hub = _library()
    if not hub.constants.HF_HUB_OFFLINE:
        try:
            return [str(name) for name in hub.HfApi().list_repo_files(repo, repo_type="dataset", revision=commit)]
        except Exception as error:
            raise DataError(_refusal(repo, commit, error)) from None
    folder = _cache(repo) / "snapshots" / commit
    names = sorted(str((Path(at) / name).relative_to(folder)) for at, _, below in os.walk(folder) for name in below)
    if not names:
        raise DataError(f"{repo}@{commit[:7]}: not in the hub's cache, and HF_HUB_OFFLINE is set")
    _check_shards(names, f"{repo}@{commit[:7]}")
    return names


def _check_shards(names: list[str], where: str) -> None:
    """Raises DataError where only some of the shards of a split were downloaded."""
    present: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(_SHARD.fullmatch, names)):
        present.setdefault((match["name"], match["count"]), set()).add(int(match["number"]))
    for (name, count), numbers in present.items():
        if missing := sorted(set(range(int(count))) - numbers):
            shard = f"{name}-{missing[0]:05}-of-{count}"
            raise DataError(f"{where}: {shard} is not in the hub's cache, and HF_HUB_OFFLINE is set")


def _download(repo: str, commit: str, name: str) -> Path:
    hub = _library()
    try:
        return Path(hub.hf_hub_download(repo, name, repo_type="dataset", revision=commit))
    except Exception as error:
        raise DataError(f"{repo}@{commit[:7]}/{name}: cannot be downloaded ({first_line(error)})") from None
