"""The errors that a user can fix. The command line prints them without a traceback and exits with their status.

Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class DistftError(Exception):
    """The request is wrong: nothing was started or written. `exit_status` is that of the process."""

    exit_status = 2


class RecipeError(DistftError):
    """The problems of a recipe, all at once, one line each in `problems`."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ClusterError(DistftError):
    """A topology or cluster that is not available."""


class PlanError(DistftError):
    """A combination that cannot train: the rule, and the fix."""


class SubmitError(DistftError):
    """The scheduler refused the job."""


class DataError(DistftError):
    """Training data that cannot be used: file, line and field."""


class MissingPartError(DistftError):
    """An optional part of distft is not installed; the message has the pip command."""


class RunError(DistftError):
    """The run started and failed."""

    exit_status = 1


class Hang(RunError):
    """No step has ended for too long."""
