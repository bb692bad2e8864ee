"""logs/stop: how the launcher and the job script ask the ranks to save and stop. An empty file asks for nothing."""

from __future__ import annotations

from distft.runs.directory import RunDir


def ask_to_stop(run: RunDir, why: str) -> None:
    run.stop.write_text(f"{why}\n")


def stop_asked(run: RunDir) -> str | None:
    """Why the run was asked to stop; None if it was not."""
    try:
        return run.stop.read_text().strip() or None
    except OSError:
        return None
