"""A first, coarse score: by signs alone, of every token; only the best blocks by it are scored by their whole codes.

The first plane of a code of two bits is a code of one bit with the same scales, and lies before the second one. A block
gets the largest estimate of its tokens, so one that matters because of a single token is found by it; fewer tokens per
block, such as its mean and the one that is farthest from it, miss blocks that hold most of a head's mass. Estimates
are so rough that eight bits hold a token's sum, which makes them less than half the work of whole codes.
"""

from __future__ import annotations

from scout_hf.kernels.cpu import Coarse
from scout_hf.selection.digest import Digest
from scout_hf.selection.sign import SignCode

FINE, WORTH = 6, 2
"""Blocks that are scored by whole codes, for each that is chosen; and candidates for each of those, at least."""
LARGEST = 256
"""Channels of a key, at most: each adds a rounding error."""


def coarse_for(digest: Digest, head_dim: int, blocks: int, count: int) -> Coarse | None:
    """How to choose ``count`` of ``blocks`` blocks coarsely first.

    None if such codes have one plane or too many channels, or blocks are too few for it to pay.

    Examples
    --------
    >>> from scout_hf.selection import SignCode2
    >>> from scout_hf.selection.coarse import coarse_for
    >>> coarse_for(SignCode2(), head_dim=64, blocks=4096, count=64)
    Coarse(dim=64, fine=384)
    """
    if not isinstance(digest, SignCode) or digest.bits < 2 or head_dim > LARGEST:
        return None
    if blocks < WORTH * FINE * max(count, 1):
        return None
    return Coarse(head_dim, FINE * max(count, 1))
