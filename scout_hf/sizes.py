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
