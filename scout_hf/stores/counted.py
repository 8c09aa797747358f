"""Counting what several stores hold together: pages that they share are counted once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_SEEN: ContextVar[set[Any] | None] = ContextVar("pools seen", default=None)


@contextmanager
def each_pool_once() -> Iterator[None]:
    """Within the block every pool of pages adds to ``used_bytes`` once, whichever of its stores is asked first."""
    token = _SEEN.set(set())
    try:
        yield
    finally:
        _SEEN.reset(token)


def counts(pool: Any) -> bool:
    """Whether ``pool`` is to be counted now."""
    seen = _SEEN.get()
    if seen is None:
        return True
    new = pool not in seen
    seen.add(pool)
    return new
