"""How a run ended: `python -m distft.schedulers.conclude RUN_DIR EXIT_STATUS`, the last step of a job."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from distft.errors import RunError
from distft.failure import first_failure
from distft.run_dir import RunDir


def conclude(run: RunDir, returncode: int) -> dict[str, Any]:
    """Write the end of a run into status.json, unless it did so itself.

    Raises:
        RunError: it failed; the message says why.
    """
    status = run.read_status()
    if status.get("state") == "completed":
        return status
    if returncode == 0 and not run.recipe.exists():  # a script of one's own says nothing of itself
        return run.update_status(state="completed", ended=time.time(), reason=None)
    failure = first_failure(run, returncode)
    run.update_status(state="failed", ended=time.time(), reason=failure.reason, exit_status=returncode)
    raise RunError(failure.text)


if __name__ == "__main__":
    try:
        conclude(RunDir(Path(sys.argv[1])), int(sys.argv[2]))
    except RunError as error:
        sys.exit(f"failed: {next(iter(str(error).splitlines()))}")
