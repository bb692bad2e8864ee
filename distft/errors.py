"""The errors that a user can fix. The command line prints them without a traceback and exits with their status.

Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class DistftError(Exception):
    """The request is wrong: nothing was started or written. `exit_status` is that of the process."""

    exit_status = 2


class RecipeError(DistftError):
    """The problems of a recipe, all at once, one line each in `problems`. `read`: the file and its data, where it was
    read as YAML: it may be no recipe at all. `loaded`: a LoadedRecipe, where nothing but its data is wrong."""

    read: tuple[str, Mapping[str, Any]] | None = None
    loaded: Any = None

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ClusterError(DistftError):
    """A topology or cluster that is not available."""


class PlanError(DistftError):
    """A combination that cannot train: the rule, and the fix."""


class NoModelError(PlanError):
    """A model that is neither here nor on the hub."""


class SubmitError(DistftError):
    """The scheduler refused the job."""


class DataError(DistftError):
    """Training data that cannot be used: file, line and field."""


class NoTokenizerError(DataError):
    """The model's tokenizer cannot be read here."""


class SimulationError(PlanError):
    """A model whose memory cannot be counted on fake tensors."""


class MissingPartError(DistftError):
    """An optional part of distft is not installed; the message has the pip command."""


class RunError(DistftError):
    """The run started and failed."""

    exit_status = 1


class Hang(RunError):
    """No step has ended for too long."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type's name where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def in_one_line(error: BaseException) -> str:
    """An error by its type and the first line of its message."""
    name, text = type(error).__name__, first_line(error)
    return name if text == name else f"{name}: {text}"
