"""Prompts that are too long lose their middle, as LongBench has it: instructions stand at either end."""

from __future__ import annotations

from collections.abc import Sequence

TRUNCATIONS = ("middle", "left")


def truncate(ids: Sequence[int], limit: int, how: str) -> list[int]:
    """At most ``limit`` tokens of a prompt.

    Parameters
    ----------
    ids : sequence of int
        The whole prompt, special tokens included.
    limit : int
        Tokens that there is room for, at least 1.
    how : {"middle", "left"}
        ``middle`` keeps the first and the last ``limit // 2`` tokens (LongBench, ``pred.py``), ``left`` the last
        ``limit``.
    """
    if len(ids) <= limit:
        return list(ids)
    half = limit // 2 if how == "middle" else 0
    return [*ids[:half], *ids[-half:]] if half else list(ids[-limit:])
