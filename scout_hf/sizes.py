"""Sizes of memory, and times, as people write them."""

from __future__ import annotations

import re


def bytes_of(size: int | str) -> int:
    """Bytes of ``"8GiB"``, ``"500 MB"`` or a number of bytes; ValueError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", str(size), re.IGNORECASE)
    if found is None:
        raise ValueError(f"{size!r} is no size")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


def in_words(size: float) -> str:
    """A size as people read it.

    Examples
    --------
    >>> from scout_hf.sizes import in_words
    >>> in_words(1.5 * 2**30), in_words(20_000), in_words(12)
    ('1.5 GiB', '19.5 KiB', '12 bytes')
    """
    power = 0
    while size >= 1024 and power < 4:
        size, power = size / 1024, power + 1
    return f"{size:.1f} {' KMGT'[power]}iB" if power else f"{size:.0f} bytes"


def time_in_words(seconds: float) -> str:
    """A short time as people read it, in three digits or more.

    Examples
    --------
    >>> from scout_hf.sizes import time_in_words
    >>> time_in_words(1.8), time_in_words(0.0042), time_in_words(75)
    ('1800 ms', '4.20 ms', '75.0 s')
    """
    if seconds >= 10:
        return f"{seconds:.1f} s"
    ms = seconds * 1e3
    return f"{ms:.{0 if ms >= 99.95 else 1 if ms >= 9.995 else 2}f} ms"
