"""How far the preparation is, on the terminal of the command that waits for it."""

from __future__ import annotations

import os
import time

from distft.data.cache import PROGRESS_FD

SECONDS = 0.5  # between two updates


class Progress:
    """One line that is overwritten: rows so far, and rows per second."""

    def __init__(self, what: str):
        self.what = what
        descriptor = os.environ.get(PROGRESS_FD)
        self.descriptor = int(descriptor) if descriptor else None
        self.started = time.monotonic()
        self.shown = self.started  # the first update comes after SECONDS: few rows need none

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *problem: object) -> None:
        """Clear the line."""
        if self.shown > self.started:
            self._write("\r\x1b[K")

    def show(self, rows: int) -> None:
        now = time.monotonic()
        if self.descriptor is not None and now - self.shown >= SECONDS:
            self.shown = now
            self._write(f"\r{self.what}: {rows:,} rows, {rows / (now - self.started):,.0f} rows/s\x1b[K")

    def _write(self, text: str) -> None:
        if self.descriptor is not None:
            os.write(self.descriptor, text.encode())
