"""What the argument of ``crop`` means to stock cache layers, which changed in transformers 5.14."""

from __future__ import annotations

import inspect

from transformers.cache_utils import DynamicLayer

_ZERO_IS_A_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters


def tokens_to_crop(given: int, held: int) -> int | None:
    """The argument that removes the same tokens from layers of any kind in any release; None to call none of them.

    Parameters
    ----------
    given : int
        At most 0: less that many tokens. Positive: the tokens to keep, which newer releases refuse.
    held : int
        Tokens in the cache.
    """
    removed = given if given <= 0 else min(0, given - held)
    return None if removed == 0 and _ZERO_IS_A_LENGTH else removed
