"""What the argument of ``crop`` means to stock cache layers, which changed in transformers 5.14."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from scout_hf.compat.linear_layers import keeps_no_past

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


def fixed_layers(layers: Sequence[Any]) -> str:
    """Which layers of a cache have what no tokens can be taken from, in words; empty if there are none."""
    fixed = {index: why for index, layer in enumerate(layers) if (why := _why_fixed(layer))}
    kinds = " or ".join(sorted(set(fixed.values())))
    return f"layers {', '.join(map(str, fixed))} have {kinds}" if fixed else ""


def _why_fixed(layer: Any) -> str:
    if keeps_no_past(layer):
        return "a linear state"
    windowed = isinstance(layer, DynamicSlidingWindowLayer) and not getattr(layer, "record_past", False)
    return "a window that has moved on" if windowed and layer.get_seq_length() >= layer.sliding_window else ""
