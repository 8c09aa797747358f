"""The prefix store: keys and values of texts that were read before, found again by their tokens."""

from scout_hf.prefix.store import PrefixStore

__all__ = ["PrefixStore"]
