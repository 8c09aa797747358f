"""Sizes of memory as people write them."""

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
