"""Chained hashes of token blocks: a block's hash stands for its tokens and all before them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

HASH_BYTES = 16
ROOT_BYTES = 32


def root_of(**facts: Any) -> str:
    """One word for all that decides keys and values beside the tokens, as hexadecimal digits.

    Examples
    --------
    >>> from scout_hf.prefix.hashing import root_of
    >>> root_of(model="a", block_size=32) == root_of(block_size=32, model="a")
    True
    """
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=ROOT_BYTES).hexdigest()


def block_hashes(ids: Sequence[int] | np.ndarray, block_size: int, root: str) -> bytes:
    """The hashes of the whole blocks of a text, one behind the other, 16 bytes each.

    Chained as in vLLM's prefix caching: two texts have the same hash at block ``i`` only if they agree up to its end.

    Parameters
    ----------
    ids : sequence of int
        Token ids without padding.
    block_size : int
        Tokens per block.
    root : str
        See :func:`root_of`.

    Returns
    -------
    bytes

    Examples
    --------
    >>> from scout_hf.prefix.hashing import block_hashes
    >>> one, other = block_hashes(range(9), 4, "aa"), block_hashes([*range(7), 99], 4, "aa")
    >>> len(one), one[:16] == other[:16], one[16:] == other[16:]
    (32, True, False)
    """
    numbers = np.asarray(ids, dtype="<i8")
    before, made = bytes.fromhex(root), []
    for start in range(0, len(numbers) // block_size * block_size, block_size):
        text = before + numbers[start : start + block_size].tobytes()
        before = hashlib.blake2b(text, digest_size=HASH_BYTES).digest()
        made.append(before)
    return b"".join(made)


def common_blocks(held: bytes, wanted: bytes) -> int:
    """How many leading hashes are equal."""
    low, high = 0, min(len(held), len(wanted)) // HASH_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        place = slice((middle - 1) * HASH_BYTES, middle * HASH_BYTES)
        # Chained: if these are equal, all before them are.
        low, high = (middle, high) if held[place] == wanted[place] else (low, middle - 1)
    return low
