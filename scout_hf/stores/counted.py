"""Count the bytes of several stores, shared page pools once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_SEEN: ContextVar[set[Any] | None] = ContextVar("pools seen", default=None)


@contextmanager
def each_pool_once() -> Iterator[None]:
    """Context manager: each page pool counts in the ``used_bytes`` of only the first of its stores that is asked."""
    token = _SEEN.set(set())
    try:
        yield
    finally:
        _SEEN.reset(token)


def counts(pool: Any) -> bool:
    """Whether ``pool`` has not been counted yet."""
    seen = _SEEN.get()
    if seen is None:
        return True
    new = pool not in seen
    seen.add(pool)
    return new
