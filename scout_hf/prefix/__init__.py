"""The prefix store: keys and values of texts that were read before, found again by their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scout_hf.prefix.hashing import block_hashes
from scout_hf.prefix.store import Piece, PrefixStore, Segment

if TYPE_CHECKING:
    from scout_hf.prefix.reading import Reading

__all__ = ["Piece", "PrefixStore", "Reading", "Segment", "block_hashes"]


def __getattr__(name: str) -> Any:
    if name != "Reading":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imports torch, which a store is listed without.
    from scout_hf.prefix.reading import Reading

    return Reading
