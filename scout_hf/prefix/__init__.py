"""The prefix store: keys and values of texts that were read before, found again by their tokens."""

from scout_hf.prefix.hashing import block_hashes
from scout_hf.prefix.reading import Reading
from scout_hf.prefix.store import Piece, PrefixStore, Segment

__all__ = ["Piece", "PrefixStore", "Reading", "Segment", "block_hashes"]
