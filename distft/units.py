"""Sizes and times as people read them."""

from __future__ import annotations

GIB = 2**30


def gib(size: float) -> str:
    """Bytes as text, in MiB where that is more readable."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def plural(count: int, noun: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def short(seconds: float) -> str:
    """Seconds to three significant figures, without an exponent."""
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"
