"""Forwards that a patch puts in place of a module's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class OwnForward:
    """The `forward` of one module in place of its class's: it computes the same, and changes nothing.

    So it may run outside of the model's forward pass too, and a module that has one counts as unchanged.

    Attributes
    ----------
    rotary : callable or None
        Of an attention module: what its `forward` calls as `rotary_name`.
    rotary_name : str
    """

    rotary: Callable[..., Any] | None = None
    rotary_name = "apply_rotary_pos_emb"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError
